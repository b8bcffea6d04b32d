// Package gate bounds how much of the processors an expensive computation takes, and shares that fairly between tenants.
// A tenant runs one computation at a time, however many of its callers wait, and tenants take turns. So a tenant with
// expensive computations makes its own callers wait. A caller of another tenant waits for one computation of each tenant
// that waits too, and not for all of them. It does not bound how long one computation takes.
package gate

import (
	"container/list"
	"runtime"
	"sync"
)

// Gate admits callers. The zero value is ready. Its methods may be called concurrently.
type Gate struct {
	limit int // how many computations run at a time; 0: half of the processors, so that the others are left for cheap work

	mu      sync.Mutex
	running int               // guarded by mu
	queues  map[string]*queue // :: tenant → its callers; only tenants with callers; guarded by mu
	ready   []*queue          // have a waiting caller and none that runs, next first; guarded by mu
}

// queue holds the callers of one tenant.
type queue struct {
	tenant  string
	running bool      // one of them runs
	ready   bool      // it is in Gate.ready
	waiting list.List // of chan struct{}, closed when the turn comes; next first
}

// Enter waits for the turn of a caller of the tenant, and reports whether it came before done was closed. If it did, the
// caller calls Leave after its computation. If done is nil, Enter waits until the turn comes.
func (g *Gate) Enter(done <-chan struct{}, tenant string) bool {
	turn := make(chan struct{})
	g.mu.Lock()
	q := g.queues[tenant]
	if q == nil {
		if g.queues == nil {
			g.queues = make(map[string]*queue)
		}
		q = &queue{tenant: tenant}
		g.queues[tenant] = q
	}
	place := q.waiting.PushBack(turn)
	g.serve(q)
	g.mu.Unlock()

	select {
	case <-turn:
		return true
	case <-done:
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-turn: // at the same time
		return true
	default:
	}
	q.waiting.Remove(place) // serve removes the queue, because one of its callers runs or it is in ready.
	return false
}

// Leave ends the turn of a caller of the tenant.
func (g *Gate) Leave(tenant string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	q := g.queues[tenant]
	q.running = false
	g.running--
	g.serve(q)
}

// Waiting returns how many callers of each tenant wait.
func (g *Gate) Waiting() map[string]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	waiting := make(map[string]int)
	for tenant, q := range g.queues {
		if n := q.waiting.Len(); n > 0 {
			waiting[tenant] = n
		}
	}
	return waiting
}

// serve starts the computations that may run after a change of q. The caller holds mu.
func (g *Gate) serve(q *queue) {
	if q.waiting.Len() > 0 && !q.running && !q.ready {
		q.ready = true
		g.ready = append(g.ready, q)
	}
	limit := g.limit
	if limit == 0 {
		limit = max(1, runtime.GOMAXPROCS(0)/2)
	}
	for len(g.ready) > 0 && g.running < limit {
		next := g.ready[0]
		g.ready = g.ready[1:]
		next.ready = false
		if first := next.waiting.Front(); first != nil { // nil if all callers have given up
			next.running = true
			g.running++
			close(next.waiting.Remove(first).(chan struct{}))
		} else if !next.running {
			delete(g.queues, next.tenant)
		}
	}
	if q.waiting.Len() == 0 && !q.running && !q.ready {
		delete(g.queues, q.tenant)
	}
}
