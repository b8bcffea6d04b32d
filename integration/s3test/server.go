// Package s3test is a double of Amazon S3 for tests and the demonstration: a real server over HTTP, for the sessions of
// an STS double.
//
// SDKs and the AWS CLI use it unchanged to list a bucket, and to put, get and look up objects. It verifies the
// signature (Signature Version 4), the token and the expiration of each request. A bucket opens only for the role of
// its own name. Errors have the codes of S3.
//
// It refuses what it does not implement, such as multipart uploads and presigned URLs. It evaluates no policies, and
// does not verify the signatures of single chunks of a body: the signature of the request proves who the caller is.
// Objects are in memory.
package s3test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
)

const (
	// maxBody bounds the body of a request, and so an object. Tests store sentences.
	maxBody = 1 << 20
	// maxObjects bounds a bucket, so that a list never needs a second page.
	maxObjects = 1000
	// headerTimeout is ample, because clients are local.
	headerTimeout = 10 * time.Second
)

// Server is the service. It is safe for concurrent use.
type Server struct {
	sts      *ststest.Server
	url      string
	sessions string // the start of the ARNs of the account's sessions

	mu      sync.Mutex
	buckets map[string]map[string]object // by name and key
}

type object struct {
	body     []byte
	etag     string
	modified time.Time
	header   http.Header // of the upload: its checksums and type
}

// Start serves S3 on l until ctx ends, with these buckets. Their names must be names of roles: the role opens the bucket
// for the sessions that sts has made in the account of its user.
func Start(ctx context.Context, l net.Listener, sts *ststest.Server, buckets ...string) *Server {
	account := strings.Split(sts.UserARN(), ":")[4]
	s := &Server{
		sts: sts, url: "http://" + l.Addr().String(),
		sessions: "arn:aws:sts::" + account + ":assumed-role/",
		buckets:  make(map[string]map[string]object),
	}
	for _, bucket := range buckets {
		s.buckets[bucket] = make(map[string]object)
	}
	server := &http.Server{Handler: s, ReadHeaderTimeout: headerTimeout}
	go func() { _ = server.Serve(l) }() // its error is that it was closed
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return s
}

// URL returns the base URL, for AWS_ENDPOINT_URL_S3. Clients must put the bucket in the path.
func (s *Server) URL() string { return s.url }

// ServeHTTP handles one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Amz-Request-Id", rand.Text()[:16])
	if err := s.serve(w, r); err != nil {
		e, ok := errors.AsType[*apiError](err)
		if !ok {
			e = fail(http.StatusBadRequest, "IncompleteBody", "The body could not be read")
		}
		writeXML(w, e.status, e)
	}
}

// apiError is an error of S3.
type apiError struct {
	XMLName xml.Name `xml:"Error"`
	Code    string
	Message string
	status  int
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

func fail(status int, code, message string) *apiError {
	return &apiError{Code: code, Message: message, status: status}
}

// refusals are the errors of S3 for those of STS.
var refusals = map[string]*apiError{
	"MissingAuthenticationToken": fail(http.StatusForbidden, "AccessDenied", "Access Denied"),
	"IncompleteSignature":        fail(http.StatusBadRequest, "AuthorizationHeaderMalformed", "The authorization header that you provided is not valid."),
	"InvalidClientTokenId":       fail(http.StatusForbidden, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
	"ExpiredToken":               fail(http.StatusBadRequest, "ExpiredToken", "The provided token has expired."),
	"SignatureDoesNotMatch":      fail(http.StatusForbidden, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided."),
}

// serve authenticates and authorizes a request, and then handles it.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) error {
	arn, err := s.sts.Authenticate(r, "s3", r.Header.Get(contentHash))
	if err != nil {
		if refusal := refusals[ststest.Code(err)]; refusal != nil {
			return refusal
		}
		return fail(http.StatusInternalServerError, "InternalError", "We encountered an internal error.")
	}
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if _, ok := s.buckets[bucket]; !ok {
		return fail(http.StatusNotFound, "NoSuchBucket", "The specified bucket does not exist")
	}
	if !strings.HasPrefix(arn, s.sessions+bucket+"/") {
		return fail(http.StatusForbidden, "AccessDenied", "User: "+arn+" is not authorized to open bucket "+bucket)
	}
	query := r.URL.Query()
	query.Del("x-id") // the name of the operation
	switch reads := r.Method == http.MethodGet || r.Method == http.MethodHead; {
	case key != "" && reads && len(query) == 0:
		return s.get(w, r, bucket, key)
	case key != "" && r.Method == http.MethodPut && len(query) == 0:
		return s.put(w, r, bucket, key)
	case key == "" && r.Method == http.MethodHead && len(query) == 0:
		return nil
	case key == "" && r.Method == http.MethodGet && query.Get("list-type") == "2":
		return s.list(w, query, bucket)
	}
	return fail(http.StatusNotImplemented, "NotImplemented", "A request that you provided implies functionality that is not implemented.")
}

// contentHash has the hash of the body, in hex, or a word that says why there is none.
const contentHash = "X-Amz-Content-Sha256"

// readBody reads the body of an upload. Over plain HTTP, some clients send it in signed chunks.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	in := io.Reader(http.MaxBytesReader(w, r.Body, maxBody))
	hash := r.Header.Get(contentHash)
	chunked := strings.HasPrefix(hash, "STREAMING-")
	if chunked {
		in = httputil.NewChunkedReader(in) // the form of HTTP, with signatures as extensions
	}
	body, err := io.ReadAll(in)
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, fail(http.StatusBadRequest, "EntityTooLarge", "Your proposed upload exceeds the maximum allowed size")
	}
	if err != nil {
		return nil, fmt.Errorf("reading the body: %w", err)
	}
	if !chunked && hash != "UNSIGNED-PAYLOAD" && hash != hexSHA256(body) {
		return nil, fail(http.StatusBadRequest, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed.")
	}
	return body, nil
}

func (s *Server) put(w http.ResponseWriter, r *http.Request, bucket, key string) error {
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	stored := object{body: body, etag: `"` + hexSHA256(body) + `"`, modified: time.Now().UTC(), header: make(http.Header)}
	for name, values := range r.Header {
		if isChecksum(name) || name == "Content-Type" {
			stored.header[name] = values
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	objects := s.buckets[bucket]
	if _, replaced := objects[key]; !replaced && len(objects) == maxObjects {
		return fail(http.StatusBadRequest, "InvalidRequest", fmt.Sprintf("The bucket has %d objects, its maximum", maxObjects))
	}
	objects[key] = stored
	w.Header().Set("ETag", stored.etag)
	return nil
}

func (s *Server) get(w http.ResponseWriter, r *http.Request, bucket, key string) error {
	s.mu.Lock()
	found, ok := s.buckets[bucket][key]
	s.mu.Unlock()
	if !ok {
		return fail(http.StatusNotFound, "NoSuchKey", "The specified key does not exist.")
	}
	for name, values := range found.header {
		// A checksum is that of the whole object.
		if !isChecksum(name) || r.Header.Get("X-Amz-Checksum-Mode") == "ENABLED" && r.Header.Get("Range") == "" {
			w.Header()[name] = values
		}
	}
	w.Header().Set("ETag", found.etag)
	http.ServeContent(w, r, "", found.modified, bytes.NewReader(found.body))
	return nil
}

func isChecksum(header string) bool { return strings.HasPrefix(header, "X-Amz-Checksum-") }

type listing struct {
	XMLName           xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListBucketResult"`
	Name, Prefix      string
	KeyCount, MaxKeys int
	IsTruncated       bool
	Contents          []listed
}

type listed struct {
	Key          string
	LastModified string
	ETag         string
	Size         int
	StorageClass string
}

// listParameters are those of the URL of a list. Without an EncodingType in the response, clients take keys as they are.
var listParameters = []string{"list-type", "prefix", "encoding-type", "fetch-owner"}

func (s *Server) list(w http.ResponseWriter, query url.Values, bucket string) error {
	for name := range query {
		if !slices.Contains(listParameters, name) && query.Get(name) != "" {
			return fail(http.StatusNotImplemented, "NotImplemented", "A list with parameter "+name+" is not implemented.")
		}
	}
	all := listing{Name: bucket, Prefix: query.Get("prefix"), MaxKeys: maxObjects}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(s.buckets[bucket])) {
		if o := s.buckets[bucket][key]; strings.HasPrefix(key, all.Prefix) {
			all.Contents = append(all.Contents, listed{key, o.modified.Format("2006-01-02T15:04:05.000Z"), o.etag, len(o.body), "STANDARD"})
		}
	}
	all.KeyCount = len(all.Contents)
	writeXML(w, http.StatusOK, all)
	return nil
}

func writeXML(w http.ResponseWriter, status int, document any) {
	text, err := xml.Marshal(document)
	if err != nil { // it cannot fail, because the documents are plain structs
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	_, _ = w.Write(append([]byte(xml.Header), text...)) //nolint:gosec // It is XML. A client that has closed the connection is not an error.
}

func hexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
