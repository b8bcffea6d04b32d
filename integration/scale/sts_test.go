package scale

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	latency = 100 * time.Millisecond
	// accountRate is what AWS is reported to take of an account in a region (docs/aws.md).
	accountRate = 600
)

// cause is why STS is called.
type cause int

const (
	caller   cause = iota // a pod waits, and the broker holds nothing for it
	renewal               // a session is held
	prefetch              // neither
	causes
)

// call is one call of STS.
type call struct {
	at        time.Time
	cause     cause
	throttled bool
	left      float64 // of the session that is renewed, as a fraction of its life
}

// sts is the one STS that all brokers call, so that their rates add up.
type sts struct {
	mu      sync.Mutex
	limiter *rate.Limiter // of calls that it takes; guarded by mu
	calls   []call        // guarded by mu
}

func newSTS() *sts { return &sts{limiter: rate.NewLimiter(accountRate, accountRate)} }

// take changes how many calls per second are answered. The burst is that of a second.
func (s *sts) take(perSecond float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limiter = rate.NewLimiter(rate.Limit(perSecond), max(1, int(perSecond)))
}

// begin counts a call, and refuses one too many.
func (s *sts) begin(c call) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.throttled = !s.limiter.AllowN(c.at, 1)
	s.calls = append(s.calls, c)
	if c.throttled {
		return credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSThrottled, "STS throttles")
	}
	return nil
}

// between returns the calls that began from one time to before another.
func (s *sts) between(from, to time.Time) []call {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := func(t time.Time) int {
		i, _ := slices.BinarySearchFunc(s.calls, t, func(c call, t time.Time) int { return c.at.Compare(t) })
		return i
	}
	return slices.Clone(s.calls[at(from):at(to)])
}

// line is one broker's way to STS. It knows why the broker calls.
type line struct {
	sts  *sts
	wire credential.Source[policy.Grant] // nil: STS is only counted, and answers itself
	life time.Duration

	mu   sync.Mutex
	ends map[policy.Grant]time.Time // of the sessions that the broker was given; guarded by mu
}

// asked is in the context of what a pod has asked for.
type asked struct{}

// Credential implements credential.Source.
func (l *line) Credential(ctx context.Context, g policy.Grant) (credential.Credential, error) {
	c := call{at: time.Now(), cause: prefetch}
	l.mu.Lock()
	left := l.ends[g].Sub(c.at)
	l.mu.Unlock()
	switch {
	case left > 0:
		c.cause, c.left = renewal, float64(left)/float64(l.life)
	case ctx.Value(asked{}) != nil:
		c.cause = caller
	}
	if err := l.sts.begin(c); err != nil {
		return credential.Credential{}, err
	}
	session, err := l.answer(ctx, g)
	if err == nil {
		l.mu.Lock()
		l.ends[g] = session.Expiration
		l.mu.Unlock()
	}
	return session, err
}

func (l *line) answer(ctx context.Context, g policy.Grant) (credential.Credential, error) {
	if l.wire != nil {
		return l.wire.Credential(ctx, g)
	}
	timer := time.NewTimer(latency)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return credential.Credential{}, ctx.Err()
	case now := <-timer.C:
		return credential.Credential{
			AccessKeyID: "ASIASCALE", SecretAccessKey: secret, SessionToken: secret, Issued: now, Expiration: now.Add(l.life),
		}, nil
	}
}

var secret = credential.NewSecret("no secret")
