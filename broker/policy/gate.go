package policy

import (
	"container/list"
	"runtime"
	"sync"
)

// gate lets few evaluations run at a time and serves namespaces in turn: one evaluation of each, however many of its
// calls wait. So a namespace with expensive decisions makes its own pods wait. Another one waits for one evaluation of
// each namespace that waits too, and not for all of them. The zero value is ready.
type gate struct {
	limit int // how many run at a time; 0: half of the processors, so that the others do all that needs no evaluation

	mu      sync.Mutex
	running int               // guarded by mu
	queues  map[string]*queue // :: namespace → its callers; has those with some; guarded by mu
	ready   []*queue          // have a waiting caller and none that runs, next first; guarded by mu
}

// queue has the callers of one namespace.
type queue struct {
	namespace string
	running   bool      // one of them runs
	ready     bool      // it is in gate.ready
	waiting   list.List // of chan struct{}, closed when the turn comes; next first
}

// enter waits for the turn of a caller of the namespace, and reports whether it came before done was closed. If it
// did, the caller calls leave after its evaluation. If done is nil, enter waits until the turn comes.
func (g *gate) enter(done <-chan struct{}, namespace string) bool {
	turn := make(chan struct{})
	g.mu.Lock()
	q := g.queues[namespace]
	if q == nil {
		if g.queues == nil {
			g.queues = make(map[string]*queue)
		}
		q = &queue{namespace: namespace}
		g.queues[namespace] = q
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
	q.waiting.Remove(place) // The queue is tidied by serve, as one of its callers runs or it is in ready.
	return false
}

// leave ends the turn of a caller of the namespace.
func (g *gate) leave(namespace string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	q := g.queues[namespace]
	q.running = false
	g.running--
	g.serve(q)
}

// serve starts what may run, after a change of q. The caller holds mu.
func (g *gate) serve(q *queue) {
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
		if first := next.waiting.Front(); first != nil { // none is left if all have given up
			next.running = true
			g.running++
			close(next.waiting.Remove(first).(chan struct{}))
		} else if !next.running {
			delete(g.queues, next.namespace)
		}
	}
	if q.waiting.Len() == 0 && !q.running && !q.ready {
		delete(g.queues, q.namespace)
	}
}
