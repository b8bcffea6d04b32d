package cache

import (
	"context"
	"slices"
	"time"

	"github.com/credence-iam/credence/broker/cache/schedule"
	"github.com/credence-iam/credence/broker/credential"
)

// entry is the state of one key.
type entry[K comparable] struct {
	key    K
	usages []usage // one per tenant that requested the key; one, as a rule
	refs   int     // Retain calls that were not released

	session   credential.Credential // zero until the first fetch succeeds
	failure   error                 // of the last fetch; nil after a success
	failures  int                   // in a row
	notBefore time.Time             // after a failure: no fetch begins earlier

	fetch *pendingFetch // queued or in flight; nil without one
	item  *schedule.Item[*entry[K]]
}

// usage is one tenant's use of an entry.
type usage struct {
	tenant string
	refs   int // of entry.refs
}

// tenantKeys counts a tenant's entries.
type tenantKeys struct {
	all      int
	inactive int // of all, those that the tenant does not retain
}

// pendingFetch is one fetch and its callers. Cache.mu guards its fields; err is final when done is closed.
type pendingFetch struct {
	done     chan struct{}
	origin   context.Context // of the first caller, for its values; nil before any
	callers  int             // blocked on the fetch
	waiters  int             // those callers that have no session
	outdated bool            // its result must not be used: fetch again
	err      error
}

func (f *pendingFetch) hasWaiters() bool { return f.waiters > 0 }

// ensureFetch returns the entry's fetch, and queues one for tenant if there is none.
func (c *Cache[K]) ensureFetch(e *entry[K], tenant string) *pendingFetch {
	if e.fetch == nil {
		e.fetch = &pendingFetch{done: make(chan struct{})}
		c.schedule.Enqueue(e.item, tenant, e.session.Expiration)
	}
	return e.fetch
}

// join adds a caller to a fetch. waits is set if the caller has no session.
func (c *Cache[K]) join(e *entry[K], f *pendingFetch, tenant string, waits bool) {
	f.callers++
	if !waits {
		return
	}
	if !f.hasWaiters() {
		c.schedule.SetWaiting(e.item, tenant)
	}
	f.waiters++
}

// leave removes a caller from a fetch, and drops the fetch if nothing needs it any more.
func (c *Cache[K]) leave(e *entry[K], f *pendingFetch, waits bool) {
	f.callers--
	if waits {
		f.waiters--
	}
	if e.fetch != f {
		return
	}
	if waits && !f.hasWaiters() {
		c.schedule.ClearWaiting(e.item)
	}
	if c.dropUnneeded(e) {
		c.reschedule(e, time.Now())
	}
}

// dropUnneeded removes the entry's fetch from the queue if the key is not active and no caller waits. Another cache
// probably owns the key, and its callers have moved there. The caller then reschedules the entry.
func (c *Cache[K]) dropUnneeded(e *entry[K]) (dropped bool) {
	if e.refs > 0 || !c.schedule.Queued(e.item) || e.fetch.callers > 0 {
		return false
	}
	c.schedule.Dequeue(e.item)
	e.fetch = nil
	return true
}

// reschedule decides when an entry without a fetch needs attention next, and removes an entry that nothing needs. It is
// called when the key becomes active or inactive, and when its session or its fetch has changed.
func (c *Cache[K]) reschedule(e *entry[K], now time.Time) {
	// The schedule uses the wall clock. If the comparisons below used the monotonic clock, which stops while a machine is
	// suspended, an entry could be due immediately again, and Run would look at it for ever.
	now = now.Round(0)
	active, valid := e.refs > 0, e.session.Valid(now)
	c.schedule.Cancel(e.item)
	if active && valid {
		c.schedule.SetDemand(e.item, e.session.Duration())
	} else {
		c.schedule.SetDemand(e.item, 0)
	}
	forgetFailure := e.notBefore.Add(failureMemory)
	switch {
	case e.fetch != nil: // The end of the fetch reschedules it.
	case active && e.failure != nil:
		c.schedule.At(e.item, e.notBefore)
	case active && valid:
		c.schedule.Renew(e.item, e.session.Issued, e.session.Expiration, now)
	case active:
		c.schedule.At(e.item, now)
	case valid:
		c.schedule.At(e.item, e.session.Expiration)
	case e.failure != nil && now.Before(forgetFailure):
		c.schedule.At(e.item, forgetFailure)
	default:
		c.remove(e)
	}
}

// entry returns the entry of key, and adds it and the tenant's use of it as needed. The caller must reschedule the entry
// or ensure a fetch, or nothing would ever look at it again.
func (c *Cache[K]) entry(key K, tenant string) (*entry[K], error) {
	e, ok := c.entries[key]
	if ok && e.usageOf(tenant) >= 0 {
		return e, nil
	}
	if c.cfg.MaxPerTenant > 0 && c.tenants[tenant].all >= c.cfg.MaxPerTenant && !c.evict(tenant) {
		return nil, ErrTenantFull
	}
	if !ok {
		e = &entry[K]{key: key}
		e.item = schedule.NewItem(e)
		c.entries[key] = e
	}
	e.usages = append(e.usages, usage{tenant: tenant})
	c.count(tenant, +1, +1)
	return e, nil
}

// evict takes one entry away from the tenant, and reports whether it found one: of those that the tenant does not retain
// and that are not being fetched, the one whose session expires first.
func (c *Cache[K]) evict(tenant string) bool {
	if c.tenants[tenant].inactive == 0 {
		return false
	}
	var victim *entry[K]
	for _, e := range c.entries {
		i := e.usageOf(tenant)
		if i >= 0 && e.usages[i].refs == 0 && e.fetch == nil && (victim == nil || e.session.Expiration.Before(victim.session.Expiration)) {
			victim = e
		}
	}
	if victim == nil {
		return false
	}
	if len(victim.usages) == 1 {
		c.schedule.Cancel(victim.item)
		c.remove(victim)
		return true
	}
	i := victim.usageOf(tenant)
	victim.usages = slices.Delete(victim.usages, i, i+1)
	c.count(tenant, -1, -1)
	return true
}

// remove removes the entry.
func (c *Cache[K]) remove(e *entry[K]) {
	for _, u := range e.usages {
		inactive := 0
		if u.refs == 0 {
			inactive = -1
		}
		c.count(u.tenant, -1, inactive)
	}
	delete(c.entries, e.key)
}

// addRef changes how often the tenant retains the entry. The tenant must use it.
func (c *Cache[K]) addRef(e *entry[K], tenant string, n int) {
	u := &e.usages[e.usageOf(tenant)]
	before := u.refs
	e.refs += n
	u.refs += n
	switch {
	case before == 0:
		c.count(tenant, 0, -1)
	case u.refs == 0:
		c.count(tenant, 0, +1) // It counts until it is removed or evicted.
	}
}

// count changes how many entries a tenant has.
func (c *Cache[K]) count(tenant string, all, inactive int) {
	n := c.tenants[tenant]
	n.all += all
	n.inactive += inactive
	if n.all == 0 {
		delete(c.tenants, tenant)
	} else {
		c.tenants[tenant] = n
	}
}

// usageOf returns the index of the tenant's use in e.usages, or -1.
func (e *entry[K]) usageOf(tenant string) int {
	return slices.IndexFunc(e.usages, func(u usage) bool { return u.tenant == tenant })
}

// retainer returns a tenant that retains the entry; "" if none does.
func (e *entry[K]) retainer() string {
	for _, u := range e.usages {
		if u.refs > 0 {
			return u.tenant
		}
	}
	return ""
}
