package connlimit

import (
	"container/list"
	"net/netip"
)

// turns lets few connections compute at once: addresses one after the other, and of each address those that have waited
// longest. It is guarded by Limiter.mu.
type turns struct {
	free   int
	queues map[netip.Prefix]*queue // of addresses with connections that wait
	order  list.List               // of *queue; the first is next
}

// queue is what of one address waits.
type queue struct {
	address netip.Prefix
	waiting list.List // of *turn
	element *list.Element
}

// turn is that of one connection.
type turn struct {
	over    chan struct{} // closed when the waiting is over
	has     bool          // it may compute
	queue   *queue        // while it waits
	element *list.Element
}

// takeTurn waits until c may compute. It reports whether it may: not if c was closed meanwhile.
func (c *Conn) takeTurn() bool {
	l := c.limiter
	l.mu.Lock()
	if c.stage == ended {
		l.mu.Unlock()
		return false
	}
	t := &turn{over: make(chan struct{})}
	c.turn = t
	if l.turns.free > 0 {
		l.turns.free--
		t.has = true
		l.mu.Unlock()
		return true
	}
	l.turns.push(c.address, t)
	l.mu.Unlock()
	<-t.over
	l.mu.Lock()
	defer l.mu.Unlock()
	return t.has
}

// endTurn gives back the turn of c, if it has one.
func (c *Conn) endTurn() {
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.limiter.turns.give(c)
}

func (s *turns) push(address netip.Prefix, t *turn) {
	q := s.queues[address]
	if q == nil {
		if s.queues == nil {
			s.queues = make(map[netip.Prefix]*queue)
		}
		q = &queue{address: address}
		q.element = s.order.PushBack(q)
		s.queues[address] = q
	}
	t.queue, t.element = q, q.waiting.PushBack(t)
}

// pull ends the waiting of t.
func (s *turns) pull(t *turn) {
	q := t.queue
	q.waiting.Remove(t.element)
	t.queue, t.element = nil, nil
	if q.waiting.Len() == 0 {
		s.order.Remove(q.element)
		delete(s.queues, q.address)
	}
	close(t.over)
}

// give takes from c its turn, or its place among those that wait, and lets the next compute.
func (s *turns) give(c *Conn) {
	t := c.turn
	switch {
	case t == nil:
		return
	case t.queue != nil:
		s.pull(t)
	case t.has:
		t.has = false
		s.free++
	}
	c.turn = nil
	for s.free > 0 && s.order.Len() > 0 {
		q := s.order.Front().Value.(*queue)     //nolint:forcetypeassert // Nothing else is in it.
		next := q.waiting.Front().Value.(*turn) //nolint:forcetypeassert // Nothing else is in it.
		s.order.MoveToBack(q.element)
		s.free--
		next.has = true
		s.pull(next)
	}
}
