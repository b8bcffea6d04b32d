//go:build unix

package skew_test

import (
	"io"
	"net"
	"sync"
	"testing"
)

// front forwards connections to programs in turn, as a Service does to its endpoints. Connections remain when their
// program is no longer an endpoint.
type front struct {
	net.Listener

	mu       sync.Mutex
	to       []string // guarded by mu
	accepted int      // guarded by mu
}

func newFront(t *testing.T) *front {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &front{Listener: listener}
	var relays sync.WaitGroup
	t.Cleanup(func() {
		_ = f.Close()
		relays.Wait()
	})
	relays.Go(func() {
		for {
			conn, err := f.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			to := f.to[f.accepted%len(f.to)]
			f.accepted++
			f.mu.Unlock()
			relays.Go(func() { relay(conn, to) })
		}
	})
	return f
}

func (f *front) port() int { return f.Addr().(*net.TCPAddr).Port }

// set replaces the endpoints.
func (f *front) set(to ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.to = to
}

// used reports whether a connection has arrived.
func (f *front) used() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.accepted > 0
}

// relay copies both ways until both sides have ended, or one has failed.
func relay(client net.Conn, to string) {
	defer func() { _ = client.Close() }()
	server, err := net.Dial("tcp", to) //nolint:noctx // The dial ends at once: it is on loopback.
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	var up sync.WaitGroup
	up.Go(func() {
		_, _ = io.Copy(server, client)
		_ = server.(*net.TCPConn).CloseWrite()
	})
	_, _ = io.Copy(client, server)
	_ = client.(*net.TCPConn).CloseWrite()
	up.Wait()
}
