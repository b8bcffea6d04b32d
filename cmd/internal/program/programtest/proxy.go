package programtest

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
)

// Proxy is an HTTP proxy on a free port of 127.0.0.1. It tunnels CONNECT requests and refuses others.
type Proxy struct {
	// Addr is HOST:PORT.
	Addr string

	mu     sync.Mutex
	hosts  []string // guarded by mu
	secret []string // guarded by mu
	refuse int      // guarded by mu
}

// StartProxy starts a proxy until the test ends. reach maps each HOST:PORT that it can reach to the real address.
func StartProxy(t *testing.T, reach map[string]string) *Proxy {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{Addr: listener.Addr().String()}
	var tunnels sync.WaitGroup
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { //nolint:gosec // Only the test calls it.
		p.mu.Lock()
		p.hosts = append(p.hosts, r.Host)
		p.secret = append(p.secret, r.Header.Values("Authorization")...)
		refuse := p.refuse
		p.mu.Unlock()
		address, known := reach[r.Host]
		switch {
		case refuse != 0:
			w.WriteHeader(refuse)
			_, _ = io.WriteString(w, "<html>Ask your administrator</html>")
			return
		case !known || r.Method != http.MethodConnect:
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		there, err := new(net.Dialer).DialContext(r.Context(), "tcp", address)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		here, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			_ = there.Close()
			return
		}
		_, _ = io.WriteString(here, "HTTP/1.1 200 Connection established\r\n\r\n")
		tunnels.Go(func() { tunnel(here, buffered.Reader, there) })
	})}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Serve(listener) }()
	t.Cleanup(func() {
		_ = server.Close()
		<-ended
		tunnels.Wait()
	})
	return p
}

// tunnel copies in both directions until one side closes.
func tunnel(here net.Conn, buffered *bufio.Reader, there net.Conn) {
	var both sync.WaitGroup
	both.Go(func() { _, _ = io.Copy(there, buffered); _ = there.Close() })
	both.Go(func() { _, _ = io.Copy(here, there); _ = here.Close() })
	both.Wait()
}

// Refuse makes the proxy respond to all requests with that status; 0 stops it.
func (p *Proxy) Refuse(status int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = status
}

// Requested returns the requested hosts, and the Authorization headers that the proxy has read.
func (p *Proxy) Requested() (hosts, authorizations []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.hosts), slices.Clone(p.secret)
}
