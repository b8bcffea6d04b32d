package ststest

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// This file verifies Signature Version 4 of the IAM User Guide ("Create a signed AWS API request") in an Authorization header.
// Presigned URLs are not supported.
const (
	sigAlgorithm  = "AWS4-HMAC-SHA256"
	sigTerminator = "aws4_request"
	sigService    = "sts"
	sigTimeFormat = "20060102T150405Z"

	// sigSkew is the maximum difference between the time of a signature and the server's time: five minutes, by STS's own error
	// messages.
	sigSkew = 5 * time.Minute

	// maxSignedHeaders bounds the work for one request. SDKs sign about ten headers.
	maxSignedHeaders = 50
)

// authorization is a parsed Authorization header.
type authorization struct {
	accessKeyID   string
	date          string // yyyymmdd
	region        string
	service       string
	signedHeaders []string
	signature     string // hex
}

// parseAuthorization parses an Authorization header. The result is not verified.
func parseAuthorization(header string) (authorization, error) {
	if header == "" {
		return authorization{}, fail(http.StatusForbidden, "MissingAuthenticationToken", "Request is missing Authentication Token")
	}
	// The message must not quote the header, because it is derived from a secret.
	incomplete := fail(http.StatusBadRequest, "IncompleteSignature", "Authorization header is not a complete %s signature", sigAlgorithm)
	rest, ok := strings.CutPrefix(header, sigAlgorithm+" ")
	if !ok {
		return authorization{}, incomplete
	}
	fields := make(map[string]string, 3)
	for field := range strings.SplitSeq(rest, ",") {
		key, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		fields[key] = value
	}
	scope := strings.Split(fields["Credential"], "/")
	if len(scope) != 5 || slices.Contains(scope, "") || scope[4] != sigTerminator ||
		fields["SignedHeaders"] == "" || fields["Signature"] == "" {
		return authorization{}, incomplete
	}
	signed := strings.Split(fields["SignedHeaders"], ";")
	if len(signed) > maxSignedHeaders {
		return authorization{}, incomplete
	}
	return authorization{
		accessKeyID: scope[0], date: scope[1], region: scope[2], service: scope[3],
		signedHeaders: signed, signature: fields["Signature"],
	}, nil
}

// verify returns STS's error if secret did not make the signature of r for a service. payload is the hash of the body in the
// canonical request.
func (a authorization) verify(r *http.Request, service, payload string, secret credential.Secret, now time.Time) error {
	mismatch := func(message string, args ...any) error {
		return fail(http.StatusForbidden, "SignatureDoesNotMatch", message, args...)
	}
	if a.service != service {
		return mismatch("Credential should be scoped to correct service: '%s'.", service)
	}
	stamp := r.Header.Get("X-Amz-Date")
	at, err := time.Parse(sigTimeFormat, stamp)
	if err != nil {
		return fail(http.StatusBadRequest, "IncompleteSignature", "X-Amz-Date is missing or not of the form %s", sigTimeFormat)
	}
	if !strings.HasPrefix(stamp, a.date) {
		return mismatch("Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP")
	}
	if earliest := now.Add(-sigSkew); at.Before(earliest) {
		return mismatch("Signature expired: %s is now earlier than %s (%s - 5 min.)",
			stamp, earliest.UTC().Format(sigTimeFormat), now.UTC().Format(sigTimeFormat))
	}
	if latest := now.Add(sigSkew); at.After(latest) {
		return mismatch("Signature not yet current: %s is still later than %s (%s + 5 min.)",
			stamp, latest.UTC().Format(sigTimeFormat), now.UTC().Format(sigTimeFormat))
	}
	// The headers that decide on rights must be signed, or another could replace them.
	for _, name := range []string{"host", "x-amz-date", "x-amz-security-token"} {
		present := name != "x-amz-security-token" || r.Header.Get(name) != ""
		if present && !slices.Contains(a.signedHeaders, name) {
			return mismatch("'%s' must be a 'SignedHeader' in the AWS Authorization.", name)
		}
	}
	if subtle.ConstantTimeCompare([]byte(a.signature), []byte(a.sign(r, payload, secret))) != 1 {
		return mismatch("The request signature we calculated does not match the signature you provided. " +
			"Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	}
	return nil
}

// sign returns the signature of r with secret, in hex.
func (a authorization) sign(r *http.Request, payload string, secret credential.Secret) string {
	scope := strings.Join([]string{a.date, a.region, a.service, sigTerminator}, "/")
	toSign := strings.Join([]string{
		sigAlgorithm, r.Header.Get("X-Amz-Date"), scope, hexSHA256([]byte(a.canonicalRequest(r, payload))),
	}, "\n")
	key := []byte("AWS4" + secret.Reveal())
	for _, part := range []string{a.date, a.region, a.service, sigTerminator} {
		key = hmacSHA256(key, part)
	}
	return hex.EncodeToString(hmacSHA256(key, toSign))
}

func (a authorization) canonicalRequest(r *http.Request, payload string) string {
	var b strings.Builder
	// S3 encodes the path once, other services twice. STS has only the path "/".
	path := strings.ReplaceAll(escape(r.URL.Path), "%2F", "/")
	b.WriteString(r.Method + "\n" + path + "\n" + canonicalQuery(r.URL.Query()) + "\n")
	for _, name := range a.signedHeaders {
		b.WriteString(name + ":" + headerValue(r, name) + "\n")
	}
	b.WriteString("\n" + strings.Join(a.signedHeaders, ";") + "\n" + payload)
	return b.String()
}

// headerValue returns a header's canonical value: its values joined, with outer spaces removed and inner ones single. net/http
// keeps two headers outside the map.
func headerValue(r *http.Request, name string) string {
	switch name {
	case "host":
		return r.Host
	case "content-length":
		return strconv.FormatInt(r.ContentLength, 10)
	}
	values := slices.Clone(r.Header.Values(name))
	for i, v := range values {
		values[i] = strings.Join(strings.Fields(v), " ")
	}
	return strings.Join(values, ",")
}

func canonicalQuery(query url.Values) string {
	for _, values := range query {
		slices.Sort(values)
	}
	return spaces(query.Encode())
}

// escape encodes all characters that RFC 3986 does not call unreserved.
func escape(text string) string { return spaces(url.QueryEscape(text)) }

// spaces changes the only difference between the encoding of package url and RFC 3986.
func spaces(encoded string) string { return strings.ReplaceAll(encoded, "+", "%20") }

func hexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func hmacSHA256(key []byte, data string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(data))
	return h.Sum(nil)
}
