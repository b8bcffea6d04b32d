package sidecar

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/mux"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
)

// readyPath answers [Probe]. It reports whether there are credentials, never which.
const readyPath = "/v1/ready"

// Handler returns what Run serves. It answers only what is asked of a loopback address by that
// address or as localhost.
func (s *Sidecar) Handler() http.Handler {
	router := mux.NewRouter()
	// Without it mux redirects //v1/credentials to the clean path: an SDK would follow, and whoever
	// can make one ask a wrong path should get a 404.
	router.SkipClean(true)
	router.NotFoundHandler = http.HandlerFunc(notFound)
	router.MethodNotAllowedHandler = http.HandlerFunc(methodNotAllowed)

	s.route(router, http.MethodGet, contract.CredentialsPath, s.serveCredentials)
	s.route(router, http.MethodGet, readyPath, s.serveReady)
	if s.metadata != policy.MetadataOff {
		s.routeMetadata(router)
	}
	return requireLoopback(s.quick(oneSlash(router)))
}

// quick answers the request that SDKs make before others have a look at it: finding a route takes longer than
// answering.
func (s *Sidecar) quick(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == contract.CredentialsPath && r.Method == http.MethodGet {
			s.serveCredentials(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// oneSlash takes //latest for /latest: AWS_EC2_METADATA_SERVICE_ENDPOINT ends in a slash, and the paths that some SDKs
// append to it begin with one.
func oneSlash(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "//latest/") {
			address := *r.URL
			address.Path, address.RawPath = address.Path[1:], ""
			r = r.WithContext(r.Context()) // a copy
			r.URL = &address
		}
		next.ServeHTTP(w, r)
	})
}

// route registers a path with and without a slash at its end: SDKs differ.
func (s *Sidecar) route(router *mux.Router, method, path string, handler http.HandlerFunc) {
	for _, p := range []string{path, path + "/"} {
		router.HandleFunc(p, handler).Methods(method)
	}
}

// requireLoopback refuses requests whose Host is a name other than localhost. A web page whose name
// was made to resolve to 127.0.0.1 reaches this server, but cannot choose that header.
func requireLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isLoopback(r.Host) {
			writeError(w, http.StatusForbidden, "HOST_NOT_LOOPBACK", "ask for 127.0.0.1, not for another name of it")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// isLoopback reports whether host, the value of a Host header, is localhost or a loopback address,
// with or without a port.
func isLoopback(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	} else if name, ok := strings.CutPrefix(host, "["); ok {
		host = strings.TrimSuffix(name, "]")
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback() && addr.Zone() == ""
}

// serveCredentials is the container-credentials endpoint.
func (s *Sidecar) serveCredentials(w http.ResponseWriter, r *http.Request) {
	// The length is no secret: it is that of a pod's UID.
	if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), s.authorization) != 1 {
		writeError(w, http.StatusForbidden, "AUTHORIZATION_INVALID",
			"the Authorization header must be the value of AWS_CONTAINER_AUTHORIZATION_TOKEN")
		return
	}
	st, err := s.await(r.Context(), patience)
	if err != nil {
		writeFailure(w, err)
		return
	}
	writeJSON(w, http.StatusOK, st.body)
}

// readyPoll is how long a request for readiness waits. The probe asks again; a longer wait would need
// other time limits than the rest of the server.
const readyPoll = 5 * time.Second

// serveReady answers 204 once a credential is held, the start timeout has passed or the broker has said that the pod was
// not injected, and 503 when none of these happens within readyPoll.
func (s *Sidecar) serveReady(w http.ResponseWriter, r *http.Request) {
	started := s.startTimeout > 0 && time.Since(s.started) >= s.startTimeout
	if st := s.state.Load(); started || st.valid(time.Now()) || st.uninjected() {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	select {
	case s.waiting <- struct{}{}:
		defer func() { <-s.waiting }()
	default: // not the probe, which is one
		writeError(w, http.StatusServiceUnavailable, string(errPending.Reason), "too many wait")
		return
	}
	poll := time.NewTimer(readyPoll)
	defer poll.Stop()
	var start <-chan time.Time // never, for a start timeout of 0
	if s.startTimeout > 0 {
		timer := time.NewTimer(time.Until(s.started.Add(s.startTimeout)))
		defer timer.Stop()
		start = timer.C
	}
	for {
		st := s.state.Load()
		if st.valid(time.Now()) || st.uninjected() {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		select {
		case <-st.changed:
		case <-start:
			w.WriteHeader(http.StatusNoContent)
			return
		case <-poll.C:
			writeError(w, http.StatusServiceUnavailable, string(errPending.Reason), "no credentials yet")
			return
		case <-r.Context().Done():
			writeError(w, http.StatusServiceUnavailable, string(errPending.Reason), "no credentials yet")
			return
		}
	}
}

// timeForm is RFC 3339 in UTC with whole seconds: botocore parses no other form on the metadata path,
// and passes over a fraction's credential silently.
const timeForm = "2006-01-02T15:04:05Z"

// containerCredentials is the answer of the container-credentials endpoint. JavaScript, botocore and
// Rust refuse it when one of the first four is missing; some SDKs take the account from one of the
// last two.
type containerCredentials struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	Token           string
	Expiration      string
	RoleArn         string
	AccountID       string `json:"AccountId"`
}

func render(lease credential.Lease) []byte { return mustJSON(credentialsOf(lease)) }

func credentialsOf(lease credential.Lease) containerCredentials {
	return containerCredentials{
		AccessKeyID:     lease.AccessKeyID,
		SecretAccessKey: lease.SecretAccessKey.Reveal(),
		Token:           lease.SessionToken.Reveal(),
		Expiration:      lease.Expiration.UTC().Format(timeForm),
		RoleArn:         lease.Role.String(),
		AccountID:       lease.Role.Account(),
	}
}

// failure is an error as SDKs read it: Go v1 and Java look for the lower-case names, JavaScript for
// the capitalized ones.
type failure struct {
	LowerCode    string `json:"code"`
	LowerMessage string `json:"message"`
	Code         string
	Message      string
}

// writeFailure answers with the reason why no credential is held. SDKs retry a 503 and give up on
// most 4xx, so a 4xx is for what will not change by itself.
func writeFailure(w http.ResponseWriter, err error) {
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		e = credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal,
			"credentials cannot be had at the moment; the sidecar's log says why")
	}
	code := http.StatusServiceUnavailable
	switch {
	case errors.Is(e.Kind, credential.ErrInvalid):
		code = http.StatusBadRequest
	case refused(e):
		code = http.StatusForbidden
	}
	message := e.Message
	if e.Cause != nil {
		// Only package client sets a Cause, with a message that ends in "the sidecar keeps retrying". The log has the cause
		// itself, so it does not get this hint.
		message += ", see its log for the cause"
	}
	writeError(w, code, string(e.Reason), message)
}

func notFound(w http.ResponseWriter, _ *http.Request) {
	writeError(w, http.StatusNotFound, "NOT_FOUND", "nothing is served at this path")
}

func methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	allow := http.MethodGet
	if strings.TrimSuffix(r.URL.Path, "/") == metadataTokenPath {
		allow = http.MethodPut
	}
	w.Header().Set("Allow", allow) // RFC 9110, section 15.5.6
	writeError(w, http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED", "this path takes "+allow)
}

func writeError(w http.ResponseWriter, status int, code, message string) {
	writeJSON(w, status, mustJSON(failure{code, message, code, message}))
}

// Shared by all answers, which do not change them.
var (
	noStore = []string{"no-store"}
	// The Go SDK reads an error's message only if the type has no charset.
	typeJSON = []string{"application/json"}
	typeText = []string{"text/plain"}
)

func writeJSON(w http.ResponseWriter, status int, body []byte) { write(w, status, typeJSON, body) }

func write(w http.ResponseWriter, status int, contentType []string, body []byte) {
	h := w.Header()
	h["Content-Type"] = contentType
	h["Cache-Control"] = noStore
	// Without it net/http sends in chunks what is longer than 2 kB, as with a long session token.
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client has gone: nobody is left to tell
}

// mustJSON encodes a struct of strings, which cannot fail.
func mustJSON(v any) []byte {
	body, err := json.Marshal(v)
	if err != nil {
		return []byte("{}")
	}
	return body
}
