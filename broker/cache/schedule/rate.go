package schedule

import (
	"math"
	"time"

	"golang.org/x/time/rate"
)

// Outcome is what the end of a fetch says about the rate.
type Outcome int

const (
	// Responded means that the source responded, with a session or a refusal.
	Responded Outcome = iota
	// Throttled means that the source refused the call because there were too many.
	Throttled
	// Unavailable means that the source did not respond.
	Unavailable
)

// Unlimited is a rate without a limit.
const Unlimited = float64(rate.Inf)

// The rate of fetches follows the source, as congestion control does in TCP. It is halved when the source throttles.
// Then it doubles up to half of the rate that was throttled, and rises in small steps from there. If the source is
// unavailable, the rate falls to minRate, so that its return does not release all waiting fetches at once.
const (
	// minRate, in fetches per second of all that share the rate, is low enough for any source and detects its return
	// within a fraction of a second.
	minRate = 10
	// stepsToFull is how many steps lead from 0 to the full rate, one per adaptPeriod.
	stepsToFull = 20
	// adaptPeriod is the time in which the rate falls once or rises once: fetches that began before the last change say
	// nothing about it.
	adaptPeriod = time.Second
	// unavailableAfter is how many fetches in a row, of as many keys, must fail before the source counts as unavailable.
	// One key that fails by itself, however often, does not slow the others.
	unavailableAfter = 20
)

// rateControl decides when the next fetch may begin.
type rateControl struct {
	whole      rateShare     // configured, for all that share it
	n          int           // how many share it
	full       rateShare     // this one's share
	limiter    *rate.Limiter // has the present rate and burst
	doubleTo   float64       // the rate doubles up to here, and rises in steps beyond
	lowered    time.Time     // when the rate last fell
	changed    time.Time     // when the rate was last found too high, or rose; it rises adaptPeriod later
	failedKeys int           // fetches in a row, of as many keys, that found the source unavailable
}

// rateShare is a rate with its burst.
type rateShare struct {
	rate  float64
	burst int
}

// of returns one of n equal shares.
func (s rateShare) of(n int) rateShare {
	if s.rate != Unlimited {
		s.rate /= float64(n)
	}
	return rateShare{s.rate, (s.burst + n - 1) / n}
}

func newRateControl(full float64, burst int) rateControl {
	whole := rateShare{full, burst}
	return rateControl{
		whole: whole, n: 1, full: whole, doubleTo: full, limiter: rate.NewLimiter(rate.Limit(full), burst),
	}
}

// share makes the full rate one of n equal shares, and reports whether that changes it. A rate that was lowered stays,
// up to the new full rate: the reason for lowering it has not changed.
func (c *rateControl) share(now time.Time, n int) (changed bool) {
	n = max(n, 1)
	if n == c.n {
		return false
	}
	before := c.full.rate
	c.n, c.full = n, c.whole.of(n)
	resize := func(perSecond float64) float64 {
		if perSecond >= before {
			return c.full.rate
		}
		return min(perSecond, c.full.rate)
	}
	c.doubleTo = resize(c.doubleTo)
	c.set(now, resize(c.perSecond()))
	return true
}

// perSecond returns the present rate.
func (c *rateControl) perSecond() float64 { return float64(c.limiter.Limit()) }

// take returns 0 and counts a fetch if one may begin now, otherwise how long to wait.
func (c *rateControl) take(now time.Time) time.Duration {
	// AllowN would not refill after a refusal while the wall clock is set back.
	reservation := c.limiter.ReserveN(now, 1)
	wait := min(reservation.DelayFrom(now), maxWait)
	if wait > 0 {
		reservation.CancelAt(now)
	}
	return wait
}

// wait returns how long until a fetch may begin.
func (c *rateControl) wait(now time.Time) time.Duration {
	missing := 1 - c.limiter.TokensAt(now)
	if missing <= 0 || c.perSecond() == Unlimited {
		return 0
	}
	// It is rounded up, or the fetch would be tried a moment too early. A rate close to 0 would overflow.
	nanoseconds := math.Ceil(missing / c.perSecond() * float64(time.Second))
	return time.Duration(min(nanoseconds, float64(maxWait)))
}

// maxWait bounds the result of wait. Callers wait for less, so a higher result would change nothing.
const maxWait = time.Hour

// adapt changes the rate after a fetch. failedBefore says that the same key's previous fetch failed too.
func (c *rateControl) adapt(now time.Time, outcome Outcome, failedBefore bool) {
	if c.full.rate == Unlimited {
		return
	}
	switch {
	case outcome != Unavailable:
		c.failedKeys = 0
	case !failedBefore:
		c.failedKeys++
	}
	perSecond := c.perSecond()
	tooHigh := outcome == Throttled || c.failedKeys >= unavailableAfter
	switch {
	case tooHigh && now.Sub(c.lowered) < adaptPeriod:
		c.changed = now
	case outcome == Throttled:
		c.doubleTo = max(perSecond/2, c.minimum())
		c.lowered, c.changed = now, now
		c.set(now, c.doubleTo)
	case tooHigh:
		c.lowered, c.changed = now, now
		c.set(now, c.minimum())
	case c.failedKeys > 0 || perSecond >= c.full.rate || now.Sub(c.changed) < adaptPeriod:
	default:
		// One step only, however much time has passed: without fetches it says nothing about the source.
		c.changed = now
		if perSecond < c.doubleTo {
			c.set(now, min(2*perSecond, c.doubleTo))
		} else {
			c.set(now, min(perSecond+c.full.rate/stepsToFull, c.full.rate))
		}
	}
}

// minimum is the lowest rate. All that share the full rate are together no faster than one alone.
func (c *rateControl) minimum() float64 { return min(minRate/float64(c.n), c.full.rate) }

// set changes the rate, and the burst in proportion.
func (c *rateControl) set(now time.Time, perSecond float64) {
	c.limiter.SetLimitAt(now, rate.Limit(perSecond))
	c.limiter.SetBurstAt(now, max(1, int(float64(c.full.burst)*(perSecond/c.full.rate))))
}
