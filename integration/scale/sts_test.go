package scale

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	latency = 100 * time.Millisecond
	// accountRate is AWS's reported limit for an account in a region (docs/aws.md).
	accountRate = 600
)

// cause is why a broker calls STS.
type cause int

const (
	waiting  cause = iota // a pod waits, and the broker has no session for it
	renewal               // the broker has a valid session
	prefetch              // neither
	causes
)

// call is one STS call.
type call struct {
	at        time.Time
	cause     cause
	throttled bool
	left      float64 // the fraction of the renewed session that is left
}

// sts is the one STS that all brokers call, so that their rates add up.
type sts struct {
	mu      sync.Mutex
	limiter *rate.Limiter // guarded by mu
	calls   []call        // guarded by mu
}

func newSTS() *sts { return &sts{limiter: rate.NewLimiter(accountRate, accountRate)} }

// limit changes how many calls per second succeed. The burst is that of a second.
func (s *sts) limit(perSecond float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limiter = rate.NewLimiter(rate.Limit(perSecond), max(1, int(perSecond)))
}

// begin counts a call, and throttles one too many.
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

// since returns the calls that began at a time or later.
func (s *sts) since(from time.Time) []call {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearchFunc(s.calls, from, func(c call, t time.Time) int { return c.at.Compare(t) })
	return slices.Clone(s.calls[i:])
}

// line is one broker's source of sessions. It records why the broker calls.
type line struct {
	sts      *sts
	wire     credential.Source[policy.Grant] // nil: line itself makes sessions
	duration time.Duration

	mu   sync.Mutex
	ends map[policy.Grant]time.Time // of the broker's sessions; guarded by mu
}

// called is the context key of a pod's call.
type called struct{}

// Credential implements credential.Source.
func (l *line) Credential(ctx context.Context, g policy.Grant) (session credential.Credential, err error) {
	c := call{at: time.Now(), cause: prefetch}
	l.mu.Lock()
	left := l.ends[g].Sub(c.at)
	l.mu.Unlock()
	switch {
	case left > 0:
		c.cause, c.left = renewal, float64(left)/float64(l.duration)
	case ctx.Value(called{}) != nil:
		c.cause = waiting
	}
	if err := l.sts.begin(c); err != nil {
		return session, err
	}
	if l.wire != nil {
		if session, err = l.wire.Credential(ctx, g); err != nil {
			return session, err
		}
	} else {
		if !pause(ctx, latency) {
			return session, ctx.Err()
		}
		now := time.Now()
		session = credential.Credential{
			AccessKeyID: "ASIASCALE", SecretAccessKey: secret, SessionToken: secret, Issued: now, Expiration: now.Add(l.duration),
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ends[g] = session.Expiration
	return session, nil
}

var secret = credential.NewSecret("no secret")

// summary is what a fleet did in some time.
type summary struct {
	figures

	took      time.Duration
	byCause   [causes]int // STS calls that succeeded
	throttled int
	grants    int
	expected  float64 // the average number of renewals in that time
	minutes   []int   // renewals in each minute, throttled ones included
	busiest   int     // calls in the busiest second
}

// measure collects what happens during do.
func (f *fleet) measure(do func()) summary {
	f.collect()
	from := time.Now()
	do()
	return f.since(from, f.collect())
}

// since summarizes the STS calls since a time, beside the results of pods' calls.
func (f *fleet) since(from time.Time, results figures) summary {
	took := time.Since(from)
	s := summary{
		figures: results, took: took, grants: f.grants(), expected: f.perHour() * took.Hours(), minutes: make([]int, int(took/time.Minute)),
	}
	all := f.sts.since(from)
	first := 0
	for i, c := range all {
		if c.throttled {
			s.throttled++
		} else {
			s.byCause[c.cause]++
		}
		if m := int(c.at.Sub(from) / time.Minute); c.cause == renewal && m < len(s.minutes) {
			s.minutes[m]++
		}
		for c.at.Sub(all[first].at) >= time.Second {
			first++
		}
		s.busiest = max(s.busiest, i-first+1)
	}
	return s
}

// add returns the sum of two times.
func (s summary) add(other summary) summary {
	s.took += other.took
	s.expected += other.expected
	s.calls, s.failed = s.calls+other.calls, s.failed+other.failed
	s.least, s.longest = min(s.least, other.least), max(s.longest, other.longest)
	for i := range s.byCause {
		s.byCause[i] += other.byCause[i]
	}
	return s
}

func (s summary) all() (n int) {
	for _, calls := range s.byCause {
		n += calls
	}
	return n
}

func (s summary) perHour() float64 { return float64(s.all()) / s.took.Hours() }

// extra is the number of STS calls per grant beyond the renewals of the steady state.
func (s summary) extra() float64 { return (float64(s.all()) - s.expected) / float64(s.grants) }

// fetched is how many sessions per grant were fetched by brokers without one.
func (s summary) fetched() float64 {
	return float64(s.byCause[waiting]+s.byCause[prefetch]) / float64(s.grants)
}

// peak is the busiest minute of renewals, and the mean.
func (s summary) peak() (most int, mean float64) {
	total := 0
	for _, n := range s.minutes {
		total += n
	}
	return slices.Max(append(s.minutes, 0)), float64(total) / float64(max(len(s.minutes), 1))
}

func (s summary) String() string {
	most, mean := s.peak()
	return fmt.Sprintf("%s: %d STS calls (%.0f per hour; renewals %d, prefetched %d, for waiting pods %d, throttled %d), %+.3f extra and %.3f fetched per grant; "+
		"%d pods' calls of %d brokers, %d failed, %d without a session, least %.3f, longest wait %s; renewals per minute at most %d, mean %.1f; %d calls in the busiest second",
		s.took.Round(time.Second), s.all(), s.perHour(), s.byCause[renewal], s.byCause[prefetch], s.byCause[waiting], s.throttled, s.extra(), s.fetched(),
		s.calls, s.attempts, s.failed, s.without, s.least, s.longest, most, mean, s.busiest)
}
