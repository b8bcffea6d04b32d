package cache

import (
	"fmt"
	"maps"
	"time"
	"unsafe"
)

// Len returns how many keys the cache has.
func (c *Cache[K]) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries)
}

// Check returns what is wrong with the cache's own bookkeeping.
func (c *Cache[K]) Check() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	due, queued, running, demand := 0, 0, 0, 0.0
	tenants := map[string]tenantKeys{}
	for key, e := range c.entries {
		isDue, isQueued := !c.schedule.DueAt(e.item).IsZero(), c.schedule.Queued(e.item)
		switch {
		case e.key != key || e.item.Value != e:
			return fmt.Errorf("the entry of %v is found under %v", e.key, key)
		case e.fetch == nil && !isDue && !c.stopped:
			return fmt.Errorf("nothing will ever look at %v again", key)
		case e.fetch != nil && isDue:
			return fmt.Errorf("%v is due during a fetch", key)
		case e.fetch == nil && isQueued:
			return fmt.Errorf("%v is queued without a fetch", key)
		case e.refs < 0 || e.fetch != nil && (e.fetch.waiters < 0 || e.fetch.callers < e.fetch.waiters):
			return fmt.Errorf("%v has negative counts", key)
		}
		switch {
		case isDue:
			due++
		case isQueued:
			queued++
		case e.fetch != nil:
			running++
		}
		if e.refs > 0 && !e.session.Expiration.IsZero() {
			demand += 1 / (0.45 * e.session.Duration().Seconds())
		}
		refs := 0
		for _, u := range e.usages {
			n := tenants[u.tenant]
			n.all++
			if u.refs == 0 {
				n.inactive++
			}
			tenants[u.tenant] = n
			refs += u.refs
		}
		if refs != e.refs {
			return fmt.Errorf("%v is retained %d times, its tenants retain it %d times", key, e.refs, refs)
		}
	}
	if !maps.Equal(tenants, c.tenants) {
		return fmt.Errorf("counted keys of tenants %v, want %v", c.tenants, tenants)
	}
	s := c.schedule.Stats()
	if s.Due != due || s.Queued != queued || s.Running != running {
		return fmt.Errorf("the schedule has %d entries due, %d queued and %d running, want %d, %d and %d", s.Due, s.Queued, s.Running, due, queued, running)
	}
	// An expired session may be counted until its entry is rescheduled. A session shorter than 3 s counts as less.
	if s.Demand > 1.001*demand+1e-6 {
		return fmt.Errorf("the demand is %v, want at most %v", s.Demand, demand)
	}
	return nil
}

// Suspend simulates that the machine was suspended for d: timers stopped, and by the wall clock everything is older by d.
func (c *Cache[K]) Suspend(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		for _, at := range []*time.Time{&e.session.Issued, &e.session.Expiration, &e.notBefore} {
			if !at.IsZero() {
				*at = at.Add(-d)
			}
		}
		if at := c.schedule.DueAt(e.item); !at.IsZero() {
			c.schedule.At(e.item, at.Add(-d))
		}
	}
}

// RescheduleSuspended reschedules each entry as if the machine was suspended for d since its last failure: the wall clock
// went on, the monotonic clock stood still. It returns an error for an inactive entry that is due again: Run would look at
// it for ever.
func (c *Cache[K]) RescheduleSuspended(d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for key, e := range c.entries {
		e.notBefore = wallEarlier(e.notBefore, d)
		c.reschedule(e, now)
		if at := c.schedule.DueAt(e.item); e.refs == 0 && !at.IsZero() && !at.After(now) {
			return fmt.Errorf("%v is inactive, and due %s ago after it was rescheduled", key, now.Round(0).Sub(at))
		}
	}
	return nil
}

// wallEarlier returns t with a wall clock that is earlier by d, in whole seconds, and the same monotonic clock. Package time
// has no function for that, so it changes the first word of t: a flag, 33 bits of seconds and 30 bits of nanoseconds.
func wallEarlier(t time.Time, d time.Duration) time.Time {
	word := (*uint64)(unsafe.Pointer(&t)) //nolint:gosec // The layout is checked by the test that uses it.
	*word -= uint64(d/time.Second) << 30
	return t
}
