package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Bounds of the HTTP server. Its clients are SDKs in the same pod: they send some 500 bytes and read
// some 2 kB, both at once.
const (
	// readTimeout is for header and body; no request served here has one.
	readTimeout = 2 * time.Second
	// writeTimeout counts from the request's header, so it must outlast the longest wait of a handler, readyPoll.
	writeTimeout = 10 * time.Second
	// idleTimeout is above the 90 seconds after which Go's clients close an idle connection, so that no request
	// meets one that is being closed here: not all clients ask for a metadata token again, as PUT may not be
	// repeated. Those that are idle leave room for others, see crowd.
	idleTimeout = 2 * time.Minute
	// maxHeaderBytes leaves room for tracing headers; net/http adds 4 kB of its own.
	maxHeaderBytes = 8 << 10
	// maxConnections bounds memory: a connection costs about 20 kB and twice socketBuffer, so these fit in the
	// container's 16 MiB beside the program. More wait in the kernel's queue, a millisecond each while credentials are
	// held.
	maxConnections = 128
	// crowd is the number of open connections above which an answer is the last one on its
	// connection, so that clients that keep theirs do not keep others waiting.
	crowd = maxConnections / 2
	// maxLines is how many lines a request may have, several times what SDKs and tracers send. Those that a header of
	// 12 kB has room for take 280 kB once they are parsed.
	maxLines = 64
	// socketBuffer is far above a request and an answer, in bytes. Left to itself, the kernel lets a client that does
	// not read have 4 MB, which count as the container's.
	socketBuffer = 16 << 10
	// shutdownTimeout is how long answers under way have once the context has ended.
	shutdownTimeout = 2 * time.Second
)

// Run serves on listener and keeps the credential fresh until ctx ends, and returns nil then. It
// returns an error when listener is not on a loopback address or fails. It closes listener.
func (s *Sidecar) Run(ctx context.Context, listener net.Listener) error {
	defer listener.Close()
	if addr, ok := listener.Addr().(*net.TCPAddr); !ok || !addr.IP.IsLoopback() {
		return fmt.Errorf("serving on %s: not a loopback address: everybody who reaches the pod could ask for its credentials", listener.Addr())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	limited := limit(listener, maxConnections)
	server := &http.Server{
		Handler:        limited.leaveRoom(s.Handler()),
		ReadTimeout:    readTimeout,
		WriteTimeout:   writeTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: maxHeaderBytes,
		// net/http's answer to OPTIONS * would come without a look at Host, and wait for a body.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		// Requests that wait for a credential leave when ctx ends.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	s.log.Info("listening", "address", listener.Addr().String())
	var wg sync.WaitGroup
	wg.Go(func() { s.renew(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if server.Shutdown(grace) != nil {
			_ = server.Close() // cuts off who did not leave in time
		}
	})
	err := server.Serve(limited)
	cancel()
	wg.Wait()
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving on %s: %w", listener.Addr(), err)
	}
	return nil
}
