package ststest

import (
	"context"
	"net"
	"syscall"
	"time"

	"golang.org/x/time/rate"
)

// Throttle is a token bucket for all calls of a server, like AWS's bucket for an account in a region. If it is empty, a call
// gets the response of Throttling.
type Throttle struct {
	// Rate is the number of calls that are added per second.
	Rate float64
	// Burst is the size of the bucket. It is full at the start.
	Burst int
}

// Outage is how the whole server is unavailable.
type Outage int

const (
	// NoOutage is normal operation.
	NoOutage Outage = iota
	// Refusing closes all connections at once, new and old, and ends calls in progress without a response. Refused calls are
	// not in Calls.
	Refusing
	// Failing responds to each call like Unavailable.
	Failing
)

// SetThrottle changes the limit for the calls of all roles together, from the next call on. Nil removes it.
func (s *Server) SetThrottle(t *Throttle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = nil
	if t != nil {
		s.limit = rate.NewLimiter(rate.Limit(t.Rate), t.Burst)
	}
}

// SetOutage starts or ends an outage.
func (s *Server) SetOutage(o Outage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.outage = o
	if o == Refusing {
		close(s.ended)
		s.ended = make(chan struct{})
	}
}

// SetClock sets this server's clock ahead of the process's clock, or behind it if ahead is negative. The clock determines the
// Date of responses, the check of signatures, and the expiration of sessions.
func (s *Server) SetClock(ahead time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.skew = ahead
}

// now returns the time of this server's clock.
func (s *Server) now() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Add(s.skew)
}

// checkCapacity returns the error for a call during an outage or with an empty bucket.
func (s *Server) checkCapacity() error {
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

// whileUp returns a context that also ends when the server starts to refuse connections.
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

// gate is a listener that closes connections at once while the server refuses. Closing the real listener would release its
// port.
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
			_ = tcp.SetLinger(0) // It resets the connection, which is similar to a refusal.
		}
		_ = conn.Close()
	}
}

// errRefused is the error of the dialer of a server in memory while it refuses.
var errRefused = &net.OpError{Op: "dial", Net: "pipe", Err: syscall.ECONNREFUSED}
