package trust

import (
	"slices"
	"sync"
)

// priorityQueue is the storage of a workqueue. Urgent items leave it before normal ones. The workqueue guarantees that no item is
// in it twice. Items are normal unless setUrgent was called for them since they last left.
type priorityQueue struct {
	mu          sync.Mutex
	urgent      map[string]bool // guarded by mu
	first, last []string        // the urgent and the normal items; guarded by mu
}

func newPriorityQueue() *priorityQueue { return &priorityQueue{urgent: make(map[string]bool)} }

// setUrgent makes the next Push or Touch of an item urgent.
func (q *priorityQueue) setUrgent(item string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.urgent[item] = true
}

// Push adds an item that is not in the queue.
func (q *priorityQueue) Push(item string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.urgent[item] {
		q.first = append(q.first, item)
	} else {
		q.last = append(q.last, item)
	}
}

// Touch makes a normal item urgent that was added again after setUrgent.
func (q *priorityQueue) Touch(item string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.urgent[item] {
		return
	}
	if i := slices.Index(q.last, item); i >= 0 {
		q.last = slices.Delete(q.last, i, i+1)
		q.first = append(q.first, item)
	}
}

// Len returns the number of items.
func (q *priorityQueue) Len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.first) + len(q.last)
}

// Pop removes and returns the next item. The queue must not be empty.
func (q *priorityQueue) Pop() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	items := &q.first
	if len(q.first) == 0 {
		items = &q.last
	}
	item := (*items)[0]
	(*items)[0] = ""
	*items = (*items)[1:]
	delete(q.urgent, item)
	return item
}
