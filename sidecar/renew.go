package sidecar

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// pace is how attempts are spread while they fail: after a random time between base and a ceiling
// that doubles with each failure until it is limit. The randomness keeps the sidecars of a cluster,
// which all saw the broker go at once, from coming back at once.
type pace struct{ base, limit time.Duration }

var (
	// A credential is held: there is time.
	paceHolding = pace{time.Second, 30 * time.Second}
	// The application waits for its first credential.
	paceEmpty = pace{200 * time.Millisecond, 5 * time.Second}
	// Somebody has to mend an annotation or a permission first; people and IAM's own delays are slow.
	paceRefused = pace{5 * time.Second, time.Minute}
)

// wait returns the time until the next attempt after the given number of failures, from 1.
func (p pace) wait(failures int) time.Duration {
	ceiling := min(p.base<<min(failures, 10), p.limit) // 2^10 bases are over every limit
	return p.base + rand.N(ceiling-p.base)             //nolint:gosec // G404: spreads load, guards nothing
}

const (
	// maxRetryAfter bounds what a broker may ask for: a credential of an hour has at least 25 minutes left
	// when its renewal begins, and several attempts must fit in.
	maxRetryAfter = 5 * time.Minute
	// minRenewal keeps a source whose leases are at their end from being asked in a busy loop.
	minRenewal = time.Second
)

// latestRenewal is the longest time to wait that leaves a quarter of what remains of lease for
// attempts. Brokers ask for about half of it.
func latestRenewal(lease credential.Lease, now time.Time) time.Duration {
	return lease.Remaining(now) / 4 * 3
}

// renew asks the source until ctx ends.
func (s *Sidecar) renew(ctx context.Context) {
	var (
		failures int
		last     pace
		report   reporter
	)
	for {
		lease, err := s.source.Credentials(ctx)
		if ctx.Err() != nil {
			return // what the source says now is about the end of ctx
		}
		now := time.Now()
		if err == nil {
			err = usable(lease, now)
		}
		old := s.state.Load()
		next := new(*old)
		next.err, next.holding, next.changed = err, false, make(chan struct{})
		var wait time.Duration
		if err == nil {
			failures = 0
			wait = max(min(lease.RefreshAfter, latestRenewal(lease, now)), minRenewal)
			next.lease, next.body = lease, render(lease)
			next.got, next.left = now, lease.Remaining(now)
			next.renewAt = now.Add(wait).Round(0) // Round drops the monotonic reading
			s.publish(old, next)
			report.held(s.log, lease, next.renewAt)
		} else {
			holding := old.valid(now)
			p := paceFor(err, holding)
			if p != last {
				failures = 0
			}
			failures++
			last = p
			wait = p.wait(failures)
			if e, ok := errors.AsType[*credential.Error](err); ok && e.RetryAfter > 0 {
				// On top, so that those who were all told the same time still come apart.
				wait += min(e.RetryAfter, maxRetryAfter)
			}
			if holding {
				// Not past the end of what is held: somebody would be without credentials then.
				next.holding = true
				left := min(old.lease.Remaining(now), old.left-now.Sub(old.got))
				wait = min(wait, left+rand.N(paceEmpty.base)) //nolint:gosec // G404: spreads load, guards nothing
			}
			s.publish(old, next)
			report.failed(s.log, err, old, now)
			if next.uninjected() && !next.valid(now) {
				report.uninjected(s.log)
			}
		}
		if !s.sleep(ctx, wait, next) {
			return
		}
	}
}

// usable says why a lease that was just got is of no use, or is nil. Its times are those of AWS, and now is
// this machine's: where they are hours apart, no session is valid here.
func usable(lease credential.Lease, now time.Time) error {
	switch {
	case lease.Valid(now):
		return nil
	case !lease.Expiration.After(now):
		return credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal,
			"the broker's session ended at %s, and it is %s by this node's clock: set the clock if it is wrong",
			lease.Expiration.UTC().Format(timeForm), now.UTC().Format(timeForm))
	default:
		return credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "the broker's session lacks a key or a token")
	}
}

func paceFor(err error, holding bool) pace {
	switch {
	case refused(err):
		return paceRefused
	case holding:
		return paceHolding
	default:
		return paceEmpty
	}
}

// publish puts next in place of old and wakes those who wait.
func (s *Sidecar) publish(old, next *state) {
	s.state.Store(next)
	close(old.changed)
}

// sleep waits for d to pass, or for a request to find that st is overdue. It reports false when ctx
// ends.
func (s *Sidecar) sleep(ctx context.Context, d time.Duration, st *state) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-s.wake:
			// A request may have meant the state before this one.
			if st.overdue(time.Now()) {
				return true
			}
		}
	}
}
