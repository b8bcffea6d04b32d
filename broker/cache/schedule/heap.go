package schedule

import "container/heap"

// dueHeap orders items by the time at which they are due.
type dueHeap[T any] []*Item[T]

func (h *dueHeap[T]) push(i *Item[T]) { heap.Push(h, i) }

func (h *dueHeap[T]) remove(i *Item[T]) {
	if i.dueIndex != none {
		heap.Remove(h, i.dueIndex)
	}
}

// Len, Less, Swap, Push and Pop implement [heap.Interface].

func (h dueHeap[T]) Len() int           { return len(h) }
func (h dueHeap[T]) Less(a, b int) bool { return h[a].at.Before(h[b].at) }
func (h dueHeap[T]) Swap(a, b int) {
	h[a], h[b] = h[b], h[a]
	h[a].dueIndex, h[b].dueIndex = a, b
}

func (h *dueHeap[T]) Push(x any) {
	i := x.(*Item[T])
	i.dueIndex = len(*h)
	*h = append(*h, i)
}

func (h *dueHeap[T]) Pop() any {
	i := removeLast((*[]*Item[T])(h))
	i.dueIndex = none
	return i
}

// queueHeap orders items as [less] does.
type queueHeap[T any] []*Item[T]

func (h queueHeap[T]) Len() int           { return len(h) }
func (h queueHeap[T]) Less(a, b int) bool { return less(h[a], h[b]) }
func (h queueHeap[T]) Swap(a, b int) {
	h[a], h[b] = h[b], h[a]
	h[a].queueIndex, h[b].queueIndex = a, b
}

func (h *queueHeap[T]) Push(x any) {
	i := x.(*Item[T])
	i.queueIndex = len(*h)
	*h = append(*h, i)
}

func (h *queueHeap[T]) Pop() any {
	i := removeLast((*[]*Item[T])(h))
	i.queueIndex = none
	return i
}

// removeLast removes and returns the last item.
func removeLast[T any](items *[]*Item[T]) *Item[T] {
	last := len(*items) - 1
	i := (*items)[last]
	(*items)[last] = nil // for the garbage collector
	*items = (*items)[:last]
	return i
}
