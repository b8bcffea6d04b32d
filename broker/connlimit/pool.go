package connlimit

import (
	"container/list"
	"time"
)

// patience is how long a connection is left to itself while its address holds no more than others. A request arrives
// within milliseconds, and takes longer only where processors are short: its own, or the server's.
const patience = time.Second

// pool has connections by holder, an address or a tenant, and finds the holder of the most in constant time. Its zero
// value is empty. It is guarded by Limiter.mu.
type pool[K comparable] struct {
	total   int
	holders map[K]*holder[K]
	// byCount[n] has the holders of n connections, of which the first has held as many for the longest; nil: none.
	byCount []*list.List
}

type holder[K comparable] struct {
	key     K
	count   int
	stages  [stages]list.List // of *Conn, the oldest first
	element *list.Element     // in byCount
}

// add adds c to what key holds.
func (p *pool[K]) add(key K, c *Conn, at stage) {
	h := p.holders[key]
	if h == nil {
		if p.holders == nil {
			p.holders = make(map[K]*holder[K])
		}
		h = &holder[K]{key: key}
		p.holders[key] = h
	}
	c.stage, c.element = at, h.stages[at].PushBack(c)
	p.count(h, 1)
}

// remove takes c, which key holds, out.
func (p *pool[K]) remove(key K, c *Conn) {
	h := p.holders[key]
	h.stages[c.stage].Remove(c.element)
	c.element = nil
	p.count(h, -1)
	if h.count == 0 {
		delete(p.holders, key)
	}
}

// move puts c, which key holds, behind those that came to a stage earlier.
func (p *pool[K]) move(key K, c *Conn, to stage) {
	h := p.holders[key]
	h.stages[c.stage].Remove(c.element)
	c.stage, c.element = to, h.stages[to].PushBack(c)
}

// count changes how many h holds.
func (p *pool[K]) count(h *holder[K], by int) {
	if h.element != nil {
		p.byCount[h.count].Remove(h.element)
		h.element = nil
	}
	p.total += by
	h.count += by
	if h.count == 0 {
		for n := len(p.byCount) - 1; n >= 0 && (p.byCount[n] == nil || p.byCount[n].Len() == 0); n-- {
			p.byCount = p.byCount[:n]
		}
		return
	}
	for len(p.byCount) <= h.count {
		p.byCount = append(p.byCount, nil)
	}
	if p.byCount[h.count] == nil {
		p.byCount[h.count] = list.New()
	}
	h.element = p.byCount[h.count].PushBack(h)
	for n := len(p.byCount) - 1; p.byCount[n] == nil || p.byCount[n].Len() == 0; n-- {
		p.byCount = p.byCount[:n]
	}
}

// most returns who holds the most; nil if nobody holds anything.
func (p *pool[K]) most() *holder[K] {
	if len(p.byCount) == 0 {
		return nil
	}
	return p.byCount[len(p.byCount)-1].Front().Value.(*holder[K]) //nolint:forcetypeassert // Nothing else is in it.
}

// held returns how many key holds.
func (p *pool[K]) held(key K) int {
	if h := p.holders[key]; h != nil {
		return h.count
	}
	return 0
}

// victim returns the connection that gives way at that time to one more of key; nil if none does. It is a connection of the
// key that holds the most: an idle one, or else one whose request has not arrived, or else one that has
// been answered for the time of patience; of each the oldest. So a server that answers in milliseconds breaks off no answer.
//
// If key would hold as much itself, nobody has too much: then no answer is broken off, responses have time to leave, and a
// request that arrives has the time of patience, or all time if equal is false. Otherwise those who come faster than they can be served would keep all
// others from being served.
func (p *pool[K]) victim(key K, now time.Time, equal bool) *Conn {
	h := p.most()
	if own := p.holders[key]; own != nil && own.count == h.count {
		h = own // with one more, it is the one that holds the most
	}
	fair := h.count <= p.held(key)+1
	for at := range h.stages {
		e := h.stages[at].Front()
		if e == nil {
			continue
		}
		c := e.Value.(*Conn) //nolint:forcetypeassert // Nothing else is in it.
		age, gives := now.Sub(c.since), false
		switch stage(at) {
		case idle:
			gives = !fair || age >= linger
		case arriving:
			gives = !fair || equal && age >= patience
		case answering, ended:
			gives = !fair && age >= patience
		}
		if gives {
			return c
		}
		return nil
	}
	return nil
}

// newest returns the last connection to come of the key that holds the most.
func (p *pool[K]) newest() *Conn {
	return p.most().stages[arriving].Back().Value.(*Conn) //nolint:forcetypeassert // Nothing else is in it.
}

// least returns the first to come of the key that holds the least elsewhere.
func (p *pool[K]) least(elsewhere func(K) int) *Conn {
	var best *holder[K]
	fewest := 0
	for key, h := range p.holders {
		if n := elsewhere(key); best == nil || n < fewest {
			best, fewest = h, n
		}
	}
	return best.stages[arriving].Front().Value.(*Conn) //nolint:forcetypeassert // Nothing else is in it.
}

// all returns the connections that are wanted.
func (p *pool[K]) all(want func(*Conn) bool) (found []*Conn) {
	for _, h := range p.holders {
		for at := range h.stages {
			for e := h.stages[at].Front(); e != nil; e = e.Next() {
				if c := e.Value.(*Conn); want(c) { //nolint:forcetypeassert // Nothing else is in it.
					found = append(found, c)
				}
			}
		}
	}
	return found
}

// giveWay returns the connection that gives way to one more of key; nil if none does. It is a connection of the key that holds
// the most: the oldest idle one, or else the one whose request came last. A request gives way only if that key holds more
// than key would.
func (p *pool[K]) giveWay(key K) *Conn {
	h := p.most()
	if h == nil || h.count <= p.held(key)+1 && h.stages[idle].Len() == 0 {
		return nil
	}
	if first := h.stages[idle].Front(); first != nil {
		return first.Value.(*Conn) //nolint:forcetypeassert // Nothing else is in it.
	}
	return h.stages[answering].Back().Value.(*Conn) //nolint:forcetypeassert // Nothing else is in it.
}
