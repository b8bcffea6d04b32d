package cache

import (
	"fmt"
	"maps"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// Len is how many keys the cache knows of.
func (c *Cache[K]) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.entries)
}

// Planned is how many renewals the cache has counted, and in how many slots.
func (c *Cache[K]) Planned() (renewals, slots int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.renewals.planned {
		renewals += n
	}
	return renewals, len(c.renewals.planned)
}

// PlanRenewal is when a session is renewed if it is looked at now, and how many slots have a count when that is taken
// back.
func PlanRenewal(cred credential.Credential, now time.Time) (at time.Time, left int) {
	r, e := newRenewals(), renewal{}
	r.want(&e, cred.Life())
	at = r.plan(&e, cred, now)
	r.cancel(&e)
	r.want(&e, 0)
	if r.perSecond() != 0 {
		left++
	}
	return at, left + len(r.planned)
}

// Check says what is wrong with the cache's own bookkeeping.
func (c *Cache[K]) Check() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	inFlight, perClass, idle := 0, map[string]int{}, map[string]int{}
	planned, demand := map[slot]int{}, [64]int64{}
	for key, e := range c.entries {
		switch {
		case e.key != key:
			return fmt.Errorf("entry of %v stands under %v", e.key, key)
		case e.flight == nil && e.dueIndex < 0 && !c.stopped:
			return fmt.Errorf("nothing will ever look at %v again", key)
		case e.queued >= 0 && (e.queued >= len(c.queue.heap) || c.queue.heap[e.queued] != e):
			return fmt.Errorf("%v is not at its place in the queue", key)
		case e.dueIndex >= 0 && (e.dueIndex >= len(c.due) || c.due[e.dueIndex] != e):
			return fmt.Errorf("%v is not at its place in the heap of what is due", key)
		case e.queued >= 0 && e.flight == nil:
			return fmt.Errorf("%v is queued without a flight", key)
		case e.kept < 0 || e.flight != nil && e.flight.waiters < 0:
			return fmt.Errorf("%v is kept or awaited by less than nobody", key)
		case e.renewal.at && (e.dueIndex < 0 || e.kept == 0):
			return fmt.Errorf("the renewal of %v is counted and not due", key)
		case e.renewal.share > 0 && (e.kept == 0 || e.held.Expiration.IsZero()):
			return fmt.Errorf("%v has part in the demand without being kept and held", key)
		}
		if e.renewal.at {
			planned[e.renewal.slot]++
		}
		demand[e.renewal.octave] += e.renewal.share
		kept := 0
		for _, u := range e.classes {
			perClass[u.class]++
			if u.kept == 0 {
				idle[u.class]++
			}
			kept += u.kept
		}
		if kept != e.kept {
			return fmt.Errorf("%v is kept by %d, and by the classes' account by %d", key, e.kept, kept)
		}
		if e.flight != nil && e.queued < 0 {
			inFlight++
		}
	}
	for _, e := range c.due {
		if c.entries[e.key] != e {
			return fmt.Errorf("%v is due and not known", e.key)
		}
	}
	for i, e := range c.queue.heap {
		if c.entries[e.key] != e {
			return fmt.Errorf("%v is queued and not known", e.key)
		}
		if i > 0 && c.queue.heap.Less(i, (i-1)/2) {
			return fmt.Errorf("the queue is out of order at %v", e.key)
		}
	}
	if !maps.Equal(perClass, c.perClass) {
		return fmt.Errorf("the classes have %v, counted are %v", perClass, c.perClass)
	}
	maps.DeleteFunc(c.idle, func(_ string, n int) bool { return n == 0 })
	if !maps.Equal(idle, c.idle) {
		return fmt.Errorf("the classes do not keep %v, counted are %v", idle, c.idle)
	}
	if !maps.Equal(planned, c.renewals.planned) {
		return fmt.Errorf("renewals are planned in %d slots, counted in %d, or not as many", len(planned), len(c.renewals.planned))
	}
	if demand != c.renewals.demand {
		return fmt.Errorf("the demand is %v, counted is %v", demand, c.renewals.demand)
	}
	if inFlight != c.running {
		return fmt.Errorf("%d fetches are under way, %d are counted", inFlight, c.running)
	}
	return nil
}

// Suspend is what a machine that was suspended for d finds: its timers stood still, and by the wall clock all that the cache
// knows is older by d.
func (c *Cache[K]) Suspend(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		for _, at := range []*time.Time{&e.held.Issued, &e.held.Expiration, &e.dueAt, &e.notBefore} {
			if !at.IsZero() {
				*at = at.Add(-d)
			}
		}
	}
}
