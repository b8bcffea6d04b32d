package ststest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// serving is a Server with its listener.
type serving struct {
	url    string
	http   *http.Server
	client *http.Client
	dial   func(ctx context.Context, network, address string) (net.Conn, error) // nil: the network's
	done   chan struct{}                                                        // closed when Serve has returned
}

// Start makes a Server and serves it on a free port of 127.0.0.1 until ctx ends or Close is called. With t.Context(), a test
// need not close it.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening for STS: %w", err)
	}
	// This transport uses no proxy, and its connections end with the server.
	return startOn(ctx, l, &http.Transport{}, cfg)
}

// StartOn is Start with a listener of the caller, which may belong to another network. dial connects Client to its address.
func StartOn(ctx context.Context, l net.Listener, dial func(ctx context.Context, network, address string) (net.Conn, error), cfg Config) (*Server, error) {
	return startOn(ctx, l, &http.Transport{DialContext: dial}, cfg)
}

func startOn(ctx context.Context, l net.Listener, transport *http.Transport, cfg Config) (*Server, error) {
	s, err := New(cfg)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	s.serve(ctx, l, "http://"+l.Addr().String(), transport)
	return s, nil
}

// StartInMemory is Start without a network: requests go only through Client, over pipes in memory. In a testing/synctest bubble,
// the server has the bubble's time. Its URL is only a name.
func StartInMemory(ctx context.Context, cfg Config) (*Server, error) {
	s, err := New(cfg)
	if err != nil {
		return nil, err
	}
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		if s.refusing() {
			return nil, errRefused
		}
		return l.dial(ctx, network, address)
	}
	s.serve(ctx, l, "http://sts.invalid", &http.Transport{DialContext: dial})
	return s, nil
}

func (s *Server) serve(ctx context.Context, l net.Listener, url string, transport *http.Transport) {
	s.serving = &serving{
		url: url,
		// Ten seconds are enough for headers, because clients are local.
		http:   &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second},
		client: &http.Client{Transport: transport},
		dial:   transport.DialContext,
		done:   make(chan struct{}),
	}
	go func() {
		defer close(s.serving.done)
		_ = s.serving.http.Serve(gate{l, s}) // Close ends it with http.ErrServerClosed.
	}()
	context.AfterFunc(ctx, s.Close)
}

// URL returns the base URL, for an SDK's BaseEndpoint or the CLI's --endpoint-url. It is "" for a Server that Start did not make.
func (s *Server) URL() string {
	if s.serving == nil {
		return ""
	}
	return s.serving.url
}

// Client returns an HTTP client for the server, for an SDK's HTTPClient. It is necessary after StartInMemory, and a convenience
// after Start. For other Servers, it is http.DefaultClient.
func (s *Server) Client() *http.Client {
	if s.serving == nil {
		return http.DefaultClient
	}
	return s.serving.client
}

// Dial connects to the host and port of URL, for a transport of the caller.
func (s *Server) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if dial := s.serving.dial; dial != nil {
		return dial(ctx, network, address)
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

// Close stops the Server of Start: it closes all connections, which ends hanging calls. It may be called more than once, and does
// nothing for a Server of New.
func (s *Server) Close() {
	if s.serving == nil {
		return
	}
	_ = s.serving.http.Close() // Its only error is that the listener was closed before.
	<-s.serving.done
	s.serving.client.CloseIdleConnections()
}

// pipeListener accepts the far ends of the pipes of dial.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "sts.invalid:80" }
