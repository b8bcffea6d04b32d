package apitest

import (
	"context"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

// Network connects clients to one server over connections in memory, so that both can run in one synctest bubble.
// Make it with [Serve]. It is safe for concurrent use.
type Network struct {
	accept chan net.Conn
	done   chan struct{} // closed when the server stops

	mu   sync.Mutex
	down bool              // guarded by mu
	open map[net.Conn]bool // the clients' ends; guarded by mu
}

// Serve serves handler until the test ends.
func Serve(t testing.TB, handler http.Handler) *Network {
	t.Helper()
	n := &Network{accept: make(chan net.Conn), done: make(chan struct{}), open: make(map[net.Conn]bool)}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(listener{n}) }()
	t.Cleanup(func() {
		close(n.done)
		_ = server.Close()
		n.Cut()
		<-served
	})
	return n
}

// Config returns a configuration of a client, which shares no connection with the clients of another one.
func (n *Network) Config() *rest.Config {
	asJSON := rest.ContentConfig{ContentType: "application/json"}
	return &rest.Config{Host: "http://api-server", Dial: n.dial, ContentConfig: asJSON, QPS: -1}
}

// SetDown makes the server unreachable, or reachable again: while it is down, it refuses new connections. It loses the
// open ones.
func (n *Network) SetDown(down bool) {
	n.mu.Lock()
	n.down = down
	n.mu.Unlock()
	n.Cut()
}

// Cut closes all connections. Clients may connect again.
func (n *Network) Cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.open {
		_ = c.Close()
	}
	clear(n.open)
}

func (n *Network) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	n.mu.Lock()
	down := n.down
	n.mu.Unlock()
	if down {
		return nil, &net.OpError{Op: "dial", Net: "pipe", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	client, server := net.Pipe()
	select {
	case n.accept <- server:
		n.mu.Lock()
		defer n.mu.Unlock()
		n.open[client] = true
		return client, nil
	case <-n.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// listener is the server's end of a network.
type listener struct{ *Network }

func (l listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l listener) Close() error   { return nil }
func (l listener) Addr() net.Addr { return &net.UnixAddr{Name: "api-server"} }
