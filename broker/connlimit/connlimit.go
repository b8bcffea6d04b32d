// Package connlimit limits the connections of a server whose clients are unknown until it has read and authenticated a
// request.
//
// It guarantees:
//   - At most [Config.Max] connections of unknown clients are open. If there is one more, the address with the most
//     connections loses one: an idle one first, then one whose request has not arrived, the oldest first. So an address
//     gets all it needs while there is room, and otherwise at least as much as any other. If all addresses have equally
//     many, a connection has at least a second, and new ones wait. Addresses share the places to wait in the same way.
//   - A connection whose request does not arrive in time, or needs more bytes than a request may have, is closed.
//   - At most [Config.Handshakes] handshakes are computed at once, and addresses take turns. So the handshakes of one
//     address do not delay those of another.
//   - A connection of an authenticated caller is never closed for an unknown one. Authenticated connections have their
//     own limit, which tenants share in the same way.
//
// It knows neither TLS nor HTTP: the server reports the progress of each connection with the methods of [Conn].
// The addresses of an IPv6 network, those with the same first 64 bits, share what one IPv4 address has, because one machine
// can have all of them. They share it in the same way, because all pods of a node, or of many nodes, can be in one network.
package connlimit

import (
	"container/list"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Config configures [New].
type Config struct {
	// Max is how many connections of unknown clients may be open. Required.
	Max int
	// MaxAuthenticated is how many authenticated connections may be open beside them. Zero: none.
	MaxAuthenticated int
	// MaxPerCaller is how many authenticated connections one caller may have. Zero: no limit.
	MaxPerCaller int
	// MaxWaiting is how many connections may wait for room, beside Max. The server does not read from them, so they hold
	// little memory. Zero: none.
	MaxWaiting int
	// RequestTime is how long a connection may be open until its first request has arrived. Required.
	RequestTime time.Duration
	// IdleTime is how long a connection may be open between the response to a request and the arrival of the next
	// request. Zero: no limit.
	IdleTime time.Duration
	// Handshakes is how many handshakes may be computed at once. Zero: the listener has no handshakes.
	Handshakes int
	// HandshakeBytes is how many bytes may be read from a connection before [Conn.Handshaken]. Zero: no limit.
	HandshakeBytes int
	// RequestBytes is how many may be read after that, and after each [Conn.End]. Zero: no limit.
	RequestBytes int
	// SocketBuffer is how many bytes the kernel may buffer for a connection in each direction. The kernel counts them as
	// memory of the process's cgroup. Zero: the kernel's default, which grows to megabytes.
	SocketBuffer int
}

// Cause is why a Limiter closed a connection.
type Cause int

// The causes.
const (
	// Crowded: there were too many connections, and its address or tenant had the most.
	Crowded Cause = iota
	// Late: the request did not arrive in time.
	Late
	// Flood: the handshake or request had too many bytes.
	Flood
	causes
)

// String returns the cause as a label for metrics.
func (c Cause) String() string { return [...]string{"crowded", "late", "flood"}[c] }

// Causes returns all causes.
func Causes() []Cause { return []Cause{Crowded, Late, Flood} }

// Stats is the state of a Limiter at one moment.
type Stats struct {
	// Unauthenticated and Authenticated count open connections that the server has accepted.
	Unauthenticated, Authenticated int
	// Waiting counts open connections that wait for room.
	Waiting int
	// Closed counts the connections that the Limiter closed, by Cause.
	Closed [causes]uint64
}

// Limiter limits the connections of one or more listeners together. Make it with [New]. Its methods may be called
// concurrently.
type Limiter struct {
	cfg Config

	mu      sync.Mutex
	known   pool[string]   // :: tenant → authenticated connections; guarded by mu
	callers map[string]int // :: caller → number of its connections in known; guarded by mu
	unknown addresses      // guarded by mu
	waiting addresses      // that wait for room; guarded by mu
	turns   turns          // guarded by mu
	closed  [causes]uint64 // guarded by mu
	// leaving counts connections that the Limiter has closed and the server has not. They still hold memory. Guarded by mu.
	leaving int
	filling bool       // fillSoon has a timer; guarded by mu
	left    *sync.Cond // signals that leaving has decreased, or a listener has closed
}

// New returns a Limiter, or an error if cfg lacks a required field.
func New(cfg Config) (*Limiter, error) {
	if cfg.Max < 1 || cfg.RequestTime <= 0 {
		return nil, errors.New("limiting connections: Max and RequestTime must be positive")
	}
	l := &Limiter{cfg: cfg, callers: make(map[string]int)}
	l.left = sync.NewCond(&l.mu)
	l.turns.free = cfg.Handshakes
	return l, nil
}

// MaxOpen returns how many connections of unknown clients can hold memory at once if Config.Max is limit. It counts open
// connections, and those that the Limiter has closed but the server has not.
func MaxOpen(limit int) int { return limit + maxLeaving(limit) }

// maxLeaving returns how many connections the Limiter may have closed before the server closes them too. A server does so
// within microseconds if it has a processor. This bounds how far it may fall behind its clients.
func maxLeaving(limit int) int { return max(1, limit/8) }

// Stats returns the present state.
func (l *Limiter) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{Unauthenticated: l.unknown.total(), Authenticated: l.known.total, Waiting: l.waiting.total(), Closed: l.closed}
}

// unlimited is more bytes than any connection reads.
const unlimited = 1 << 62

func budget(bytes int) int64 {
	if bytes == 0 {
		return unlimited
	}
	return int64(bytes)
}

// end closes a connection that the server has not closed, and counts the cause. The caller holds l.mu.
func (l *Limiter) end(c *Conn, why Cause) {
	if c.stage == ended {
		return
	}
	if !c.waiting {
		c.leaving = true
		l.leaving++
	}
	l.closed[why]++
	l.remove(c)
	// Closing can take time, so it does not happen while mu is locked.
	go func() { _ = c.Conn.Close() }()
}

// remove forgets c and lets waiting connections in. The caller holds l.mu.
func (l *Limiter) remove(c *Conn) {
	c.late.Stop()
	switch {
	case c.waiting:
		l.waiting.remove(c)
	case c.known:
		l.known.remove(c.tenant, c)
		if l.callers[c.caller]--; l.callers[c.caller] == 0 {
			delete(l.callers, c.caller)
		}
	default:
		l.unknown.remove(c)
	}
	c.stage = ended
	l.turns.give(c)
	l.fill()
}

// move moves c to another stage. The caller holds l.mu.
func (l *Limiter) move(c *Conn, to stage) {
	if c.known {
		l.known.move(c.tenant, c, to)
	} else {
		l.unknown.move(c, to)
	}
}

// stage is the progress of a connection. Connections give way in this order.
type stage int

const (
	idle       stage = iota // the server has responded to its last request
	arriving                // its first request has not arrived
	responding              // the server is responding to its request
	ended
	stages = int(ended) // number of stages in a pool
)

// Conn is a connection that a Limiter counts. The server reports its progress: Handshaken once, then for each request
// Begin, perhaps Authenticated, and End.
type Conn struct {
	net.Conn
	limiter *Limiter
	from    *listener
	address netip.Addr
	since   time.Time // when it was accepted or entered its stage; guarded by limiter.mu

	handshaking atomic.Bool
	bytes       atomic.Int64 // how many bytes may still be read

	// The following fields are guarded by limiter.mu.
	stage   stage
	waiting bool   // it is in the pool of waiting connections, and the server has not accepted it
	known   bool   // it is in the pool of authenticated connections
	tenant  string // set while known
	caller  string // set while known
	element *list.Element
	late    *time.Timer
	turn    *turn // its turn to compute a handshake, or its place in the queue; nil: neither
	leaving bool  // the Limiter has closed it, and the server has not
}

// Read implements net.Conn. Before Handshaken, it returns data only when it is the connection's turn to compute. It
// fails if the connection sends too many bytes.
func (c *Conn) Read(b []byte) (int, error) {
	handshaking := c.handshaking.Load()
	if handshaking {
		c.endTurn() // the server has processed the previous data
	}
	remaining := c.bytes.Load()
	if remaining <= 0 {
		c.limiter.mu.Lock()
		c.limiter.end(c, Flood)
		c.limiter.mu.Unlock()
		return 0, errFlood
	}
	n, err := c.Conn.Read(b[:min(int64(len(b)), remaining)])
	c.bytes.Add(-int64(n))
	if n > 0 && handshaking && !c.takeTurn() {
		return 0, net.ErrClosed
	}
	return n, err //nolint:wrapcheck // Servers check the type.
}

var errFlood = errors.New("the client has sent more bytes than a request may have")

// Close implements net.Conn.
func (c *Conn) Close() error {
	l := c.limiter
	l.mu.Lock()
	switch {
	case c.stage != ended:
		l.remove(c)
	case c.leaving:
		c.leaving = false
		l.leaving--
		l.left.Broadcast()
		l.fill()
	}
	l.mu.Unlock()
	return c.Conn.Close() //nolint:wrapcheck // A wrapper adds nothing.
}

// Handshaken reports that the handshake is complete. Further calls have no effect.
func (c *Conn) Handshaken() {
	if c.handshaking.Load() {
		c.handshaking.Store(false)
		c.endTurn()
	}
	c.reset()
}

// reset permits the bytes of one more request.
func (c *Conn) reset() {
	if n := budget(c.limiter.cfg.RequestBytes); c.bytes.Load() != n {
		c.bytes.Store(n)
	}
}

// Begin reports that a whole request has arrived. From now on the server takes the time, not the client.
func (c *Conn) Begin() {
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.stage == idle || c.stage == arriving {
		c.late.Stop()
		c.since = time.Now()
		l.move(c, responding)
	}
}

// Authenticated reports that the current request is from that caller, of that tenant. The connection counts as
// authenticated from now on. The result is false if there is no room: then the connection remains unknown, and the server
// should refuse the request.
func (c *Conn) Authenticated(tenant, caller string) bool {
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case c.stage != responding:
		return false // there is no request, or the connection is closed
	case c.known:
		return true
	case l.cfg.MaxPerCaller > 0 && l.callers[caller] >= l.cfg.MaxPerCaller:
		return false
	}
	var victim *Conn
	if l.known.total >= l.cfg.MaxAuthenticated {
		if victim = l.known.giveWay(tenant); victim == nil {
			return false
		}
	}
	l.unknown.remove(c)
	c.known, c.tenant, c.caller = true, tenant, caller
	l.callers[caller]++
	l.known.add(tenant, c, responding)
	if victim != nil {
		l.end(victim, Crowded)
	}
	l.fill()
	return true
}

// End reports that the server has responded to the request, even if it has not read all of it.
func (c *Conn) End() {
	c.reset()
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.stage != responding && c.stage != arriving {
		return
	}
	c.late.Stop()
	c.since = time.Now()
	l.move(c, idle)
	if l.cfg.IdleTime > 0 {
		c.late.Reset(l.cfg.IdleTime)
	}
}

// linger is how long an idle connection keeps its place when others wait for it, so that its response can leave.
const linger = 100 * time.Millisecond

// fillSoon lets waiting connections in as soon as others give way, not only when one closes. The caller holds l.mu.
func (l *Limiter) fillSoon() {
	if l.filling {
		return
	}
	l.filling = true
	time.AfterFunc(linger, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.filling = false
		if l.fill(); l.waiting.total() > 0 {
			l.fillSoon()
		}
	})
}

// arrive reports that part of the next request has arrived. So an idle connection is no longer idle.
func (c *Conn) arrive() {
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.stage != idle {
		return
	}
	c.since = time.Now()
	c.late.Reset(l.cfg.RequestTime)
	l.move(c, arriving)
}

// closeLate closes a connection whose request has not arrived in time.
func (c *Conn) closeLate() {
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.stage == idle || c.stage == arriving {
		l.end(c, Late)
	}
}
