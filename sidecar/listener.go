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
