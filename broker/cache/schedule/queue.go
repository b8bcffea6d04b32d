package schedule

import "container/heap"

// kind is a kind of queued fetch in which tenants take turns. Renewals are a third kind, ordered by expiration whatever
// their tenants.
type kind int

const (
	waiting     kind = iota // callers wait for the fetch
	prefetching             // no caller needs it yet, and there is no session to renew
	kinds
)

// turn is a place among the fetches of one kind: by round, and first come, first served within a round.
type turn struct{ round, number uint64 }

func (t turn) before(u turn) bool {
	if t.round != u.round {
		return t.round < u.round
	}
	return t.number < u.number
}

// rounds assigns turns so that each tenant with queued fetches has one fetch in each round. A tenant that requests a
// thousand keys waits behind itself and not in front of others. It is start-time fair queueing with equal weights
// (Goyal, Vin and Cheng, 1996).
type rounds struct {
	current uint64            // the round of the latest fetch that began
	last    map[string]uint64 // :: tenant → its latest round; a round before current means nothing
}

func (r *rounds) next(tenant string) uint64 {
	if r.last == nil {
		r.last = make(map[string]uint64)
	}
	round := max(r.current, r.last[tenant]) + 1
	r.last[tenant] = round
	return round
}

// queue holds the items whose fetches are due and have not begun, ordered by [less].
type queue[T any] struct {
	heap   queueHeap[T]
	rounds [kinds]rounds
	turns  uint64 // how many were assigned
}

// less orders fetches: those with waiting callers, then renewals by expiration, then prefetches. A session that has
// expired sorts first among the renewals.
func less[T any](a, b *Item[T]) bool {
	switch {
	case a.waiting != b.waiting:
		return a.waiting
	case a.waiting:
		return a.turns[waiting].before(b.turns[waiting])
	case a.expiration.IsZero() != b.expiration.IsZero():
		return b.expiration.IsZero()
	case !a.expiration.Equal(b.expiration):
		return a.expiration.Before(b.expiration)
	}
	return a.turns[prefetching].before(b.turns[prefetching])
}

func (q *queue[T]) empty() bool { return len(q.heap) == 0 }

// takeTurn gives i's fetch a turn of that kind, unless it has one.
func (q *queue[T]) takeTurn(i *Item[T], k kind, tenant string) {
	if i.turns[k] == (turn{}) {
		q.turns++
		i.turns[k] = turn{q.rounds[k].next(tenant), q.turns}
	}
}

func (q *queue[T]) push(i *Item[T]) { heap.Push(&q.heap, i) }

// fix restores the order after a change of i.
func (q *queue[T]) fix(i *Item[T]) {
	if i.queueIndex != none {
		heap.Fix(&q.heap, i.queueIndex)
	}
}

func (q *queue[T]) remove(i *Item[T]) {
	if i.queueIndex != none {
		heap.Remove(&q.heap, i.queueIndex)
		q.resetIfEmpty()
	}
}

// pop removes and returns the first item.
func (q *queue[T]) pop() *Item[T] {
	i := heap.Pop(&q.heap).(*Item[T])
	switch {
	case i.waiting:
		q.advance(waiting, i)
	case i.expiration.IsZero():
		q.advance(prefetching, i)
	}
	q.resetIfEmpty()
	return i
}

// advance notes that i's fetch begins.
func (q *queue[T]) advance(k kind, i *Item[T]) {
	q.rounds[k].current = max(q.rounds[k].current, i.turns[k].round)
}

// resetIfEmpty frees the memory of past tenants. Turns only compare queued fetches.
func (q *queue[T]) resetIfEmpty() {
	if q.empty() {
		q.rounds = [kinds]rounds{}
	}
}
