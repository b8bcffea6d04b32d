// Package webhook answers the API server's admission reviews: it has pods injected that ask for AWS
// credentials, and refuses those that policy would refuse later, while somebody is looking.
//
// It promises that
//   - an annotated pod leaves admission injected or refused; when in doubt (a panic, an API server
//     that cannot be asked) it is refused, because a pod without its sidecar would silently get the
//     role of its node;
//   - all that is not the creation of an annotated pod is let through untouched;
//   - each review it can read is answered by a review with the same uid. All else is answered by a 4xx, by a 500 after a panic, or by a 503
//     if there are more reviews at once than there is memory to read them;
//   - no admission is lost while it stops: see [Server.Run];
//   - its log has one line per decision, and in none of them an environment value or a pod.
//
// It holds no authority but reading namespaces: what it lets through, the broker judges again. It
// does not register itself with the API server.
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

// Namespaces tells what is known of namespaces.
type Namespaces interface {
	// Namespace returns the labels and annotations of a namespace. An error that is
	// credential.ErrNotFound says that there is no such namespace; any other, that it cannot be known
	// now. Implementations return when ctx ends.
	Namespace(ctx context.Context, name string) (policy.Namespace, error)
	// Latest is Namespace, but as the API server has it at this moment. It is called before a pod is refused
	// for what its namespace permits, so an implementation bounds how often it asks.
	Latest(ctx context.Context, name string) (policy.Namespace, error)
}

// Config configures [New].
type Config struct {
	// Injector makes the patches. Required.
	Injector *inject.Injector
	// Rules judges as the broker will: with the same keys as Injector, and the broker's base ARN.
	// Without a base ARN, what needs one is left to the broker. Required.
	Rules *policy.Rules
	// Namespaces is asked for each annotated pod. Required.
	Namespaces Namespaces
	// KeyPair is what the server proves itself with. Required.
	KeyPair *certs.KeyPair
	// Ready has the conditions of readiness by name, besides the server's own; each returns nil or
	// what is missing. They are called at each probe, and must not block.
	Ready map[string]func() error
	// DrainDelay is how long [Server.Run] goes on accepting connections after it was told to stop.
	// It is the time for the API servers' nodes to learn that this endpoint is gone. Default 5 s.
	DrainDelay time.Duration
	// Logger gets the decisions. Nil discards them.
	Logger *slog.Logger
	// Observe is told of each review that was answered. Nil: nobody is.
	Observe func(Observation)
}

// Observation is what metrics are made of.
type Observation struct {
	// Decision is one of [Decisions].
	Decision string
	// Reason is why it was refused; empty when it was not.
	Reason credential.Reason
	// Duration is the time from the arrival of the review to its response.
	Duration time.Duration
	// PatchBytes is the length of the patch; 0 without one.
	PatchBytes int
}

const defaultDrainDelay = 5 * time.Second

// Time limits of connections. The API server waits at most 30 seconds for a webhook, and for this one
// 5 by our own configuration.
const (
	// reviewTimeout leaves a second of those 5 for our answer to arrive: it says more than the API
	// server's own "context deadline exceeded".
	reviewTimeout = 4 * time.Second
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 15 * time.Second
	// idleTimeout is above the 90 seconds after which the API server's client closes an idle
	// connection, so that no request meets one that we are closing. Idle connections are closed earlier only if there are
	// too many, and those of the address that has the most.
	idleTimeout = 2 * time.Minute
	// shutdownTimeout is how long reviews in flight may take: longer than any can.
	shutdownTimeout = writeTimeout + time.Second
	// maxHeader and the 4 kB that net/http takes beyond it are far above what the API server sends: some hundred bytes,
	// and a token where it authenticates itself to webhooks. Each small header costs 20 times its bytes in memory.
	maxHeader = 1 << 10
)

// Bounds of all connections. Nobody authenticates to the webhook.
const (
	// maxConnections is how many connections may be open. An API server has one for each review under way, of which it
	// has 200 at once by default (--max-mutating-requests-inflight), and keeps up to 25 that are idle.
	maxConnections = 340
	// maxWaiting is how many more may wait for room. A review takes a millisecond.
	maxWaiting = 1024
	// maxHandshake bounds the bytes of a handshake and the headers behind it. Go's handshake is 1.7 kB.
	maxHandshake = 16<<10 + maxHeader + 4<<10
	// socketBuffer is what the kernel may keep of a connection, either way; it takes twice as much. A review of usual
	// size fits.
	socketBuffer = 32 << 10
	// HeldPerConnection is how many bytes of memory a connection holds at most, besides the body of a review and all that
	// is made of it. An idle one holds 27 kB, and one whose headers are as many as they can be, 155 kB; integration/siege/connections
	// measures them.
	HeldPerConnection = 168 << 10
	// MaxHeldUnauthenticated is how many bytes connections can make a webhook hold. It is less than a quarter of the
	// memory that the chart gives a webhook, which integration/siege/connections compares.
	MaxHeldUnauthenticated = (maxConnections + maxConnections/8) * HeldPerConnection
)

// Server is the admission webhook, as an http.Handler of
//
//	POST /mutate   admission.k8s.io/v1 AdmissionReview in and out
//	GET  /healthz  whether the process answers
//	GET  /readyz   whether to send it reviews; if not, why not
//
// Make it with [New]. It may be used concurrently.
type Server struct {
	cfg      Config
	log      *slog.Logger
	router   *mux.Router
	bodies   *bodies
	stopping atomic.Bool

	connections *connlimit.Limiter
}

// New checks cfg. It starts nothing.
func New(cfg Config) (*Server, error) {
	switch {
	case cfg.Injector == nil:
		return nil, errors.New("webhook without an injector")
	case cfg.Rules == nil:
		return nil, errors.New("webhook without rules")
	case cfg.Injector.Keys() != cfg.Rules.Keys():
		return nil, fmt.Errorf("injector and rules have different annotation prefixes, %q and %q",
			cfg.Injector.Keys().Prefix(), cfg.Rules.Keys().Prefix())
	case cfg.Namespaces == nil:
		return nil, errors.New("webhook without a source of namespaces")
	case cfg.KeyPair == nil:
		return nil, errors.New("webhook without a key pair: the API server speaks TLS only")
	case cfg.DrainDelay < 0:
		return nil, fmt.Errorf("drain delay %s is negative", cfg.DrainDelay)
	}
	if cfg.DrainDelay == 0 {
		cfg.DrainDelay = defaultDrainDelay
	}
	connections, err := connlimit.New(connlimit.Config{
		Max: maxConnections, MaxWaiting: maxWaiting, RequestTime: readTimeout,
		// More at once would not end earlier, and delay reviews that are under way.
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
	s.router.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "ok") }).Methods(http.MethodGet)
	s.router.HandleFunc("/readyz", s.readyz).Methods(http.MethodGet)
	return s, nil
}

// ServeHTTP implements [http.Handler].
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.stopping.Load() {
		// The API server speaks HTTP/1.1 to webhooks, in which a connection that we close while it sends a review
		// is an admission that fails: it does not try again. So it is asked to close those that it uses. Of
		// http.Server, SetKeepAlivesEnabled would close the idle ones at once, under whoever has just taken one.
		w.Header().Set("Connection", "close")
	}
	s.router.ServeHTTP(w, r)
}

// Run serves TLS on listener, which it closes, until ctx ends. It then reports itself as not ready,
// accepts new connections for the drain delay, has clients give up those that they use, lets the reviews in
// flight end, and returns nil. An error says why it could not go on serving before ctx ended, or that reviews
// were cut off.
func (s *Server) Run(ctx context.Context, listener net.Listener) error {
	server := &http.Server{
		Handler:           s,
		TLSConfig:         certs.ServerConfig(s.cfg.KeyPair),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		// Failed handshakes of port scanners, mostly.
		ErrorLog:  slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		Protocols: new(http.Protocols),
	}
	// API servers ask for nothing else, but of webhooks on their own host (k8s.io/apiserver/pkg/util/webhook/client.go).
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
	s.log.InfoContext(ctx, "Stopping to serve admission reviews", "drain_delay", s.cfg.DrainDelay)
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

// readyz answers 200, or 503 and what is missing, a line for each.
func (s *Server) readyz(w http.ResponseWriter, _ *http.Request) {
	var missing []string
	if s.stopping.Load() {
		missing = append(missing, "server: stopping")
	}
	// By the rule of clients: there is no leeway.
	switch pair, err := s.cfg.KeyPair.GetCertificate(nil); {
	case err != nil:
		missing = append(missing, fmt.Sprintf("key pair: %v", err))
	case time.Now().After(pair.Leaf.NotAfter):
		missing = append(missing, "key pair: expired at "+pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	case time.Now().Before(pair.Leaf.NotBefore):
		missing = append(missing, "key pair: not valid before "+pair.Leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	for _, name := range slices.Sorted(maps.Keys(s.cfg.Ready)) {
		if err := s.cfg.Ready[name](); err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", name, err))
		}
	}
	if len(missing) > 0 {
		answer(w, http.StatusServiceUnavailable, strings.Join(missing, "\n"))
		return
	}
	answer(w, http.StatusOK, "ok")
}

func answer(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	// An error here means that the client has gone.
	_, _ = fmt.Fprintln(w, text)
}
