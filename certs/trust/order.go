package trust

import (
	"slices"
	"sync"
)

// order is the storage of a workqueue with two lines: who is in the second waits until the first is empty.
// The workqueue sees to it that nobody waits twice. What is added goes into the second line, unless hurry
// was called for it since it last left.
type order struct {
	mu          sync.Mutex
	urgent      map[string]bool // guarded by mu
	first, last []string        // guarded by mu
}

func newOrder() *order { return &order{urgent: make(map[string]bool)} }

// hurry is called before an item is added.
func (o *order) hurry(item string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.urgent[item] = true
}

// Push puts an item into its line.
func (o *order) Push(item string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.urgent[item] {
		o.first = append(o.first, item)
	} else {
		o.last = append(o.last, item)
	}
}

// Touch moves an item forward that was added again with more hurry.
func (o *order) Touch(item string) {
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
func (o *order) Len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.first) + len(o.last)
}

// Pop takes the next. It is called only while somebody waits.
func (o *order) Pop() string {
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
