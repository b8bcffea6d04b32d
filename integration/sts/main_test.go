//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

const roleARN = "arn:aws:iam::123456789012:role/demo"

// wire is an HTTP client that stores the last response.
type wire struct {
	header http.Header
	status int
	body   string
}

func (w *wire) Do(r *http.Request) (*http.Response, error) {
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	w.header, w.status, w.body = resp.Header, resp.StatusCode, string(body)
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, err
}

// startMinIO starts MinIO and waits for its STS, which is ready a moment after S3.
func startMinIO(t *testing.T) *minio.Server {
	t.Helper()
	if testing.Short() && !tools.Built(tools.MinIO) {
		t.Skip("-short, and minio is not built (go run ./integration/tools/install minio)")
	}
	run, err := process.Open(t.Context(), process.Config{Parent: t.TempDir(), Name: "minio"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := run.Close(); err != nil {
			t.Error(err)
		}
	})
	server, err := minio.Start(t.Context(), run, run.Loopback(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	access, secret := server.Root()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		_, err := client(server.Endpoint(), access, secret, http.DefaultClient).AssumeRole(ctx, &sts.AssumeRoleInput{
			RoleArn: aws.String(roleARN), RoleSessionName: aws.String("pod-1"),
		})
		if err == nil {
			return server
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func client(endpoint, access, secret string, http aws.HTTPClient) *sts.Client {
	return sts.New(sts.Options{
		BaseEndpoint: aws.String(endpoint), Region: "us-east-1", HTTPClient: http, Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(access, secret, ""),
	})
}

// leaves returns the paths of a document's elements with text, below the root element.
func leaves(t *testing.T, doc string) (paths []string) {
	t.Helper()
	var path []string
	d := xml.NewDecoder(strings.NewReader(doc))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			slices.Sort(paths)
			return slices.Compact(paths)
		}
		if err != nil {
			t.Fatalf("parsing a response: %v", err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			path = append(path, token.Name.Local)
		case xml.EndElement:
			path = path[:len(path)-1]
		case xml.CharData:
			if len(bytes.TrimSpace(token)) > 0 {
				paths = append(paths, strings.Join(path[1:], "/"))
			}
		}
	}
}

// TestDoubleAgreesWithMinIO compares the responses of the STS double with those of an independent STS: keys, expiration,
// inline policy and refusals. The table has AWS's error code if MinIO's differs.
func TestDoubleAgreesWithMinIO(t *testing.T) {
	real := startMinIO(t)
	double, err := ststest.Start(t.Context(), ststest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	access, secret := real.Root()
	doubleAccess, doubleSecret := double.Keys()
	call := func(endpoint, access, secret string, change func(*sts.AssumeRoleInput)) (wire, string) {
		t.Helper()
		var w wire
		in := &sts.AssumeRoleInput{RoleArn: aws.String(roleARN), RoleSessionName: aws.String("pod-1")}
		change(in)
		out, err := client(endpoint, access, secret, &w).AssumeRole(t.Context(), in)
		if e, ok := errors.AsType[smithy.APIError](err); ok {
			return w, e.ErrorCode()
		}
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]*string{"AccessKeyId": out.Credentials.AccessKeyId, "SecretAccessKey": out.Credentials.SecretAccessKey, "SessionToken": out.Credentials.SessionToken} {
			if aws.ToString(value) == "" {
				t.Errorf("%s: the SDK finds no %s", endpoint, name)
			}
		}
		return w, ""
	}
	expiration := regexp.MustCompile(`<Expiration>(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)</Expiration>`)

	const allow = `{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetObject"],"Resource":["arn:aws:s3:::b/*"]}]}`
	// MinIO does not count blanks.
	pad := func(n int) string {
		return strings.Replace(allow, "b/*", "b/"+strings.Repeat("k", n-len(allow))+"*", 1)
	}
	for name, tt := range map[string]struct {
		change             func(*sts.AssumeRoleInput)
		wrongKey, wrongSec bool
		duration           time.Duration // 0: refused
		status             int
		minio, aws         string // error codes
	}{
		"default duration":  {change: func(*sts.AssumeRoleInput) {}, duration: time.Hour},
		"shortest duration": {change: func(in *sts.AssumeRoleInput) { in.DurationSeconds = aws.Int32(900) }, duration: 15 * time.Minute},
		"longest duration":  {change: func(in *sts.AssumeRoleInput) { in.DurationSeconds = aws.Int32(43200) }, duration: 12 * time.Hour},
		"policy":            {change: func(in *sts.AssumeRoleInput) { in.Policy = aws.String(allow) }, duration: time.Hour},
		"longest policy":    {change: func(in *sts.AssumeRoleInput) { in.Policy = aws.String(pad(2048)) }, duration: time.Hour},
		"too short":         {change: func(in *sts.AssumeRoleInput) { in.DurationSeconds = aws.Int32(899) }, status: 400, minio: "InvalidParameterValue", aws: "ValidationError"},
		"too long a policy": {change: func(in *sts.AssumeRoleInput) { in.Policy = aws.String(pad(2049)) }, status: 400, minio: "InvalidParameterValue", aws: "ValidationError"},
		"no JSON":           {change: func(in *sts.AssumeRoleInput) { in.Policy = aws.String("{") }, status: 400, minio: "InvalidParameterValue", aws: "MalformedPolicyDocument"},
		"unknown key":       {change: func(*sts.AssumeRoleInput) {}, wrongKey: true, status: 403, minio: "AccessDenied", aws: "InvalidClientTokenId"},
		"wrong secret":      {change: func(*sts.AssumeRoleInput) {}, wrongSec: true, status: 403, minio: "AccessDenied", aws: "SignatureDoesNotMatch"},
	} {
		t.Run(name, func(t *testing.T) {
			keys := func(access, secret string) (string, string) {
				if tt.wrongKey {
					access = "AKIAUNKNOWNUNKNOWN00"
				}
				if tt.wrongSec {
					secret += "x"
				}
				return access, secret
			}
			k, s := keys(access, secret)
			m, mCode := call(real.Endpoint(), k, s, tt.change)
			k, s = keys(doubleAccess, doubleSecret.Reveal())
			d, dCode := call(double.URL(), k, s, tt.change)
			if tt.duration == 0 {
				if m.status != tt.status || d.status != tt.status || mCode != tt.minio || dCode != tt.aws {
					t.Errorf("MinIO refuses with %d %s, the double with %d %s; want %d, %s and %s", m.status, mCode, d.status, dCode, tt.status, tt.minio, tt.aws)
				}
				for _, path := range []string{"Error/Code", "Error/Message", "Error/Type", "RequestId"} {
					for name, w := range map[string]wire{"MinIO": m, "the double": d} {
						if name == "MinIO" && path == "Error/Type" {
							continue // MinIO leaves it empty
						}
						if !slices.Contains(leaves(t, w.body), path) {
							t.Errorf("the error of %s has no %s", name, path)
						}
					}
				}
				return
			}
			if m.status != 200 || d.status != 200 {
				t.Fatalf("MinIO responds %d %s, the double %d %s", m.status, mCode, d.status, dCode)
			}
			shared := func(w wire) (paths []string) {
				for _, path := range leaves(t, w.body) {
					if strings.HasPrefix(path, "AssumeRoleResult/Credentials/") || path == "ResponseMetadata/RequestId" {
						paths = append(paths, path)
					}
				}
				return paths
			}
			if diff := cmp.Diff(shared(m), shared(d)); diff != "" || len(shared(m)) != 5 {
				t.Errorf("elements of the response (-MinIO +double):\n%s", diff)
			}
			for name, w := range map[string]wire{"MinIO": m, "the double": d} {
				match := expiration.FindStringSubmatch(w.body)
				date, err := http.ParseTime(w.header.Get("Date"))
				if match == nil || err != nil {
					t.Fatalf("%s: no expiration or date (%v): %v", name, err, w.header)
				}
				expires, _ := time.Parse(time.RFC3339, match[1])
				// Both are cut to seconds.
				if off := (expires.Sub(date) - tt.duration).Abs(); off > 2*time.Second {
					t.Errorf("%s: at %v, the session expires at %v", name, date, expires)
				}
				if !strings.HasPrefix(w.body, "<") || !strings.Contains(w.body, `xmlns="https://sts.amazonaws.com/doc/2011-06-15/"`) {
					t.Errorf("%s responds with another document", name)
				}
			}
		})
	}
}

// TestAssumeAgainstMinIO calls MinIO with the broker's code, with right and wrong keys.
func TestAssumeAgainstMinIO(t *testing.T) {
	real := startMinIO(t)
	access, secret := real.Root()
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "AWS_") {
			t.Setenv(name, "")
		}
	}
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	grant, err := rules.Grant(
		policy.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", Request: keys.Request(map[string]string{keys.Name(policy.Role): roleARN})},
		policy.Namespace{Name: "shop", Labels: map[string]string{keys.Name(policy.Inject): policy.Enabled}, Annotations: map[string]string{keys.Name(policy.Permitted): ".*"}})
	if err != nil {
		t.Fatal(err)
	}
	call := func(access, secret string) (credential.Credential, error) {
		t.Setenv("AWS_ACCESS_KEY_ID", access)
		t.Setenv("AWS_SECRET_ACCESS_KEY", secret)
		s, err := assume.New(context.WithoutCancel(t.Context()), assume.Config{Region: "us-east-1", Endpoint: real.Endpoint()})
		if err != nil {
			t.Fatal(err)
		}
		return s.Credential(t.Context(), grant)
	}
	cred, err := call(access, secret)
	if err != nil || !cred.Valid(time.Now()) {
		t.Errorf("got %s, %v", cred, err)
	}
	for what, pair := range map[string][2]string{"unknown key": {"AKIAUNKNOWNUNKNOWN00", secret}, "wrong secret": {access, secret + "x"}} {
		_, err := call(pair[0], pair[1])
		if credential.ReasonOf(err) != credential.ReasonBrokerCredentials || strings.Contains(fmt.Sprintf("%+v", err), secret) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
