package cache

import (
	"errors"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// counts of what has happened since the start.
type counts struct{ hits, misses, stale, fetched, failed, forCallers, renewals, prefetches uint64 }

// begun counts a fetch by its cause.
func (c *counts) begun(waitedFor, held bool) {
	switch {
	case waitedFor:
		c.forCallers++
	case held:
		c.renewals++
	default:
		c.prefetches++
	}
}

// Stats is what a cache is doing, in numbers.
type Stats struct {
	// Entries is how many keys are known. Active is how many of them are wanted; of those, Warm hold a
	// valid session, and Refused hold none because the source refuses: a person has to change
	// something. Late is how many of the warm have less than 0.45 of their lives left, and not because the source
	// refuses: later than promised.
	Entries, Active, Warm, Refused, Late int
	// Waiting, Renewing and Ahead are the fetches that have not begun: of keys that callers wait for, of
	// keys that hold a session, and of others.
	Waiting, Renewing, Ahead int
	// InFlight is how many fetches are under way.
	InFlight int
	// Rate is how many fetches may begin per second at present, and Share how many at best: this cache's part of
	// Config.Rate. Demand is how many it takes on average to renew the sessions of keys that are kept.
	Rate, Share, Demand float64
	// Stalest is the least time to expiry of a kept key that is warm; 0 when there is none.
	Stalest time.Duration
	// Hits, Misses and Stale count calls of Get: for those that held a session in the first half of its life,
	// none, and one in the second half.
	Hits, Misses, Stale uint64
	// Fetched and Failed count the fetches that brought a session, and those that did not.
	Fetched, Failed uint64
	// ForCallers, Renewals and Prefetches count the fetches that have begun: because a caller had nothing to go on with,
	// otherwise where a session was held, and where none was.
	ForCallers, Renewals, Prefetches uint64
}

// Stats counts. It looks at every key.
func (c *Cache[K]) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	s := Stats{
		Entries: len(c.entries), InFlight: c.running,
		Rate: float64(c.pace.limiter.Limit()), Share: float64(c.pace.full), Demand: c.renewals.perSecond(),
		Hits: c.counts.hits, Misses: c.counts.misses, Stale: c.counts.stale,
		Fetched: c.counts.fetched, Failed: c.counts.failed,
		ForCallers: c.counts.forCallers, Renewals: c.counts.renewals, Prefetches: c.counts.prefetches,
	}
	for _, e := range c.entries {
		if e.kept == 0 {
			continue
		}
		s.Active++
		switch {
		case e.held.Valid(now):
			s.Warm++
			if left := e.held.Remaining(now); s.Warm == 1 || left < s.Stalest {
				s.Stalest = left
			}
			if fraction(e.held, now) < askLow && !refused(e.failure) {
				s.Late++
			}
		case refused(e.failure):
			s.Refused++
		}
	}
	for _, e := range c.queue.heap {
		switch {
		case e.flight.waitedFor():
			s.Waiting++
		case e.held.Valid(now):
			s.Renewing++
		default:
			s.Ahead++
		}
	}
	return s
}

// Settled reports how many kept keys wait for nothing more, because they hold a valid session or the
// source refuses them, and how many are kept.
func (c *Cache[K]) Settled() (settled, kept int) {
	s := c.Stats()
	return s.Warm + s.Refused, s.Active
}

// State is what is known of one key, without secrets.
type State[K comparable] struct {
	Key K
	// Active is how many want it kept.
	Active int
	// Tenants are those who have asked for it, in no order.
	Tenants []string
	// AccessKeyID, Issued and Expiration are of the session that is held; zero when none is.
	AccessKeyID        string
	Issued, Expiration time.Time
	// NextLook is when the key is renewed, tried again or forgotten; zero while it is being fetched.
	NextLook time.Time
	// Fetching is set from the moment when a fetch is queued until it ends. Waiters is how many callers have
	// nothing to go on with meanwhile.
	Fetching bool
	Waiters  int
	// Failure is how the last fetch ended, nil when it succeeded; Failures is how many failed in a row, and
	// NotBefore when the next may begin.
	Failure   error
	Failures  int
	NotBefore time.Time
}

// States returns the state of every key for which match is true, in no order. match must be quick, and must
// not call the cache.
func (c *Cache[K]) States(match func(K) bool) []State[K] {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []State[K]
	for _, e := range c.entries {
		if !match(e.key) {
			continue
		}
		s := State[K]{
			Key: e.key, Active: e.kept,
			AccessKeyID: e.held.AccessKeyID, Issued: e.held.Issued, Expiration: e.held.Expiration,
			Failure: e.failure, Failures: e.failures, NotBefore: e.notBefore,
		}
		for _, u := range e.classes {
			s.Tenants = append(s.Tenants, u.class)
		}
		if e.flight != nil {
			s.Fetching, s.Waiters = true, e.flight.waiters
		} else {
			s.NextLook = e.dueAt
		}
		all = append(all, s)
	}
	return all
}

// Renew fetches the keys for which match is true anew, at once, and returns how many; of those that are
// wanted, which leaves out keys that nobody keeps or waits for. Their sessions are served meanwhile. What a
// fetch brings that is under way now is not used: it may be older than the reason for this call.
func (c *Cache[K]) Renew(match func(K) bool) int {
	return c.again(func(e *entry[K]) bool { return (e.kept > 0 || e.flight != nil) && match(e.key) }, func(*entry[K]) {})
}

// Drop forgets the sessions of the keys for which match is true, and returns how many keys that are. Those
// that are wanted are fetched anew, as by Renew. Who was given a session before still has it.
func (c *Cache[K]) Drop(match func(K) bool) int {
	return c.again(func(e *entry[K]) bool { return match(e.key) }, func(e *entry[K]) { e.held = credential.Credential{} })
}

// again changes each chosen entry, forgets its failures, and has it fetched where it is wanted.
func (c *Cache[K]) again(chosen func(*entry[K]) bool, change func(*entry[K])) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return 0
	}
	now := time.Now()
	for _, e := range c.entries {
		if !chosen(e) {
			continue
		}
		n++
		change(e)
		e.failure, e.failures, e.notBefore = nil, 0, time.Time{}
		switch {
		case e.flight != nil && e.queued < 0:
			e.flight.outdated = true
		case e.flight != nil:
			c.queue.fix(e) // Without a session it stands elsewhere in the queue.
		case e.kept > 0:
			c.ask(e, e.keeper())
		}
		c.settle(e, now)
	}
	c.poke()
	return n
}

// refused reports whether a failure is for a person to mend.
func refused(err error) bool {
	return errors.Is(err, credential.ErrDenied) || errors.Is(err, credential.ErrInvalid)
}
