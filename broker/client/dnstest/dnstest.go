// Package dnstest is a DNS server for tests. The test chooses its faults: dropped queries, slow and truncated responses,
// failures.
//
// It responds over UDP and TCP on loopback, or in memory, where time can be virtual. It knows A and AAAA records only: no
// zones, no caches, no EDNS.
package dnstest

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Query is one query to the server.
type Query struct {
	Name string // with its final dot
	Type string // A or AAAA
}

// Treatment is how the server treats a query. The zero value is a correct response without delay.
type Treatment struct {
	// Drop sends no response.
	Drop bool
	// After delays the response.
	After time.Duration
	// Truncated responds over UDP with no record and the TC bit, and correctly over TCP.
	Truncated bool
	// Fails responds with SERVFAIL.
	Fails bool
}

// Server is a DNS server. Make it with [New].
type Server struct {
	records map[string][]netip.Addr
	treat   func(n int, q Query) Treatment
	address string // where it listens; empty if it does not

	mu      sync.Mutex
	queries []Query // guarded by mu
}

// New returns a server with records, a map from full names with final dots to addresses. treat returns the treatment of
// the n-th query, from 1. If treat is nil, all responses are correct. To query the server, use [Server.LookupInMemory], or
// [Server.Lookup] after [Server.Listen].
func New(records map[string][]netip.Addr, treat func(n int, q Query) Treatment) *Server {
	if treat == nil {
		treat = func(int, Query) Treatment { return Treatment{} }
	}
	return &Server{records: records, treat: treat}
}

// Queries returns the received queries in order. If a client repeats a query over TCP, it counts twice.
func (s *Server) Queries() []Query {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.queries)
}

// Listen serves UDP and TCP at the loopback address HOST:PORT until the test ends. Port 0 is any free port.
func (s *Server) Listen(t testing.TB, address string) {
	t.Helper()
	var (
		packets  net.PacketConn
		listener net.Listener
		err      error
	)
	for range 10 { // A port that is free for UDP may be in use for TCP.
		if packets, err = new(net.ListenConfig).ListenPacket(t.Context(), "udp", address); err != nil {
			t.Fatal(err)
		}
		if listener, err = net.Listen("tcp", packets.LocalAddr().String()); err == nil {
			break
		}
		_ = packets.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	s.address = packets.LocalAddr().String()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var running sync.WaitGroup
	running.Go(func() { s.servePackets(ctx, &running, packets) })
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { s.serveStream(ctx, conn, false) })
		}
	})
	t.Cleanup(func() {
		cancel()
		_ = packets.Close()
		_ = listener.Close()
		running.Wait()
	})
}

// Lookup queries this server, which must listen, instead of the servers in resolv.conf. It works like
// [net.Resolver.LookupNetIP], but does not merge look-ups of the same name.
func (s *Server) Lookup(ctx context.Context, network, host string) ([]netip.Addr, error) {
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, s.address)
	}}
	return resolver.LookupNetIP(ctx, network, host)
}

// LookupInMemory is Lookup without a network, for a bubble of testing/synctest.
func (s *Server) LookupInMemory(ctx context.Context, network, host string) ([]netip.Addr, error) {
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		near, far := net.Pipe()
		go s.serveStream(context.WithoutCancel(ctx), far, network == "udp")
		return near, nil
	}}
	return resolver.LookupNetIP(ctx, network, host)
}

func (s *Server) servePackets(ctx context.Context, running *sync.WaitGroup, conn net.PacketConn) {
	for {
		buffer := make([]byte, 512) // RFC 1035, section 4.2.1
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		running.Go(func() {
			if response := s.respond(ctx, buffer[:n], true); response != nil {
				_, _ = conn.WriteTo(response, from)
			}
		})
	}
}

// serveStream serves messages with a length prefix (RFC 1035, section 4.2.2) until the client closes. It serves one query
// at a time. If packets is set, the stream stands for UDP, so responses can be truncated.
func (s *Server) serveStream(ctx context.Context, conn net.Conn, packets bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	queries := make(chan []byte)
	go func() {
		defer cancel() // The client has closed the connection.
		for {
			var length uint16
			if err := binary.Read(conn, binary.BigEndian, &length); err != nil {
				return
			}
			query := make([]byte, length)
			if _, err := io.ReadFull(conn, query); err != nil {
				return
			}
			select {
			case queries <- query:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case query := <-queries:
			if response := s.respond(ctx, query, packets); response != nil {
				framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(response))), response...) //nolint:gosec // G115: a few records
				if _, err := conn.Write(framed); err != nil {
					return
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

// respond returns the response to a query; nil if the query is dropped.
func (s *Server) respond(ctx context.Context, query []byte, packets bool) []byte {
	message, q, err := parse(query)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	s.queries = append(s.queries, q)
	treatment := s.treat(len(s.queries), q)
	s.mu.Unlock()
	if treatment.Drop {
		return nil
	}
	if treatment.After > 0 {
		timer := time.NewTimer(treatment.After)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
	addresses, exists := s.records[strings.ToLower(q.Name)]
	switch {
	case treatment.Fails:
		message.RCode = dnsmessage.RCodeServerFailure
	case treatment.Truncated && packets:
		message.Truncated = true
	case !exists:
		message.RCode = dnsmessage.RCodeNameError
	default:
		header := dnsmessage.ResourceHeader{Name: message.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 5}
		for _, a := range addresses {
			switch {
			case a.Is4() && q.Type == "A":
				message.Answers = append(message.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: a.As4()}})
			case a.Is6() && q.Type == "AAAA":
				message.Answers = append(message.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
			}
		}
	}
	response, err := message.Pack()
	if err != nil {
		return nil
	}
	return response
}

// parse returns a response without records to a query, and the query.
func parse(query []byte) (response dnsmessage.Message, q Query, err error) {
	var parser dnsmessage.Parser
	header, err := parser.Start(query)
	if err != nil {
		return response, q, err
	}
	question, err := parser.Question()
	if err != nil {
		return response, q, err
	}
	switch question.Type {
	case dnsmessage.TypeA:
		q.Type = "A"
	case dnsmessage.TypeAAAA:
		q.Type = "AAAA"
	default:
		return response, q, errors.New("neither A nor AAAA")
	}
	q.Name = question.Name.String()
	response.Header = dnsmessage.Header{
		ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true,
	}
	response.Questions = []dnsmessage.Question{question}
	return response, q, nil
}
