package schedule

import (
	"math"
	"time"
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
const Unlimited = math.MaxFloat64

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
	whole      rateShare // configured, for all that share it
	n          int       // how many share it
	full       rateShare // this one's share
	bucket     bucket
	doubleTo   float64   // the rate doubles up to here, and rises in steps beyond
	lowered    time.Time // when the rate last fell
	changed    time.Time // when the rate was last found too high, or rose; it rises adaptPeriod later
	failedKeys int       // fetches in a row, of as many keys, that found the source unavailable
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
		whole: whole, n: 1, full: whole, doubleTo: full,
		bucket: bucket{rate: full, burst: float64(burst), tokens: float64(burst)},
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
	resize := func(rate float64) float64 {
		if rate >= before {
			return c.full.rate
		}
		return min(rate, c.full.rate)
	}
	c.doubleTo = resize(c.doubleTo)
	c.set(now, resize(c.bucket.rate))
	return true
}

// take returns 0 and counts a fetch if one may begin now, otherwise how long to wait.
func (c *rateControl) take(now time.Time) time.Duration {
	wait := c.bucket.wait(now)
	if wait == 0 && c.bucket.rate != Unlimited {
		c.bucket.tokens--
	}
	return wait
}

// wait returns how long until a fetch may begin.
func (c *rateControl) wait(now time.Time) time.Duration { return c.bucket.wait(now) }

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
	rate := c.bucket.rate
	tooHigh := outcome == Throttled || c.failedKeys >= unavailableAfter
	switch {
	case tooHigh && now.Sub(c.lowered) < adaptPeriod:
		c.changed = now
	case outcome == Throttled:
		c.doubleTo = max(rate/2, c.minimum())
		c.lowered, c.changed = now, now
		c.set(now, c.doubleTo)
	case tooHigh:
		c.lowered, c.changed = now, now
		c.set(now, c.minimum())
	case c.failedKeys > 0 || rate >= c.full.rate || now.Sub(c.changed) < adaptPeriod:
	default:
		// One step only, however much time has passed: without fetches it says nothing about the source.
		c.changed = now
		if rate < c.doubleTo {
			c.set(now, min(2*rate, c.doubleTo))
		} else {
			c.set(now, min(rate+c.full.rate/stepsToFull, c.full.rate))
		}
	}
}

// minimum is the lowest rate. All that share the full rate are together no faster than one alone.
func (c *rateControl) minimum() float64 { return min(minRate/float64(c.n), c.full.rate) }

// set changes the rate, and the burst in proportion.
func (c *rateControl) set(now time.Time, rate float64) {
	c.bucket.fill(now)
	c.bucket.rate = rate
	c.bucket.burst = max(1, math.Floor(float64(c.full.burst)*(rate/c.full.rate)))
}

// bucket is a token bucket. It fills with rate tokens per second up to burst; each fetch takes one.
type bucket struct {
	rate, burst float64
	tokens      float64
	filled      time.Time // when tokens was last brought up to date
}

func (b *bucket) fill(now time.Time) {
	elapsed := max(now.Sub(b.filled), 0) // The wall clock may have been set back.
	b.tokens = min(b.tokens+elapsed.Seconds()*b.rate, b.burst)
	b.filled = now
}

// wait returns how long until there is a token, 0 if there is one.
func (b *bucket) wait(now time.Time) time.Duration {
	b.fill(now)
	if b.tokens >= 1 || b.rate == Unlimited {
		return 0
	}
	// Rounded up, or a fetch would be tried again at once.
	nanoseconds := math.Ceil((1 - b.tokens) / b.rate * float64(time.Second))
	if nanoseconds >= float64(maxWait) { // also for a rate close to 0
		return maxWait
	}
	return time.Duration(nanoseconds)
}

// maxWait bounds wait, in which no more than its caller's patience matters.
const maxWait = time.Hour
