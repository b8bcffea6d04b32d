// Package admin serves what operators, Prometheus and kubelet ask of a broker: whether it lives,
// whether it is ready, its metrics, and, on a listener of its own, the state of each grant.
//
// It shows no credential, and decides nothing. Its metrics have few series, whatever pods do. The
// debug pages take orders, to renew or drop the sessions of a role, from whoever can reach their
// listener; so that is to be on loopback.
package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/gorilla/mux"

	"github.com/credence-iam/credence/broker/connlimit"
)

// Check is one condition of readiness.
type Check struct {
	// Name stands in the answer of /readyz.
	Name string
	// Err is nil when the condition holds, and otherwise says why not.
	Err func() error
}

// Ready returns nil when every check passes, and otherwise an error with a line for each that does
// not.
func Ready(checks []Check) error {
	var errs []error
	for _, check := range checks {
		if err := check.Err(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", check.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Handler serves /healthz, which answers 200 while the process runs, /readyz, which answers 200 when
// every check passes and otherwise 503 and why, and /metrics, unless metrics is nil.
func Handler(metrics http.Handler, checks ...Check) http.Handler {
	router := mux.NewRouter()
	router.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeText(w, http.StatusOK, "ok")
	}).Methods(http.MethodGet)
	router.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := Ready(checks); err != nil {
			writeText(w, http.StatusServiceUnavailable, err.Error())
			return
		}
		writeText(w, http.StatusOK, "ready")
	}).Methods(http.MethodGet)
	if metrics != nil {
		router.Handle("/metrics", metrics).Methods(http.MethodGet)
	}
	return router
}

func writeText(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(text + "\n")) //nolint:gosec // G705: no browser takes plain text that must not be sniffed for a page.
}

// Bounds of a request: probes are small and their callers near.
const (
	readTimeout = 5 * time.Second
	// writeTimeout is above what a scrape may take, and what a debug page needs over a slow port-forward.
	writeTimeout = 30 * time.Second
	// maxHeaders is what probes and scrapers send, with much to spare. net/http takes 4 kB more.
	maxHeaders = 1 << 10
	drainTime  = 2 * time.Second
	// maxConnections is how many connections may be open, and maxWaiting how many more may wait for room. Kubelets,
	// Prometheus and a person need a handful. Each holds 140 kB at most, so that all take 5 MB.
	maxConnections = 32
	maxWaiting     = 128
	// socketBuffer is what the kernel may keep of a connection, either way. A scrape is sent in parts.
	socketBuffer = 32 << 10
)

// Serve serves handler on listener until ctx ends. The listener is on the pod's IP, so that anybody may connect: if there
// are too many connections, the address that holds the most loses one.
func Serve(ctx context.Context, listener net.Listener, handler http.Handler) error {
	connections, err := connlimit.New(connlimit.Config{
		Max: maxConnections, MaxWaiting: maxWaiting, RequestTime: readTimeout, IdleTime: readTimeout, SocketBuffer: socketBuffer,
	})
	if err != nil {
		return fmt.Errorf("serving the admin endpoint: %w", err)
	}
	server := &http.Server{
		Handler: handler, ReadTimeout: readTimeout, ReadHeaderTimeout: readTimeout, WriteTimeout: writeTimeout, MaxHeaderBytes: maxHeaders,
	}
	connlimit.HTTP(server)
	stop := context.AfterFunc(ctx, func() {
		drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		_ = server.Shutdown(drain)
	})
	defer stop()
	if err := server.Serve(connections.Listen(listener)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the admin endpoint: %w", err)
	}
	return nil
}
