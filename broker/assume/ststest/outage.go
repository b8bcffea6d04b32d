package ststest

import (
	"context"
	"net"
	"syscall"
	"time"

	"golang.org/x/time/rate"
)

// Throttle is a token bucket for the calls of a whole server, as AWS has one for an
// account in a region. A call that finds it empty is answered like Throttling.
type Throttle struct {
	// Rate is how many calls are refilled in a second.
	Rate float64
	// Burst is how many the bucket holds. It begins full.
	Burst int
}

// Outage is a way for the whole server to be away.
type Outage int

const (
	// NoOutage serves.
	NoOutage Outage = iota
	// Refusing closes every connection at once, new ones and those that are used, and ends
	// the calls in progress without an answer. Calls that get no further are not in Calls.
	Refusing
	// Failing answers every call like Unavailable.
	Failing
)

// SetThrottle changes the limit for the calls of all roles together, from the next
// call on; nil lifts it.
func (s *Server) SetThrottle(t *Throttle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = nil
	if t != nil {
		s.limit = rate.NewLimiter(rate.Limit(t.Rate), t.Burst)
	}
}

// SetOutage begins or ends an outage.
func (s *Server) SetOutage(o Outage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.outage = o
	if o == Refusing {
		close(s.ended)
		s.ended = make(chan struct{})
	}
}

// SetClock sets this server's clock ahead of the process's, or behind it when ahead is
// negative: the Date of its answers, the time it holds signatures against, and the
// expiration of sessions.
func (s *Server) SetClock(ahead time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.skew = ahead
}

// now is the time by this server's clock.
func (s *Server) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Add(s.skew)
}

// upAndWilling returns the error for a call that finds the server away or its bucket
// empty.
func (s *Server) upAndWilling() error {
	s.mu.Lock()
	outage, limit := s.outage, s.limit
	s.mu.Unlock()
	switch {
	case outage == Refusing:
		return errNoAnswer
	case outage == Failing:
		return Unavailable().err()
	case limit != nil && !limit.Allow():
		return Throttling().err()
	}
	return nil
}

// whileUp returns a context that also ends when the server begins to refuse.
func (s *Server) whileUp(ctx context.Context) (context.Context, context.CancelFunc) {
	s.mu.Lock()
	ended := s.ended
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

func (s *Server) refusing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.outage == Refusing
}

// gate is a listener whose connections end at once while the server refuses. Closing
// the real listener would give its port away.
type gate struct {
	net.Listener
	server *Server
}

func (g gate) Accept() (net.Conn, error) {
	for {
		conn, err := g.Listener.Accept()
		if err != nil || !g.server.refusing() {
			return conn, err
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // a reset, as near to a refusal as there is
		}
		_ = conn.Close()
	}
}

// errRefused is what the dialer of a server in memory says while it refuses.
var errRefused = &net.OpError{Op: "dial", Net: "pipe", Err: syscall.ECONNREFUSED}
