package cache

import "time"

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

// queueHeap orders entries that wait for their fetch: those whose callers have nothing to go on with,
// first come first served; then those whose session expires first; then those that are fetched ahead
// of any need.
type queueHeap[K comparable] []*entry[K]

func (h queueHeap[K]) Len() int { return len(h) }

func (h queueHeap[K]) Less(i, j int) bool {
	a, b := h[i].flight.waitedFor(), h[j].flight.waitedFor()
	switch {
	case a && b:
		return h[i].flight.since.Before(h[j].flight.since)
	case a || b:
		return a
	}
	return expiry(h[i]).Before(expiry(h[j]))
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
