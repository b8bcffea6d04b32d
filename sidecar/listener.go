package sidecar

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
)

// limitedListener limits how many connections are open. More connections wait in the kernel's queue and are not
// refused. Package connlimit would accept them all, which takes 20 MB for 10,000 clients. Its fairness between
// addresses does not help, because all clients on loopback have the same address.
type limitedListener struct {
	net.Listener
	slots     chan struct{} // one element per open connection
	closed    chan struct{}
	closeOnce sync.Once
}

func limit(listener net.Listener, maximum int) *limitedListener {
	return &limitedListener{Listener: listener, slots: make(chan struct{}, maximum), closed: make(chan struct{})}
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
			return nil, temporaryError{err}
		}
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		// If this fails, the connection is closed, or it keeps the kernel's default.
		_, _ = tcp.SetReadBuffer(socketBuffer), tcp.SetWriteBuffer(socketBuffer)
	}
	return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

// temporaryError makes net/http retry after an error of accept(2). By itself it retries for a few errors only, and stops
// when memory is short for a moment.
type temporaryError struct{ error }

// Timeout implements [net.Error].
func (temporaryError) Timeout() bool { return false }

// Temporary implements [net.Error].
func (temporaryError) Temporary() bool { return true }

// Close implements [net.Listener]. An Accept that waits for a connection to close returns too.
func (l *limitedListener) Close() error {
	l.closeOnce.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitKeepAlive makes each response close its connection while more than keepAliveLimit are open.
func (l *limitedListener) limitKeepAlive(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(l.slots) > keepAliveLimit {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}

type limitedConn struct {
	net.Conn
	release func()
	lines   atomic.Int32 // received since the last response
	over    bool         // there are too many lines; only Read uses it, and only one Read runs at a time
}

var errTooManyLines = fmt.Errorf("a request has more than %d lines", maxLines)

// Read implements [net.Conn]. It ends in the middle of a header with too many lines. Then net/http responds with status
// 400.
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
