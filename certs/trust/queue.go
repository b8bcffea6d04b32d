package trust

import (
	"slices"
	"sync"
)

// priorityQueue is the storage of a workqueue with two lines: who is in the second waits until the first is empty.
// The workqueue sees to it that nobody waits twice. What is added goes into the second line, unless setUrgent
// was called for it since it last left.
type priorityQueue struct {
	mu          sync.Mutex
	urgent      map[string]bool // guarded by mu
	first, last []string        // guarded by mu
}

func newPriorityQueue() *priorityQueue { return &priorityQueue{urgent: make(map[string]bool)} }

// setUrgent is called before an item is added.
func (o *priorityQueue) setUrgent(item string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.urgent[item] = true
}

// Push puts an item into its line.
func (o *priorityQueue) Push(item string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.urgent[item] {
		o.first = append(o.first, item)
	} else {
		o.last = append(o.last, item)
	}
}

// Touch moves an item forward that was added again with more hurry.
func (o *priorityQueue) Touch(item string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.urgent[item] {
		return
	}
	if i := slices.Index(o.last, item); i >= 0 {
		o.last = slices.Delete(o.last, i, i+1)
		o.first = append(o.first, item)
	}
}

// Len counts who waits.
func (o *priorityQueue) Len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.first) + len(o.last)
}

// Pop takes the next. It is called only while somebody waits.
func (o *priorityQueue) Pop() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	line := &o.first
	if len(o.first) == 0 {
		line = &o.last
	}
	item := (*line)[0]
	(*line)[0] = ""
	*line = (*line)[1:]
	delete(o.urgent, item)
	return item
}
