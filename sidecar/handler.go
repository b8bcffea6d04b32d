package sidecar

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/gorilla/mux"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar/contract"
)

// readyPath is the path that [Probe] requests. The response says whether there are credentials, but has none.
const readyPath = "/v1/ready"

// Handler returns the handler that Run serves. It refuses requests whose Host is neither localhost nor a loopback address.
func (s *Sidecar) Handler() http.Handler {
	router := mux.NewRouter()
	// Otherwise mux would redirect //v1/credentials to the clean path, and an SDK would follow. A client that was made to
	// request a wrong path should get a 404.
	router.SkipClean(true)
	router.NotFoundHandler = http.HandlerFunc(notFound)
	router.MethodNotAllowedHandler = http.HandlerFunc(methodNotAllowed)

	s.route(router, http.MethodGet, contract.CredentialsPath, s.serveCredentials)
	s.route(router, http.MethodGet, readyPath, s.serveReady)
	if s.metadata != policy.MetadataOff {
		s.routeMetadata(router)
	}
	return requireLoopback(s.fastPath(stripSlash(router)))
}

// fastPath handles the request that SDKs make before the router, because finding a route takes longer than responding.
func (s *Sidecar) fastPath(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == contract.CredentialsPath && r.Method == http.MethodGet {
			s.serveCredentials(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// stripSlash handles //latest as /latest. AWS_EC2_METADATA_SERVICE_ENDPOINT ends in a slash, and the paths that some SDKs
// append to it begin with one.
func stripSlash(next http.Handler) http.Handler {
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

// route registers a path with and without a final slash, because SDKs differ.
func (s *Sidecar) route(router *mux.Router, method, path string, handler http.HandlerFunc) {
	for _, p := range []string{path, path + "/"} {
		router.HandleFunc(p, handler).Methods(method)
	}
}

// requireLoopback refuses a request whose Host is another name than localhost. A web page whose name resolves to 127.0.0.1
// can reach this server, but cannot choose that header.
func requireLoopback(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isLoopback(r.Host) {
			writeError(w, http.StatusForbidden, "HOST_NOT_LOOPBACK", "the Host header must be localhost or a loopback address; use 127.0.0.1")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// isLoopback reports whether host, a Host header, is localhost or a loopback address, with or without a port.
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

// authorized reports whether the request has the authorization of this pod.
func (s *Sidecar) authorized(r *http.Request) bool {
	// The length is not secret: it is the length of a pod's UID.
	return subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), s.authorization) == 1
}

// serveCredentials serves the container-credentials endpoint.
func (s *Sidecar) serveCredentials(w http.ResponseWriter, r *http.Request) {
	if !s.authorized(r) {
		writeError(w, http.StatusForbidden, "AUTHORIZATION_INVALID",
			"the Authorization header must be the value of AWS_CONTAINER_AUTHORIZATION_TOKEN")
		return
	}
	st, err := s.await(r.Context(), maxWait)
	if err != nil {
		writeFailure(w, err)
		return
	}
	writeJSON(w, http.StatusOK, st.body)
}

// readyPoll is how long a request for readiness waits. Then the probe repeats it. A longer wait would need longer timeouts
// of the server.
const readyPoll = 5 * time.Second

// statusReport is the status of a response for [Probe] to report.
const statusReport = http.StatusGatewayTimeout

// serveReady responds with 204 when there is a session, when the start timeout has passed, or when the broker has
// reported that the pod was not injected. It responds with 503 if none of these happens within readyPoll. An authorized
// request that waits when a report is due gets statusReport with the report. The report has addresses of the cluster, so
// others do not get it.
func (s *Sidecar) serveReady(w http.ResponseWriter, r *http.Request) {
	waited := time.Since(s.started)
	started := s.startTimeout > 0 && waited >= s.startTimeout
	if st := s.state.Load(); started || st.valid(time.Now()) || st.uninjected() {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	select {
	case s.waiting <- struct{}{}:
		defer func() { <-s.waiting }()
	default: // the kubelet runs only one probe
		writeError(w, http.StatusServiceUnavailable, string(errPending.Reason), "too many requests wait for credentials; try again")
		return
	}
	// The request ends with a session, or with the first of these moments.
	wait, situation := readyPoll, "" // no report
	authorized := s.authorized(r)
	if due := nextReport(waited); authorized && due-waited <= wait && (s.startTimeout == 0 || due < s.startTimeout-reportGap) {
		wait, situation = due-waited, "no credentials yet"
	}
	timeout := s.startTimeout > 0 && s.startTimeout-waited <= wait
	if timeout {
		wait = s.startTimeout - waited
		situation = fmt.Sprintf("no credentials within the start timeout of %s, so the application starts without them", s.startTimeout)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		st := s.state.Load()
		if st.valid(time.Now()) || st.uninjected() {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		select {
		case <-st.changed:
			continue
		case <-timer.C:
		case <-r.Context().Done():
			timeout, situation = false, ""
		}
		switch {
		case authorized && situation != "":
			st.writeReport(w, situation)
		case timeout:
			w.WriteHeader(http.StatusNoContent)
		default:
			writeError(w, http.StatusServiceUnavailable, string(errPending.Reason), "no credentials yet; try again")
		}
		return
	}
}

const (
	// firstReport is when a sidecar without credentials first has that reported. A broker usually responds within a second.
	firstReport = 10 * time.Second
	// reportInterval is the maximum time between two reports. An API server keeps an Event for an hour. A kubelet writes 25
	// warnings about a pod, and then one in 5 minutes. The others should remain for other causes.
	reportInterval = 30 * time.Minute
	// reportGap is the minimum time between the last report and the start timeout. A kubelet that probes once a second then
	// probes again without a pause, so that no report delays the application.
	reportGap = 2 * time.Second
	// maxReport is the maximum length of a report in bytes. Events of other programs than kubelets have 1,024 at most.
	maxReport = 1000
)

// nextReport returns the time from the start of the sidecar to its first report after waited: 10 s, 20 s, 40 s and so on,
// and finally each half an hour.
func nextReport(waited time.Duration) time.Duration {
	next := firstReport
	for next <= waited {
		next += min(next, reportInterval)
	}
	return next
}

// writeReport responds with the situation of the pod and the reason why st has no valid lease.
func (st *state) writeReport(w http.ResponseWriter, situation string) {
	err := st.failure()
	text := err.Error()
	if e, ok := errors.AsType[*credential.Error](err); ok {
		text = e.Error() // without the broker's address, which changes: the kubelet counts equal reports
	}
	reason := string(credential.ReasonOf(err))
	writeError(w, statusReport, reason, clip.Line(fmt.Sprintf("%s: %s: %s", situation, reason, text), maxReport))
}

// timeFormat is RFC 3339 in UTC with whole seconds. On the metadata path, botocore parses no other form, and silently
// ignores credentials whose time has a fraction.
const timeFormat = "2006-01-02T15:04:05Z"

// containerCredentials is the response of the container-credentials endpoint. JavaScript, botocore and Rust refuse it if
// one of the first four fields is missing. Some SDKs read the account from one of the last two.
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
		Expiration:      lease.Expiration.UTC().Format(timeFormat),
		RoleArn:         lease.Role.String(),
		AccountID:       lease.Role.Account(),
	}
}

// failure is an error response. The SDKs for Go v1 and Java read the lower-case names, JavaScript the capitalized ones.
type failure struct {
	LowerCode    string `json:"code"`
	LowerMessage string `json:"message"`
	Code         string
	Message      string
}

// writeFailure responds with the reason why there is no session. SDKs retry a 503 and give up on most 4xx, so a refusal
// is a 4xx.
func writeFailure(w http.ResponseWriter, err error) {
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		e = credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal,
			"cannot get credentials now; see the sidecar's log for the cause")
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
	writeError(w, http.StatusNotFound, "NOT_FOUND", "this path does not exist")
}

func methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	allow := http.MethodGet
	if strings.TrimSuffix(r.URL.Path, "/") == metadataTokenPath {
		allow = http.MethodPut
	}
	w.Header().Set("Allow", allow) // RFC 9110, section 15.5.6
	writeError(w, http.StatusMethodNotAllowed, "METHOD_NOT_ALLOWED", "this path requires "+allow)
}

func writeError(w http.ResponseWriter, status int, code, message string) {
	writeJSON(w, status, mustJSON(failure{code, message, code, message}))
}

// All responses share these values, and do not change them.
var (
	noStore = []string{"no-store"}
	// The SDK for Go reads an error's message only if the type has no charset.
	typeJSON = []string{"application/json"}
	typeText = []string{"text/plain"}
)

func writeJSON(w http.ResponseWriter, status int, body []byte) { write(w, status, typeJSON, body) }

func write(w http.ResponseWriter, status int, contentType []string, body []byte) {
	h := w.Header()
	h["Content-Type"] = contentType
	h["Cache-Control"] = noStore
	// Without it, net/http sends a body over 2 kB in chunks, as with a long session token.
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	w.WriteHeader(status)
	_, _ = w.Write(body) // it fails if the client has closed the connection
}

// mustJSON encodes a struct of strings, which cannot fail.
func mustJSON(v any) []byte {
	body, err := json.Marshal(v)
	if err != nil {
		return []byte("{}")
	}
	return body
}
