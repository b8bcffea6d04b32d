package schedule

import (
	"fmt"
	"maps"
)

// Forever is for tests.
const Forever = forever

// Check returns what is wrong with the schedule, whose items are those given.
func (s *Schedule[T]) Check(items []*Item[T]) error {
	planned, demand := map[slot]int{}, [64]int64{}
	due, queued := 0, 0
	for n, i := range items {
		if i.dueIndex != none {
			due++
			if i.dueIndex >= len(s.due) || s.due[i.dueIndex] != i {
				return fmt.Errorf("item %d is not at its index among the due ones", n)
			}
		}
		if i.queueIndex != none {
			queued++
			if i.queueIndex >= len(s.queue.heap) || s.queue.heap[i.queueIndex] != i {
				return fmt.Errorf("item %d is not at its index in the queue", n)
			}
			if parent := s.queue.heap[max(i.queueIndex-1, 0)/2]; less(i, parent) {
				return fmt.Errorf("item %d is queued behind one that comes after it", n)
			}
		}
		switch {
		case i.dueIndex != none && i.queueIndex != none:
			return fmt.Errorf("item %d is due and queued", n)
		case i.renewal.planned && i.dueIndex == none:
			return fmt.Errorf("the renewal of item %d is counted, but not due", n)
		}
		if i.renewal.planned {
			planned[i.renewal.slot]++
		}
		demand[i.renewal.octave] += i.renewal.share
	}
	switch {
	case due != len(s.due) || queued != len(s.queue.heap):
		return fmt.Errorf("%d items are due and %d queued, want %d and %d", len(s.due), len(s.queue.heap), due, queued)
	case queued == 0 && (len(s.queue.rounds[waiting].last) > 0 || len(s.queue.rounds[prefetching].last) > 0):
		return fmt.Errorf("an empty queue remembers tenants: %v", s.queue.rounds)
	case !maps.Equal(planned, s.renewals.planned):
		return fmt.Errorf("counted renewals %v, want %v", s.renewals.planned, planned)
	case demand != s.renewals.demand:
		return fmt.Errorf("demand %v, want %v", s.renewals.demand, demand)
	}
	return nil
}
