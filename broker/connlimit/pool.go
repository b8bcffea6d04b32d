package connlimit

import (
	"container/list"
	"slices"
	"time"
)

// minAge is how long a connection is safe if its address has no more connections than others. A request arrives within
// milliseconds, unless the client or the server lacks processors.
const minAge = time.Second

// pool has connections by holder, an address or a tenant. It finds the holder with the most connections in constant time.
// The zero value is empty. Limiter.mu guards it.
type pool[K comparable] struct {
	total   int
	holders map[K]*holder[K]
	// byCount[n] lists the holders of n connections. The first has had n for the longest time. Nil: none.
	byCount []*list.List
}

type holder[K comparable] struct {
	key     K
	count   int
	stages  [stages]list.List // of *Conn, the oldest first
	element *list.Element     // in byCount
}

// add adds c to the connections of key.
func (p *pool[K]) add(key K, c *Conn, at stage) {
	h := p.grow(key)
	c.stage, c.element = at, h.stages[at].PushBack(c)
}

// grow counts one more connection of key.
func (p *pool[K]) grow(key K) *holder[K] {
	h := p.holders[key]
	if h == nil {
		if p.holders == nil {
			p.holders = make(map[K]*holder[K])
		}
		h = &holder[K]{key: key}
		p.holders[key] = h
	}
	p.change(h, 1)
	return h
}

// remove removes c from the connections of key.
func (p *pool[K]) remove(key K, c *Conn) {
	p.holders[key].stages[c.stage].Remove(c.element)
	c.element = nil
	p.shrink(key)
}

// shrink counts one connection of key less.
func (p *pool[K]) shrink(key K) {
	h := p.holders[key]
	p.change(h, -1)
	if h.count == 0 {
		delete(p.holders, key)
	}
}

// move moves c, a connection of key, to the end of a stage.
func (p *pool[K]) move(key K, c *Conn, to stage) {
	h := p.holders[key]
	h.stages[c.stage].Remove(c.element)
	c.stage, c.element = to, h.stages[to].PushBack(c)
}

// change changes the number of connections of h.
func (p *pool[K]) change(h *holder[K], by int) {
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

// largest returns the holder with the most connections; nil if there is none.
func (p *pool[K]) largest() *holder[K] {
	if len(p.byCount) == 0 {
		return nil
	}
	return p.byCount[len(p.byCount)-1].Front().Value.(*holder[K]) //nolint:forcetypeassert // It contains nothing else.
}

// count returns the number of connections of key.
func (p *pool[K]) count(key K) int {
	if h := p.holders[key]; h != nil {
		return h.count
	}
	return 0
}

// victim returns the connection that gives way to a new one of key at that time; nil if none does. It is a connection of
// the largest holder: an idle one; otherwise one whose request has not arrived; otherwise one to which the server has been
// responding for minAge. In each stage it is the oldest. So a server that responds in milliseconds never loses a response.
//
// If key would then have as many connections, no holder has too many. Then no response is lost, responses have time to
// leave, and a request may take minAge to arrive, or any time if equal is false. Without minAge, clients that connect
// faster than the server can serve them would keep all others from being served.
func (p *pool[K]) victim(key K, now time.Time, equal bool) *Conn {
	h := p.largestFor(key)
	return h.victim(h.count <= p.count(key)+1, now, equal)
}

// largestFor returns the holder with the most connections. If key has as many, it returns that of key, because key would
// have one more.
func (p *pool[K]) largestFor(key K) *holder[K] {
	h := p.largest()
	if own := p.holders[key]; own != nil && own.count == h.count {
		return own
	}
	return h
}

// victim returns the connection of h that gives way. fair reports whether h has no more than it may have.
func (h *holder[K]) victim(fair bool, now time.Time, equal bool) *Conn {
	for at := range h.stages {
		e := h.stages[at].Front()
		if e == nil {
			continue
		}
		c := e.Value.(*Conn) //nolint:forcetypeassert // It contains nothing else.
		age, gives := now.Sub(c.since), false
		switch stage(at) {
		case idle:
			gives = !fair || age >= linger
		case arriving:
			gives = !fair || equal && age >= minAge
		case responding, ended:
			gives = !fair && age >= minAge
		}
		if gives {
			return c
		}
		return nil
	}
	return nil
}

// anyVictim returns the connection that gives way of the largest holder that has one; nil if none has.
func (p *pool[K]) anyVictim(fair bool, now time.Time, equal bool) *Conn {
	for _, holders := range slices.Backward(p.byCount) {
		if holders == nil {
			continue
		}
		for e := holders.Front(); e != nil; e = e.Next() {
			if c := e.Value.(*holder[K]).victim(fair, now, equal); c != nil { //nolint:forcetypeassert // It contains nothing else.
				return c
			}
		}
	}
	return nil
}

// newest returns the newest connection of the largest holder.
func (p *pool[K]) newest() *Conn {
	return p.largest().stages[arriving].Back().Value.(*Conn) //nolint:forcetypeassert // It contains nothing else.
}

// least returns the holder with the fewest connections elsewhere.
func (p *pool[K]) least(elsewhere func(K) int) *holder[K] {
	var best *holder[K]
	fewest := 0
	for key, h := range p.holders {
		if n := elsewhere(key); best == nil || n < fewest {
			best, fewest = h, n
		}
	}
	return best
}

// oldest returns the oldest connection whose request has not arrived.
func (h *holder[K]) oldest() *Conn {
	return h.stages[arriving].Front().Value.(*Conn) //nolint:forcetypeassert // It contains nothing else.
}

// all returns the connections that match.
func (p *pool[K]) all(match func(*Conn) bool) (found []*Conn) {
	for _, h := range p.holders {
		for at := range h.stages {
			for e := h.stages[at].Front(); e != nil; e = e.Next() {
				if c := e.Value.(*Conn); match(c) { //nolint:forcetypeassert // It contains nothing else.
					found = append(found, c)
				}
			}
		}
	}
	return found
}

// giveWay returns the connection that gives way to a new one of key; nil if none does. It is a connection of the largest
// holder: the oldest idle one, otherwise the one whose request came last. A request gives way only if the largest holder
// has more connections than key would have.
func (p *pool[K]) giveWay(key K) *Conn {
	h := p.largest()
	if h == nil || h.count <= p.count(key)+1 && h.stages[idle].Len() == 0 {
		return nil
	}
	if first := h.stages[idle].Front(); first != nil {
		return first.Value.(*Conn) //nolint:forcetypeassert // It contains nothing else.
	}
	return h.stages[responding].Back().Value.(*Conn) //nolint:forcetypeassert // It contains nothing else.
}
