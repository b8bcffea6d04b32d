package connlimit

import (
	"container/list"
	"net/netip"
)

// turns limits how many connections compute a handshake at once. Networks take turns, and in each network its addresses.
// The connections of one address take theirs in the order of arrival. Limiter.mu guards it.
type turns struct {
	free  int
	lanes map[netip.Prefix]*lane // of networks with waiting connections
	order list.List              // of *lane; the first is next
}

// lane has the addresses of one network with waiting connections.
type lane struct {
	network netip.Prefix
	queues  map[netip.Addr]*queue
	order   list.List // of *queue; the first is next
	element *list.Element
}

// queue has the waiting connections of one address.
type queue struct {
	lane    *lane
	address netip.Addr
	waiting list.List // of *turn
	element *list.Element
}

// turn belongs to one connection. It is waiting or active.
type turn struct {
	decided chan struct{} // closed when the connection no longer waits
	active  bool          // the connection may compute
	queue   *queue        // nil unless it waits
	element *list.Element
}

// takeTurn waits until c may compute. It returns false if c was closed first.
func (c *Conn) takeTurn() bool {
	l := c.limiter
	l.mu.Lock()
	if c.stage == ended {
		l.mu.Unlock()
		return false
	}
	t := &turn{decided: make(chan struct{})}
	c.turn = t
	if l.turns.free > 0 {
		l.turns.free--
		t.active = true
		l.mu.Unlock()
		return true
	}
	l.turns.push(c.address, t)
	l.mu.Unlock()
	<-t.decided
	l.mu.Lock()
	defer l.mu.Unlock()
	return t.active
}

// endTurn ends the turn of c, if it has one.
func (c *Conn) endTurn() {
	c.limiter.mu.Lock()
	defer c.limiter.mu.Unlock()
	c.limiter.turns.give(c)
}

func (s *turns) push(address netip.Addr, t *turn) {
	network := networkOf(address)
	n := s.lanes[network]
	if n == nil {
		if s.lanes == nil {
			s.lanes = make(map[netip.Prefix]*lane)
		}
		n = &lane{network: network, queues: make(map[netip.Addr]*queue)}
		n.element = s.order.PushBack(n)
		s.lanes[network] = n
	}
	q := n.queues[address]
	if q == nil {
		q = &queue{lane: n, address: address}
		q.element = n.order.PushBack(q)
		n.queues[address] = q
	}
	t.queue, t.element = q, q.waiting.PushBack(t)
}

// pull takes t out of its queue.
func (s *turns) pull(t *turn) {
	q := t.queue
	q.waiting.Remove(t.element)
	t.queue, t.element = nil, nil
	if n := q.lane; q.waiting.Len() == 0 {
		n.order.Remove(q.element)
		delete(n.queues, q.address)
		if n.order.Len() == 0 {
			s.order.Remove(n.element)
			delete(s.lanes, n.network)
		}
	}
	close(t.decided)
}

// give ends the turn of c, or takes c out of its queue, and lets the next connections compute.
func (s *turns) give(c *Conn) {
	t := c.turn
	switch {
	case t == nil:
		return
	case t.queue != nil:
		s.pull(t)
	case t.active:
		t.active = false
		s.free++
	}
	c.turn = nil
	for s.free > 0 && s.order.Len() > 0 {
		n := s.order.Front().Value.(*lane)      //nolint:forcetypeassert // It contains nothing else.
		q := n.order.Front().Value.(*queue)     //nolint:forcetypeassert // It contains nothing else.
		next := q.waiting.Front().Value.(*turn) //nolint:forcetypeassert // It contains nothing else.
		s.order.MoveToBack(n.element)
		n.order.MoveToBack(q.element)
		s.free--
		next.active = true
		s.pull(next)
	}
}
