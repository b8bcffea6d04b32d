package ststest

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"time"
)

// Behavior is what calls for one role meet. The zero value answers at once and
// lets every authenticated caller in.
type Behavior struct {
	// Latency is waited before anything else. Zero: none.
	Latency time.Duration

	// Latencies yields what is waited besides Latency, anew for each call; see Uniform and
	// Percentiles. Nil: nothing.
	Latencies func() time.Duration

	// Hold makes calls wait, after the latencies, until it is closed: for a test that
	// decides itself when the answer comes. Nil: nothing is waited for.
	Hold <-chan struct{}

	// Fault is answered in place of a session, after Latency and Hold. Nil: none.
	Fault *Fault

	// Deny refuses the caller with AccessDenied, as a trust policy does that does
	// not name it, and as AWS does for a role that does not exist.
	Deny bool

	// ExternalID is what the trust policy demands: a call with another external
	// id, or with none, is refused with AccessDenied. Empty: any will do.
	ExternalID string

	// NoTagSession refuses sessions with tags, the transitive ones of the caller's own
	// session included, as a trust policy does that allows sts:AssumeRole alone.
	NoTagSession bool

	// NoSourceIdentity refuses sessions with a source identity in the same way.
	NoSourceIdentity bool

	// WebIdentityToken is what AssumeRoleWithWebIdentity takes for this role; another
	// token is refused with InvalidIdentityToken. Empty: any will do.
	WebIdentityToken string

	// MaxDuration is the role's MaxSessionDuration; a call that asks for more is
	// refused with ValidationError. Zero: 12 hours, the most that AWS allows.
	MaxDuration time.Duration
}

// Fault is a failure to answer. Make one with a function of this package, or
// with Code and Status for any other error of the API.
type Fault struct {
	// Code, Message and Status (an HTTP status; zero means 400) make the error
	// that is answered.
	Code    string
	Message string
	Status  int

	// Hang leaves the call unanswered until its context ends: for a served
	// request that is when the client gives up, or the server closes.
	Hang bool

	// Drop closes the connection without an answer.
	Drop bool

	// Garble spoils the answer that the call would get without the fault. See
	// HTMLPage and the functions after it.
	Garble func(*Answer)

	// Times is how many calls meet the fault before the role behaves again; they
	// count from when the Behavior was set. Zero: all of them.
	Times int
}

// Throttling returns the error for more requests than the account may make. STS
// sends it with status 400, not 429.
func Throttling() *Fault {
	return &Fault{Code: "Throttling", Message: "Rate exceeded", Status: http.StatusBadRequest}
}

// Unavailable returns the error for a service that is away for a moment.
func Unavailable() *Fault {
	return &Fault{Code: "ServiceUnavailable", Message: "The request has failed due to a temporary failure of the server", Status: http.StatusServiceUnavailable}
}

// Hang returns a fault that never answers.
func Hang() *Fault { return &Fault{Hang: true} }

// Drop returns a fault that closes the connection.
func Drop() *Fault { return &Fault{Drop: true} }

// errNoAnswer says that the connection is to be closed without an answer.
var errNoAnswer = errors.New("no answer")

// role is a Behavior in use: it counts the faults that are left.
type role struct {
	behavior Behavior
	left     int // of behavior.Fault.Times; not used when that is 0
}

func newRole(b Behavior) *role {
	r := &role{behavior: b}
	if b.Fault != nil {
		fault := *b.Fault // the caller may change or reuse its own
		r.behavior.Fault = &fault
		r.left = fault.Times
	}
	return r
}

// take returns what the next call for arn meets, and uses up one of the faults
// that are counted.
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
		if r.left == 0 {
			b.Fault = nil
		} else {
			r.left--
		}
	}
	return b
}

// delay waits for Latency and Hold, then answers the Fault. It returns nil when the call
// is to go on.
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

// err is the error that the fault answers.
func (f *Fault) err() error {
	return fail(cmp.Or(f.Status, http.StatusBadRequest), f.Code, "%s", f.Message)
}
