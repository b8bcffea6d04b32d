package cache

import (
	"container/heap"
	"time"
)

// kind is a kind of fetch in the queue for which classes take turns. Renewals are a third kind, whose
// order is that of expiry, whoever wants them.
type kind int

const (
	waiting kind = iota // callers have nothing to go on with
	ahead               // fetched before anybody asks
	kinds
)

// turn is a place among the fetches of one kind: by round, and first come first served within one.
type turn struct{ round, number uint64 }

func (t turn) before(u turn) bool {
	if t.round != u.round {
		return t.round < u.round
	}
	return t.number < u.number
}

// turns hands out places so that in each round every class that wants something has one fetch: a class
// that asks for a thousand keys is behind itself, and not in front of others. (Start-time fair queueing
// with equal weights.)
type turns struct {
	current uint64            // the round of the fetch that began last
	last    map[string]uint64 // :: class → its latest round; those before current may be missing
}

func (t *turns) next(class string) uint64 {
	if t.last == nil {
		t.last = make(map[string]uint64)
	}
	round := max(t.current, t.last[class]) + 1
	t.last[class] = round
	return round
}

// queue holds the entries that wait for their fetch: those whose callers have nothing to go on with,
// then those whose session expires first, then those that are fetched ahead of any need.
type queue[K comparable] struct {
	heap   queueHeap[K]
	turns  [kinds]turns
	number uint64 // of turns given
}

func (q *queue[K]) len() int { return len(q.heap) }

// begin gives the entry's flight a turn among those of that kind, unless it has one: who leaves and comes again keeps
// its place.
func (q *queue[K]) begin(e *entry[K], k kind, class string) {
	if e.flight.turns[k] == (turn{}) {
		q.number++
		e.flight.turns[k] = turn{q.turns[k].next(class), q.number}
	}
}

func (q *queue[K]) push(e *entry[K]) { heap.Push(&q.heap, e) }

// fix restores the order when what e is ordered by has changed.
func (q *queue[K]) fix(e *entry[K]) {
	if e.queued >= 0 {
		heap.Fix(&q.heap, e.queued)
	}
}

func (q *queue[K]) remove(e *entry[K]) {
	heap.Remove(&q.heap, e.queued)
	q.forget()
}

// forget forgets what classes had, with the last of them.
func (q *queue[K]) forget() {
	if len(q.heap) == 0 {
		q.turns = [kinds]turns{}
	}
}

// next takes out the first.
func (q *queue[K]) next() *entry[K] {
	e := heap.Pop(&q.heap).(*entry[K])
	switch {
	case e.flight.waitedFor():
		q.turns[waiting].current = max(q.turns[waiting].current, e.flight.turns[waiting].round)
	case e.held.Expiration.IsZero():
		q.turns[ahead].current = max(q.turns[ahead].current, e.flight.turns[ahead].round)
	}
	q.forget()
	return e
}

// queueHeap is the order of a queue.
type queueHeap[K comparable] []*entry[K]

func (h queueHeap[K]) Len() int { return len(h) }

func (h queueHeap[K]) Less(i, j int) bool {
	a, b := h[i], h[j]
	if a.flight.waitedFor() != b.flight.waitedFor() {
		return a.flight.waitedFor()
	}
	if a.flight.waitedFor() {
		return a.flight.turns[waiting].before(b.flight.turns[waiting])
	}
	if x, y := expiry(a), expiry(b); !x.Equal(y) {
		return x.Before(y)
	}
	return a.flight.turns[ahead].before(b.flight.turns[ahead])
}

// expiry sorts entries that hold nothing behind all that do.
func expiry[K comparable](e *entry[K]) time.Time {
	if e.held.Expiration.IsZero() {
		return time.Unix(1<<40, 0)
	}
	return e.held.Expiration
}

func (h queueHeap[K]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].queued, h[j].queued = i, j
}

func (h *queueHeap[K]) Push(x any) {
	e := x.(*entry[K])
	e.queued = len(*h)
	*h = append(*h, e)
}

func (h *queueHeap[K]) Pop() any {
	last := len(*h) - 1
	e := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	e.queued = -1
	return e
}

// dueHeap orders entries by the time they need attention.
type dueHeap[K comparable] []*entry[K]

func (h dueHeap[K]) Len() int           { return len(h) }
func (h dueHeap[K]) Less(i, j int) bool { return h[i].dueAt.Before(h[j].dueAt) }
func (h dueHeap[K]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].dueIndex, h[j].dueIndex = i, j
}

func (h *dueHeap[K]) Push(x any) {
	e := x.(*entry[K])
	e.dueIndex = len(*h)
	*h = append(*h, e)
}

func (h *dueHeap[K]) Pop() any {
	last := len(*h) - 1
	e := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	e.dueIndex = -1
	return e
}
