package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
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

// limitedListener accepts no more than so many connections at a time. Further ones wait in the kernel's
// queue, as they do for a busy server, and are not refused.
type limitedListener struct {
	net.Listener
	slots     chan struct{} // one element per open connection
	closed    chan struct{}
	closeOnce sync.Once
}

func limit(listener net.Listener, most int) *limitedListener {
	return &limitedListener{Listener: listener, slots: make(chan struct{}, most), closed: make(chan struct{})}
}

// Accept implements [net.Listener].
func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		if _, ofSystem := errors.AsType[syscall.Errno](err); ofSystem && !errors.Is(err, net.ErrClosed) {
			return nil, passing{err}
		}
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		// Where they fail the connection has gone, or has what the system gives.
		_, _ = tcp.SetReadBuffer(socketBuffer), tcp.SetWriteBuffer(socketBuffer)
	}
	return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

// passing is an error of accept(2) that net/http tries again after. By itself it does so for a few only, and gives up
// where memory is short for a moment.
type passing struct{ error }

// Timeout implements [net.Error].
func (passing) Timeout() bool { return false }

// Temporary implements [net.Error].
func (passing) Temporary() bool { return true }

// Close implements [net.Listener]. It also ends an Accept that waits for a connection to close.
func (l *limitedListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// leaveRoom makes answers the last ones on their connections while these are many.
func (l *limitedListener) leaveRoom(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(l.slots) > crowd {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}

type limitedConn struct {
	net.Conn
	release func()
	lines   atomic.Int32 // that the client has sent since it was last answered
	over    bool         // they are too many; only Read looks, and there is one at a time
}

var errTooManyLines = fmt.Errorf("a request has more than %d lines", maxLines)

// Read implements [net.Conn]. It ends in the middle of a header that has too many lines, and net/http answers that the
// request is a bad one.
func (c *limitedConn) Read(p []byte) (int, error) {
	if c.over {
		return 0, errTooManyLines
	}
	n, err := c.Conn.Read(p)
	for rest := p[:n]; len(rest) > 0; {
		if c.lines.Load() >= maxLines {
			c.over = true
			return n - len(rest), nil
		}
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			break
		}
		c.lines.Add(1)
		rest = rest[i+1:]
	}
	return n, err
}

// Write implements [net.Conn].
func (c *limitedConn) Write(p []byte) (int, error) {
	c.lines.Store(0)
	return c.Conn.Write(p)
}

// Close implements [net.Conn].
func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}
