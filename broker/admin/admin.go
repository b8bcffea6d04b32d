// Package admin serves health, readiness and metrics of a broker, and debug pages on a listener of its own. The webhook
// uses it for its health, readiness and metrics too.
//
// It guarantees: no page shows credentials; its metrics have few series, whatever pods do. It decides nothing. The debug
// pages renew or drop the sessions of a role for every client that reaches their listener, so that should be on loopback.
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
	// Name of the condition in the response of /readyz.
	Name string
	// Err returns nil if the condition holds, otherwise the reason why it does not.
	Err func() error
}

// Ready returns nil if every check passes, otherwise an error with a line for each that fails.
func Ready(checks []Check) error {
	var errs []error
	for _, check := range checks {
		if err := check.Err(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", check.Name, err))
		}
	}
	return errors.Join(errs...)
}

// Handler serves /healthz (200 while the process runs), /readyz (200 if every check passes, otherwise 503 and the reasons)
// and /metrics, unless metrics is nil.
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
	_, _ = w.Write([]byte(text + "\n")) //nolint:gosec // G705: with nosniff, no browser renders plain text as a page.
}

// Limits of a request. Probes and scrapes are small, and their clients are in the same cluster.
const (
	readTimeout = 5 * time.Second
	// writeTimeout is longer than a scrape, and enough for a debug page over a slow port-forward.
	writeTimeout = 30 * time.Second
	// maxHeaders is several times what probes and scrapers send. net/http adds 4 kB.
	maxHeaders = 1 << 10
	drainTime  = 2 * time.Second
	// maxConnections is how many connections may be open, and maxWaiting how many more may wait for a place. Kubelets,
	// Prometheus and a person need a handful. Each takes at most 140 kB, so all of them take 5 MB.
	maxConnections = 32
	maxWaiting     = 128
	// socketBuffer limits each of a connection's kernel buffers. A scrape is sent in parts.
	socketBuffer = 32 << 10
)

// Serve serves handler on listener until ctx ends. The listener is on the pod's IP, so every pod may connect. If there are
// too many connections, the address with the most loses one.
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
