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

// Limits of the HTTP server. Its clients are SDKs in the same pod. They send about 500 bytes and read about 2 kB, without
// delay.
const (
	// readTimeout is for header and body. No request to this server has a body.
	readTimeout = 2 * time.Second
	// writeTimeout starts with the request's header, so it must be longer than readyPoll, the longest wait of a handler.
	writeTimeout = 10 * time.Second
	// idleTimeout is longer than 90 seconds, after which Go's clients close an idle connection. So no request arrives while
	// the server closes the connection. Not all clients would repeat such a request for a metadata token, because PUT
	// must not be repeated. If there are many connections, they are closed earlier: see keepAliveLimit.
	idleTimeout = 2 * time.Minute
	// maxHeaderBytes leaves room for tracing headers. net/http adds 4 kB.
	maxHeaderBytes = 8 << 10
	// maxConnections limits memory. A connection costs about 20 kB and twice socketBuffer, so all fit into the container's
	// 16 MiB beside the program. More connections wait in the kernel's queue, for about a millisecond each if a session is
	// cached.
	maxConnections = 128
	// keepAliveLimit is the number of open connections above which each response closes its connection. So clients that
	// keep connections open do not make others wait.
	keepAliveLimit = maxConnections / 2
	// maxLines is how many lines a request may have, several times as many as SDKs and tracers send. A header of 12 kB
	// can have so many lines that they take 280 kB when parsed. Without this limit, TestMemory of cmd/sidecar fails. If
	// every fourth request has such a header, the program takes 13 MB of the container's 16 MiB, and the kernel needs
	// another 2 MB.
	maxLines = 64
	// socketBuffer is in bytes, and far larger than a request or a response. By default, the kernel buffers 4 MB for a
	// client that does not read, and counts them as the container's memory.
	socketBuffer = 16 << 10
	// shutdownTimeout is how long running responses may take after the context has ended.
	shutdownTimeout = 2 * time.Second
)

// Run serves on listener and renews the session until ctx ends, and then returns nil. It returns an error if listener is
// not on a loopback address, or fails. It closes listener.
func (s *Sidecar) Run(ctx context.Context, listener net.Listener) error {
	defer listener.Close()
	if addr, ok := listener.Addr().(*net.TCPAddr); !ok || !addr.IP.IsLoopback() {
		return fmt.Errorf("serving on %s: not a loopback address; every host that reaches the pod could get its credentials", listener.Addr())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	limited := limit(listener, maxConnections)
	server := &http.Server{
		Handler:        limited.limitKeepAlive(s.Handler()),
		ReadTimeout:    readTimeout,
		WriteTimeout:   writeTimeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: maxHeaderBytes,
		// net/http would respond to OPTIONS * without checking Host, and wait for a body.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		// Requests that wait for a session return when ctx ends.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	s.log.Info("Listening", "address", listener.Addr().String())
	var wg sync.WaitGroup
	wg.Go(func() { s.renew(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if server.Shutdown(grace) != nil {
			_ = server.Close() // closes the remaining connections
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
