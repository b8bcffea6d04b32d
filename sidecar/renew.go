package sidecar

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// backoff spreads failing attempts. Each waits a random time between base and a ceiling, which doubles with each failure
// up to limit. All sidecars of a cluster lose a broker at the same time; the random part keeps them from returning at the
// same time.
type backoff struct{ base, limit time.Duration }

var (
	// The current session is valid, so there is time.
	backoffValid = backoff{time.Second, 30 * time.Second}
	// The application waits for a session.
	backoffEmpty = backoff{200 * time.Millisecond, 5 * time.Second}
	// A user must fix an annotation or a permission first. Users are slow, and so is IAM's propagation.
	backoffRefused = backoff{5 * time.Second, time.Minute}
)

// wait returns the time until the next attempt after that many failures, at least 1.
func (b backoff) wait(failures int) time.Duration {
	ceiling := min(b.base<<min(failures, 10), b.limit) // base << 10 exceeds each limit
	return b.base + rand.N(ceiling-b.base)             //nolint:gosec // G404: spreads load, guards nothing
}

const (
	// maxRetryAfter limits the delay that a broker may request. A session of an hour has at least 25 minutes left when its
	// renewal begins, and several attempts must fit in.
	maxRetryAfter = 5 * time.Minute
	// minRenewal prevents a busy loop if a source returns leases that are about to expire.
	minRenewal = time.Second
)

// latestRenewal returns the longest wait that leaves a quarter of the lease's time left for attempts. Brokers request
// about half of it.
func latestRenewal(lease credential.Lease, now time.Time) time.Duration {
	return lease.Remaining(now) / 4 * 3
}

// renew requests sessions from the source until ctx ends.
func (s *Sidecar) renew(ctx context.Context) {
	var (
		failures int
		last     backoff
		report   reporter
	)
	for {
		lease, err := s.source.Credentials(ctx)
		if ctx.Err() != nil {
			return // the error is about the end of ctx
		}
		now := time.Now()
		if err == nil {
			err = usable(lease, now)
		}
		old := s.state.Load()
		next := new(*old)
		next.err, next.failedWhileValid, next.changed = err, false, make(chan struct{})
		var wait time.Duration
		if err == nil {
			failures = 0
			wait = max(min(lease.RefreshAfter, latestRenewal(lease, now)), minRenewal)
			next.lease, next.body = lease, render(lease)
			next.receivedAt, next.validFor = now, lease.Remaining(now)
			next.renewAt = now.Add(wait).Round(0) // Round drops the monotonic reading
			s.publish(old, next)
			report.received(s.log, lease, next.renewAt)
		} else {
			valid := old.valid(now)
			b := backoffFor(err, valid)
			if b != last {
				failures = 0
			}
			failures++
			last = b
			wait = b.wait(failures)
			if e, ok := errors.AsType[*credential.Error](err); ok && e.RetryAfter > 0 {
				// The random wait is added, because many sidecars may have the same RetryAfter.
				wait += min(e.RetryAfter, maxRetryAfter)
			}
			if valid {
				// Not after the expiration, because the pod would be without credentials then.
				next.failedWhileValid = true
				remaining := min(old.lease.Remaining(now), old.validFor-now.Sub(old.receivedAt))
				wait = min(wait, remaining+rand.N(backoffEmpty.base)) //nolint:gosec // G404: spreads load, guards nothing
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

// usable returns nil, or the reason why a received lease cannot be used. AWS sets its times, and this machine sets now. If
// their clocks are hours apart, no session is valid here.
func usable(lease credential.Lease, now time.Time) error {
	switch {
	case lease.Valid(now):
		return nil
	case !lease.Expiration.After(now):
		return credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal,
			"the session expired at %s, but it is %s by this node's clock; set the clock if it is wrong",
			lease.Expiration.UTC().Format(timeFormat), now.UTC().Format(timeFormat))
	default:
		return credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "the broker sent no secret key or no session token")
	}
}

func backoffFor(err error, valid bool) backoff {
	switch {
	case refused(err):
		return backoffRefused
	case valid:
		return backoffValid
	default:
		return backoffEmpty
	}
}

// publish replaces old by next, and wakes waiting requests.
func (s *Sidecar) publish(old, next *state) {
	s.state.Store(next)
	close(old.changed)
}

// sleep waits until d has passed, or until a request finds that st is overdue. It returns false when ctx ends.
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
			// A request may have found an older state overdue.
			if st.overdue(time.Now()) {
				return true
			}
		}
	}
}
