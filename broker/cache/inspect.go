package cache

import (
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// counts of events since the start.
type counts struct{ hits, misses, stale, fetched, failed, forCallers, renewals, prefetches uint64 }

// began counts a fetch by its cause.
func (c *counts) began(hasWaiters, valid bool) {
	switch {
	case hasWaiters:
		c.forCallers++
	case valid:
		c.renewals++
	default:
		c.prefetches++
	}
}

// Stats describes a cache in numbers.
type Stats struct {
	// Entries counts all keys. Active counts the active ones. Of those, Warm have a valid session cached, and Refused have
	// none because the source refuses, which a user must fix. Late counts the warm ones that have less than 0.45 of their
	// session duration left although the source does not refuse: later than guaranteed.
	Entries, Active, Warm, Refused, Late int
	// Waiting, Renewing and Ahead count the fetches that have not begun: those with waiting callers, those of keys with a
	// valid session, and the others.
	Waiting, Renewing, Ahead int
	// InFlight counts the fetches that have begun and not ended.
	InFlight int
	// Rate is how many fetches may begin per second at present. Share is its maximum, this cache's share of Config.Rate.
	// Demand is how many fetches per second the renewals of active keys need on average.
	Rate, Share, Demand float64
	// Stalest is the shortest time left of an active key that is warm, and StalestPart the smallest part of a session
	// duration that is left of one; 0 without one.
	Stalest     time.Duration
	StalestPart float64
	// Hits, Misses and Stale count calls of Get that found a session with at least half of its duration left, none, and
	// one with less left.
	Hits, Misses, Stale uint64
	// Fetched and Failed count the fetches that returned a session, and those that did not.
	Fetched, Failed uint64
	// ForCallers, Renewals and Prefetches count the fetches that have begun: those with waiting callers, otherwise those
	// of keys with a valid session, and the others.
	ForCallers, Renewals, Prefetches uint64
}

// Stats returns the numbers of this moment. It visits every key.
func (c *Cache[K]) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	scheduled := c.schedule.Stats()
	s := Stats{
		Entries: len(c.entries), InFlight: scheduled.Running,
		Rate: scheduled.Rate, Share: scheduled.Share, Demand: scheduled.Demand,
		Hits: c.counts.hits, Misses: c.counts.misses, Stale: c.counts.stale,
		Fetched: c.counts.fetched, Failed: c.counts.failed,
		ForCallers: c.counts.forCallers, Renewals: c.counts.renewals, Prefetches: c.counts.prefetches,
	}
	for _, e := range c.entries {
		valid := e.session.Valid(now)
		if c.schedule.Queued(e.item) {
			switch {
			case e.fetch.hasWaiters():
				s.Waiting++
			case valid:
				s.Renewing++
			default:
				s.Ahead++
			}
		}
		if e.refs == 0 {
			continue
		}
		s.Active++
		switch {
		case valid:
			s.Warm++
			if left := e.session.Remaining(now); s.Warm == 1 || left < s.Stalest {
				s.Stalest = left
			}
			part := fractionLeft(e.session, now)
			if s.Warm == 1 || part < s.StalestPart {
				s.StalestPart = part
			}
			if part < refreshLow && !refused(e.failure) {
				s.Late++
			}
		case refused(e.failure):
			s.Refused++
		}
	}
	return s
}

// Progress returns how many active keys need no fetch now, because they are warm or the source refuses them, and how many
// are active.
func (c *Cache[K]) Progress() (done, active int) {
	s := c.Stats()
	return s.Warm + s.Refused, s.Active
}

// State is the state of one key, without secrets.
type State[K comparable] struct {
	Key K
	// Active is how many Retain calls were not released.
	Active int
	// Tenants are those that requested the key, in no order.
	Tenants []string
	// AccessKeyID, Issued and Expiration describe the cached session; zero without one.
	AccessKeyID        string
	Issued, Expiration time.Time
	// NextLook is when the key is renewed, retried or removed; zero during a fetch.
	NextLook time.Time
	// Fetching is set from the moment at which a fetch is queued until it ends. Waiters counts its callers that have no
	// session.
	Fetching bool
	Waiters  int
	// Failure is the error of the last fetch, nil after a success. Failures counts those in a row. NotBefore is when the
	// next fetch may begin.
	Failure   error
	Failures  int
	NotBefore time.Time
}

// States returns the state of every key for which match returns true, in no order. match must be quick and must not call
// the cache.
func (c *Cache[K]) States(match func(K) bool) []State[K] {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []State[K]
	for _, e := range c.entries {
		if !match(e.key) {
			continue
		}
		s := State[K]{
			Key: e.key, Active: e.refs,
			AccessKeyID: e.session.AccessKeyID, Issued: e.session.Issued, Expiration: e.session.Expiration,
			NextLook: c.schedule.DueAt(e.item),
			Failure:  e.failure, Failures: e.failures, NotBefore: e.notBefore,
		}
		for _, u := range e.usages {
			s.Tenants = append(s.Tenants, u.tenant)
		}
		if e.fetch != nil {
			s.Fetching, s.Waiters = true, e.fetch.waiters
		}
		all = append(all, s)
	}
	return all
}

// Renew immediately fetches a new session for each key for which match returns true and that is active or being fetched,
// and returns how many there are. Current sessions are served meanwhile. The result of a fetch that is in flight now is
// not used: it may be older than the reason for this call.
func (c *Cache[K]) Renew(match func(K) bool) int {
	needed := func(e *entry[K]) bool { return (e.refs > 0 || e.fetch != nil) && match(e.key) }
	return c.refetch(needed, func(*entry[K]) {})
}

// Drop removes the sessions of the keys for which match returns true, and returns how many keys match. Those that are
// active or being fetched get a new session, as by Renew. Earlier callers still have the old one.
func (c *Cache[K]) Drop(match func(K) bool) int {
	return c.refetch(func(e *entry[K]) bool { return match(e.key) }, func(e *entry[K]) {
		e.session = credential.Credential{}
		c.schedule.ForgetSession(e.item)
	})
}

// refetch changes each chosen entry, clears its failures, and fetches a new session if the entry needs one.
func (c *Cache[K]) refetch(chosen func(*entry[K]) bool, change func(*entry[K])) (n int) {
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
		case e.fetch != nil && !c.schedule.Queued(e.item):
			e.fetch.outdated = true
		case e.fetch == nil && e.refs > 0:
			c.ensureFetch(e, e.retainer())
		}
		c.reschedule(e, now)
	}
	c.wakeRun()
	return n
}
