// Package dnstest is a DNS server for tests, whose faults the test chooses: queries that it drops, slow and truncated
// answers, refusals.
//
// It answers over UDP and TCP on loopback, or in memory, where time can be virtual. It knows A and AAAA records, and no
// other part of DNS: no zones, no caches, no EDNS.
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

// Query is one query that the server received.
type Query struct {
	Name string // with its final dot
	Type string // A or AAAA
}

// Treatment says what the server does with a query. The zero value is a correct answer at once.
type Treatment struct {
	// Drop sends no answer.
	Drop bool
	// After is how long the answer takes.
	After time.Duration
	// Truncated answers over UDP with no record and the TC bit, and correctly over TCP.
	Truncated bool
	// Fails answers with SERVFAIL.
	Fails bool
}

// Server is a DNS server. Make it with [New].
type Server struct {
	records map[string][]netip.Addr
	treat   func(n int, q Query) Treatment
	address string // where it listens, if it does

	mu      sync.Mutex
	queries []Query // guarded by mu
}

// New returns a server in which the names of records exist, with final dots, and have these addresses. treat decides on
// the n-th query, from 1; nil answers all of them. The server is asked with [Server.LookupInMemory], or after [Server.Listen].
func New(records map[string][]netip.Addr, treat func(n int, q Query) Treatment) *Server {
	if treat == nil {
		treat = func(int, Query) Treatment { return Treatment{} }
	}
	return &Server{records: records, treat: treat}
}

// Queries returns the queries received, in their order. A query that a client repeats over TCP counts again.
func (s *Server) Queries() []Query {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.queries)
}

// Listen serves UDP and TCP at the loopback address HOST:PORT until the test ends. Port 0 is one that is free.
func (s *Server) Listen(t testing.TB, address string) {
	t.Helper()
	var (
		packets  net.PacketConn
		listener net.Listener
		err      error
	)
	for range 10 { // A port that is free for UDP can be taken for TCP.
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

// Lookup queries this server, which listens, instead of the servers of resolv.conf. It behaves like
// [net.Resolver.LookupNetIP], but does not join look-ups of the same name.
func (s *Server) Lookup(ctx context.Context, network, host string) ([]netip.Addr, error) {
	resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, s.address)
	}}
	return resolver.LookupNetIP(ctx, network, host)
}

// LookupInMemory is Lookup without a network, so that it can be used in a bubble of testing/synctest.
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
			if answer := s.answer(ctx, buffer[:n], true); answer != nil {
				_, _ = conn.WriteTo(answer, from)
			}
		})
	}
}

// serveStream serves messages with a length before each (RFC 1035, section 4.2.2) until the client closes. A query of
// it waits for those before. packets: it stands for UDP, so that answers can be truncated.
func (s *Server) serveStream(ctx context.Context, conn net.Conn, packets bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	queries := make(chan []byte)
	go func() {
		defer cancel() // The client has gone.
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
			if answer := s.answer(ctx, query, packets); answer != nil {
				framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...) //nolint:gosec // G115: a few records
				if _, err := conn.Write(framed); err != nil {
					return
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

// answer returns the answer to a query, and nil for one that is dropped.
func (s *Server) answer(ctx context.Context, query []byte, packets bool) []byte {
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
	answer, err := message.Pack()
	if err != nil {
		return nil
	}
	return answer
}

// parse returns an answer without records to a query, and what the query asks for.
func parse(query []byte) (answer dnsmessage.Message, q Query, err error) {
	var parser dnsmessage.Parser
	header, err := parser.Start(query)
	if err != nil {
		return answer, q, err
	}
	question, err := parser.Question()
	if err != nil {
		return answer, q, err
	}
	switch question.Type {
	case dnsmessage.TypeA:
		q.Type = "A"
	case dnsmessage.TypeAAAA:
		q.Type = "AAAA"
	default:
		return answer, q, errors.New("neither A nor AAAA")
	}
	q.Name = question.Name.String()
	answer.Header = dnsmessage.Header{
		ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired, RecursionAvailable: true,
	}
	answer.Questions = []dnsmessage.Question{question}
	return answer, q, nil
}
