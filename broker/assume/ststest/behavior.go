package ststest

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"time"
)

// Behavior is how the server handles calls for one role. The zero value responds at once, and lets each authenticated caller
// assume the role.
type Behavior struct {
	// Latency is the time before all other steps. Default: none.
	Latency time.Duration

	// Latencies returns a time to wait in addition to Latency, for each call; see Uniform and Percentiles. Default: none.
	Latencies func() time.Duration

	// Hold makes calls wait after the latencies until it is closed, for a test that decides when the response comes.
	// Default: calls do not wait.
	Hold <-chan struct{}

	// Fault replaces the session, after Latency and Hold. Default: none.
	Fault *Fault

	// Deny refuses the caller with AccessDenied, like a trust policy that does not name the caller. AWS responds the same for a
	// role that does not exist.
	Deny bool

	// ExternalID is the external ID that the trust policy requires. Other calls are refused with AccessDenied. Default: any.
	ExternalID string

	// NoTagSession refuses sessions with tags, including transitive tags of the caller's session, like a trust policy that
	// allows only sts:AssumeRole.
	NoTagSession bool

	// NoSourceIdentity refuses sessions with a source identity the same way.
	NoSourceIdentity bool

	// WebIdentityToken is the token that AssumeRoleWithWebIdentity accepts for this role. Other tokens are refused with
	// InvalidIdentityToken. Default: any.
	WebIdentityToken string

	// MaxDuration is the role's MaxSessionDuration. A call that requests more is refused with ValidationError. Default: 12
	// hours, the maximum of AWS.
	MaxDuration time.Duration
}

// Fault is a failing response. Make one with a function of this package, or set Code and Status for any other error of the API.
type Fault struct {
	// Code, Message and Status (an HTTP status, by default 400) are the error response.
	Code    string
	Message string
	Status  int

	// Hang sends no response until the context of the call ends: when the client gives up or the server closes.
	Hang bool

	// Drop closes the connection without a response.
	Drop bool

	// Garble changes the response that the call would get without the fault. See HTMLPage and the functions after it.
	Garble func(*Answer)

	// Times is the number of calls with the fault, counted from when the Behavior was set. Later calls succeed. Default: all
	// calls have the fault.
	Times int
}

// Throttling returns the error for too many requests of an account. STS sends it with status 400, not 429.
func Throttling() *Fault {
	return &Fault{Code: "Throttling", Message: "Rate exceeded", Status: http.StatusBadRequest}
}

// Unavailable returns the error of a service that is unavailable for a moment.
func Unavailable() *Fault {
	return &Fault{Code: "ServiceUnavailable", Message: "The request has failed due to a temporary failure of the server", Status: http.StatusServiceUnavailable}
}

// Hang returns a fault that never responds.
func Hang() *Fault { return &Fault{Hang: true} }

// Drop returns a fault that closes the connection.
func Drop() *Fault { return &Fault{Drop: true} }

// errNoAnswer closes the connection without a response.
var errNoAnswer = errors.New("no answer")

// role is a Behavior in use. It counts the remaining faults.
type role struct {
	behavior  Behavior
	remaining int // of behavior.Fault.Times; not used if that is 0
}

func newRole(b Behavior) *role {
	r := &role{behavior: b}
	if b.Fault != nil {
		fault := *b.Fault // The caller may change or reuse its own.
		r.behavior.Fault = &fault
		r.remaining = fault.Times
	}
	return r
}

// take returns the behavior for the next call for arn, and uses one of its counted faults.
func (s *Server) take(arn string) Behavior {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.roles[arn]; ok {
		return r.take()
	}
	return s.fallback.take()
}

func (s *Server) takeIdentity() Behavior {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.identity.take()
}

func (r *role) take() Behavior {
	b := r.behavior
	if b.Fault != nil && b.Fault.Times > 0 {
		if r.remaining == 0 {
			b.Fault = nil
		} else {
			r.remaining--
		}
	}
	return b
}

// delay waits for Latency and Hold, and returns the Fault. If it returns nil, the call continues.
func (b Behavior) delay(ctx context.Context) error {
	wait := b.Latency
	if b.Latencies != nil {
		wait += b.Latencies()
	}
	if wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return errNoAnswer
		}
	}
	if b.Hold != nil {
		select {
		case <-b.Hold:
		case <-ctx.Done():
			return errNoAnswer
		}
	}
	switch {
	case b.Fault == nil, b.Fault.Garble != nil:
		return nil
	case b.Fault.Hang:
		<-ctx.Done()
		return errNoAnswer
	case b.Fault.Drop:
		return errNoAnswer
	}
	return b.Fault.err()
}

// err returns the error of the fault.
func (f *Fault) err() error {
	return fail(cmp.Or(f.Status, http.StatusBadRequest), f.Code, "%s", f.Message)
}
