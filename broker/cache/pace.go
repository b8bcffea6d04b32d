package cache

import (
	"errors"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/credential"
)

// How the rate of fetches follows what the source says, as congestion control does in TCP: less by half
// when it throttles, then up again, doubling to where it was last half as fast and from there in small
// steps. A source that is away is tried at minPace, so that its return does not meet all at once who
// waited for it.
const (
	// minPace, in fetches per second of all who share the rate, is slow enough for any source and finds its return within a
	// fraction of a second.
	minPace = 10
	// stepsToFull is how many seconds it takes from nothing to the full rate in steps.
	stepsToFull = 20
	// reaction is the time in which the rate falls once, or rises once: what was begun before the last
	// change says nothing about it.
	reaction = time.Second
	// awayAfter is how many fetches in a row, of as many keys, must fail for the source to count as away. One
	// key that fails by itself, however often, does not slow the others.
	awayAfter = 20
)

// pace decides when the next fetch may begin.
type pace struct {
	whole   share      // what was configured, for all that share it
	parts   int        // how many do
	full    rate.Limit // this one's part
	burst   int        // of it, at the full rate
	limiter *rate.Limiter
	safe    rate.Limit // up to here the rate doubles
	fell    time.Time  // when the rate was last lowered
	blocked time.Time  // when it was last found to be too high, or was raised: a second of quiet raises it
	failed  int        // keys in a row whose fetches found the source away
}

// share is a rate of fetches and the burst that goes with it.
type share struct {
	rate  rate.Limit
	burst int
}

// of is one of n parts.
func (s share) of(n int) share {
	if s.rate != rate.Inf {
		s.rate /= rate.Limit(n)
	}
	return share{s.rate, (s.burst + n - 1) / n}
}

func newPace(full rate.Limit, concurrency int) pace {
	// A burst of the concurrency: the bound on running fetches is reached at once after a
	// quiet time, and the rate holds from then on.
	return pace{
		whole: share{full, concurrency}, parts: 1,
		full: full, burst: concurrency, limiter: rate.NewLimiter(full, concurrency), safe: full,
	}
}

// share makes the full rate one of n parts of the whole, and reports whether that changes it. A rate that was lowered
// stays, as far as the new full rate allows: what it was lowered for has not changed.
func (p *pace) share(now time.Time, n int) bool {
	n = max(n, 1)
	if n == p.parts {
		return false
	}
	part, before := p.whole.of(n), p.full
	adapt := func(at rate.Limit) rate.Limit {
		if at >= before {
			return part.rate
		}
		return min(at, part.rate)
	}
	at := adapt(p.limiter.Limit())
	p.parts, p.full, p.burst, p.safe = n, part.rate, part.burst, adapt(p.safe)
	p.set(now, at)
	return true
}

// take returns 0 when a fetch may begin now, and counts it; otherwise how long to wait.
func (p *pace) take(now time.Time) time.Duration {
	reservation := p.limiter.ReserveN(now, 1)
	wait := reservation.DelayFrom(now)
	if wait > 0 {
		reservation.CancelAt(now)
	}
	return wait
}

// ended learns from the outcome of a fetch; again says that the key's last fetch failed as well.
func (p *pace) ended(now time.Time, err error, again bool) {
	if p.full == rate.Inf {
		return
	}
	throttled := credential.ReasonOf(err) == credential.ReasonSTSThrottled
	switch {
	case throttled:
		p.failed = 0
	case errors.Is(err, credential.ErrUnavailable):
		if !again {
			p.failed++
		}
	default:
		p.failed = 0 // A refusal is an answer too.
	}
	at := p.limiter.Limit()
	lower := throttled || p.failed >= awayAfter
	switch {
	case lower && now.Sub(p.fell) < reaction:
		p.blocked = now
	case lower:
		to := p.floor()
		if throttled {
			to = max(at/2, to)
			p.safe = to
		}
		p.fell, p.blocked = now, now
		p.set(now, to)
	case p.failed > 0 || at >= p.full || now.Sub(p.blocked) < reaction:
	default:
		// Time without a fetch taught nothing, so it counts as one step.
		to := min(at+p.full/stepsToFull, p.full)
		if at < p.safe {
			to = min(2*at, p.safe)
		}
		p.blocked = now
		p.set(now, to)
	}
}

// floor is the least rate: all who share the full one are not to be faster together than one would be.
func (p *pace) floor() rate.Limit { return min(minPace/rate.Limit(p.parts), p.full) }

func (p *pace) set(now time.Time, to rate.Limit) {
	p.limiter.SetLimitAt(now, to)
	p.limiter.SetBurstAt(now, max(1, int(float64(p.burst)*float64(to/p.full))))
}
