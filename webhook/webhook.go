// Package webhook responds to the API server's admission reviews. It injects annotated pods, and refuses those that the
// broker would refuse later, while the user still sees the reason.
//
// It guarantees:
//   - it injects or refuses each annotated pod. It refuses if it cannot decide (a panic, an unavailable API server),
//     because a pod without its sidecar would get the role of its node;
//   - it admits everything else unchanged;
//   - it responds to each review that it can read with a review of the same uid. Other requests get a 4xx, a 500 after a
//     panic, or a 503 if too many reviews for its memory arrive at once;
//   - it loses no review while it shuts down, see [Server.Run];
//   - its log has one line for each decision, and never an environment value or a pod.
//
// It has no rights except to read namespaces, and the broker checks each pod again. It does not register itself with the
// API server.
package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gorilla/mux"

	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/webhook/inject"
)

// Namespaces reads namespaces.
type Namespaces interface {
	// Namespace returns the labels and annotations of a namespace, from a watch cache. credential.ErrNotFound means that the
	// namespace does not exist. Any other error means that the API server is unavailable. Namespace returns when ctx ends.
	Namespace(ctx context.Context, name string) (policy.Namespace, error)
	// Latest is like Namespace, but a live read. The server calls it before it refuses a pod because of its namespace, so
	// an implementation limits the rate of its reads.
	Latest(ctx context.Context, name string) (policy.Namespace, error)
}

// Config configures [New].
type Config struct {
	// Injector makes the patches. Required.
	Injector *inject.Injector
	// Rules decides as the broker does, with the keys of Injector and the broker's base ARN. Without a base ARN, the broker
	// alone decides on roles that need one. Required.
	Rules *policy.Rules
	// Namespaces has the namespaces of annotated pods. Required.
	Namespaces Namespaces
	// KeyPair has the serving certificate. Required.
	KeyPair *certs.KeyPair
	// Ready has further conditions of readiness, by name. Each returns nil, or an error that says what is missing. Each
	// probe calls them, so they must not block.
	Ready map[string]func() error
	// DrainDelay is how long [Server.Run] accepts connections after its context ends. In that time, the API servers' nodes
	// learn that this endpoint is gone. Default 5 s.
	DrainDelay time.Duration
	// Logger logs the decisions. Nil discards them.
	Logger *slog.Logger
	// Observe is called after each review, for metrics. It may be nil.
	Observe func(Observation)
}

// Observation describes a review for metrics.
type Observation struct {
	// Decision is one of [Decisions].
	Decision string
	// Reason is the reason of a refusal; else empty.
	Reason credential.Reason
	// Duration is the time from the arrival of the review to its response.
	Duration time.Duration
	// PatchBytes is the length of the patch; 0 without one.
	PatchBytes int
}

const defaultDrainDelay = 5 * time.Second

// Time limits of connections. The API server waits at most 30 seconds for any webhook, and 5 for this one (chart).
const (
	// reviewTimeout leaves one of the 5 seconds for the response to arrive. The response has a better message than the API
	// server's own "context deadline exceeded".
	reviewTimeout = 4 * time.Second
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 15 * time.Second
	// idleTimeout is above 90 seconds, after which the API server closes an idle connection. So the server never closes a
	// connection that a request is about to use. If there are too many connections, it closes idle ones earlier, from the
	// address that has the most.
	idleTimeout = 2 * time.Minute
	// shutdownTimeout is how long a shutdown waits for reviews in flight. It is longer than any review.
	shutdownTimeout = writeTimeout + time.Second
	// maxHeader limits the headers of a request; net/http adds 4 kB. An API server sends some hundred bytes, and a
	// token if it authenticates to webhooks. Each small header costs 20 times its bytes in memory.
	maxHeader = 1 << 10
)

// Limits of all connections. Clients do not authenticate to the webhook.
const (
	// maxConnections is the maximum number of open connections. An API server has one for each review in flight, by default
	// at most 200 (--max-mutating-requests-inflight), and up to 25 idle ones.
	maxConnections = 340
	// maxWaiting is the maximum number of further connections that wait for a free place. A review takes a millisecond.
	maxWaiting = 1024
	// maxHandshake limits the bytes of a handshake and the first headers. Go's handshake has 1.7 kB.
	maxHandshake = 16<<10 + maxHeader + 4<<10
	// socketBuffer limits the kernel's buffers of a connection, in each direction; the kernel takes twice as much. A review
	// of usual size fits.
	socketBuffer = 32 << 10
	// HeldPerConnection is the maximum memory of a connection, in bytes, without the memory that a review costs. An
	// idle connection has 27 kB, and one with the maximum of headers 155 kB; integration/siege/connections measures
	// them.
	HeldPerConnection = 168 << 10
	// MaxHeldUnauthenticated is the maximum memory of all connections, in bytes. It is less than a quarter of the memory
	// that the chart gives a webhook; integration/siege/connections compares them.
	MaxHeldUnauthenticated = (maxConnections + maxConnections/8) * HeldPerConnection
)

// Server is the admission webhook, as an http.Handler of
//
//	POST /mutate   admission.k8s.io/v1 AdmissionReview in and out
//	GET  /healthz  200 while the process runs
//	GET  /readyz   200 if the server is ready for reviews; else 503 and what is missing
//
// Make it with [New]. Its methods may be called concurrently.
type Server struct {
	cfg      Config
	log      *slog.Logger
	router   *mux.Router
	bodies   *bodies
	stopping atomic.Bool

	connections *connlimit.Limiter
}

// New validates cfg. It starts nothing.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Injector == nil:
		return nil, errors.New("making a webhook: an injector is required")
	case cfg.Rules == nil:
		return nil, errors.New("making a webhook: rules are required")
	case cfg.Injector.Keys() != cfg.Rules.Keys():
		return nil, fmt.Errorf("making a webhook: injector and rules have different annotation prefixes, %q and %q",
			cfg.Injector.Keys().Prefix(), cfg.Rules.Keys().Prefix())
	case cfg.Namespaces == nil:
		return nil, errors.New("making a webhook: a source of namespaces is required")
	case cfg.KeyPair == nil:
		return nil, errors.New("making a webhook: a serving certificate is required")
	case cfg.DrainDelay < 0:
		return nil, fmt.Errorf("making a webhook: drain delay %s is negative", cfg.DrainDelay)
	}
	if cfg.DrainDelay == 0 {
		cfg.DrainDelay = defaultDrainDelay
	}
	connections, err := connlimit.New(connlimit.Config{
		Max: maxConnections, MaxWaiting: maxWaiting, RequestTime: readTimeout,
		// More handshakes at once would not finish earlier, and would delay reviews in flight.
		Handshakes:     runtime.GOMAXPROCS(0),
		HandshakeBytes: maxHandshake, SocketBuffer: socketBuffer,
	})
	if err != nil {
		return nil, fmt.Errorf("making a webhook: %w", err)
	}
	s := &Server{cfg: cfg, log: cfg.Logger, router: mux.NewRouter().SkipClean(true), bodies: newBodies(), connections: connections}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.router.HandleFunc("/mutate", s.mutate).Methods(http.MethodPost)
	s.router.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { writeText(w, http.StatusOK, "ok") }).Methods(http.MethodGet)
	s.router.HandleFunc("/readyz", s.readyz).Methods(http.MethodGet)
	return s, nil
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.stopping.Load() {
		// The API server calls webhooks with HTTP/1.1. If the server closes a connection while a review arrives, the
		// admission fails: the API server does not retry. So the response requests that the API server close the
		// connection. http.Server.SetKeepAlivesEnabled would close idle connections at once, even those just taken for
		// a review.
		w.Header().Set("Connection", "close")
	}
	s.router.ServeHTTP(w, r)
}

// Run serves TLS on listener, which it closes, until ctx ends. It then reports not ready, accepts connections for the
// drain delay, requests that clients close theirs, finishes the reviews in flight and returns nil. It returns an error
// if it cannot serve, or if it interrupted reviews.
func (s *Server) Run(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler:           s,
		TLSConfig:         certs.ServerConfig(s.cfg.KeyPair),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		// Most of these are failed handshakes of port scanners.
		ErrorLog:  slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		Protocols: new(http.Protocols),
	}
	// API servers use HTTP/2 only for webhooks on their own host (k8s.io/apiserver/pkg/util/webhook/client.go).
	server.Protocols.SetHTTP1(true)
	connlimit.HTTP(server)
	listener = s.connections.Listen(listener)
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(listener, "", "") }()
	select {
	case err := <-served:
		return fmt.Errorf("serving admission reviews: %w", err)
	case <-ctx.Done():
	}

	s.stopping.Store(true)
	s.log.InfoContext(ctx, "Started to shut down", "drain_delay", s.cfg.DrainDelay)
	drained := time.NewTimer(s.cfg.DrainDelay)
	defer drained.Stop()
	select {
	case err := <-served:
		return fmt.Errorf("serving admission reviews: %w", err)
	case <-drained.C:
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		return fmt.Errorf("waiting for admission reviews in flight: %w", err)
	}
	return nil
}

// Connections returns the state of the webhook's connections.
func (s *Server) Connections() connlimit.Stats { return s.connections.Stats() }

// Ready reports whether the webhook is ready, as in /readyz.
func (s *Server) Ready() bool { return len(s.missing()) == 0 }

// readyz returns 200, or 503 with one line for each missing condition.
func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	if missing := s.missing(); len(missing) > 0 {
		writeText(w, http.StatusServiceUnavailable, strings.Join(missing, "\n"))
		return
	}
	writeText(w, http.StatusOK, "ok")
}

// missing returns a line for each condition of readiness that is not met.
func (s *Server) missing() (missing []string) {
	if s.stopping.Load() {
		missing = append(missing, "server: shutting down")
	}
	// Clients check the validity without leeway.
	switch pair, err := s.cfg.KeyPair.GetCertificate(nil); {
	case err != nil:
		missing = append(missing, fmt.Sprintf("certificate: %v", err))
	case time.Now().After(pair.Leaf.NotAfter):
		missing = append(missing, "certificate: expired at "+pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	case time.Now().Before(pair.Leaf.NotBefore):
		missing = append(missing, "certificate: not valid before "+pair.Leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	for _, name := range slices.Sorted(maps.Keys(s.cfg.Ready)) {
		if err := s.cfg.Ready[name](); err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", name, err))
		}
	}
	return missing
}

func writeText(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	// An error means that the client is gone.
	_, _ = fmt.Fprintln(w, text)
}
