// Package connlimit bounds the connections of a server, whose peers are unknown until a request of theirs has been
// read and believed.
//
// It promises that
//   - at most [Config.Max] connections of unknown peers are open. If there is one more, the address that holds the most
//     of them loses one: first one that is idle, then one whose request has not arrived, the oldest first. So an
//     address gets all that it needs while there is room, and otherwise at least as much as any other. Among equals, a
//     connection has at least a second, and newcomers wait, up to a limit that addresses share in the same way;
//   - a connection whose request does not arrive in time, or needs more bytes than a request can, is closed;
//   - no more handshakes are computed at once than there are processors for them, and addresses take turns, so that
//     the handshakes of one address do not delay those of another;
//   - connections of callers that the server has authenticated never give way to unknown ones. They have a limit of
//     their own, which is shared by tenants in the same way.
//
// It knows neither TLS nor HTTP: the server says how far each connection has come, with the methods of [Conn].
// An address is an IPv4 address, or the first 64 bits of an IPv6 address, of which one machine has all others.
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
	// Max is how many connections may be open whose callers are not authenticated. Required.
	Max int
	// MaxAuthenticated is how many may be open beside them that are. Zero: none.
	MaxAuthenticated int
	// MaxPerCaller is how many authenticated connections one caller may have. Zero: all.
	MaxPerCaller int
	// MaxWaiting is how many connections may wait for room, beside those of Max. Nothing is read from them, so that they
	// hold little memory. Zero: none.
	MaxWaiting int
	// RequestTime is how long a connection may be open until its first request has arrived. Required.
	RequestTime time.Duration
	// IdleTime is how long a connection may be open after a request was answered until the next has arrived. Zero: as
	// long as the server likes.
	IdleTime time.Duration
	// Handshakes is how many handshakes may be computed at once. Zero: there are none on this listener.
	Handshakes int
	// HandshakeBytes is how much may be read from a connection until [Conn.Handshaken]. Zero: any amount.
	HandshakeBytes int
	// RequestBytes is how much may be read from then on, and again after each [Conn.End]. Zero: any amount.
	RequestBytes int
	// SocketBuffer is how much the kernel may keep of a connection in each direction, in bytes. Zero: its own default,
	// which grows to megabytes. The kernel counts it as memory of the process's cgroup.
	SocketBuffer int
}

// Cause is why a connection was closed that its server and its peer would have kept.
type Cause int

// The causes.
const (
	// Crowded: there were too many, and its address or tenant held the most.
	Crowded Cause = iota
	// Late: its request did not arrive in time.
	Late
	// Flood: its handshake or request had too many bytes.
	Flood
	causes
)

// String returns a word for metrics.
func (c Cause) String() string { return [...]string{"crowded", "late", "flood"}[c] }

// Causes returns all causes.
func Causes() []Cause { return []Cause{Crowded, Late, Flood} }

// Stats are the state at one moment.
type Stats struct {
	// Unauthenticated and Authenticated connections are open.
	Unauthenticated, Authenticated int
	// Waiting connections are open, and their server has not seen them.
	Waiting int
	// Closed counts the connections that were closed, by Cause.
	Closed [causes]uint64
}

// Limiter bounds the connections of one or more listeners together. Make it with [New]. Its methods may be called
// concurrently.
type Limiter struct {
	cfg Config

	mu      sync.Mutex
	known   pool[string]       // :: tenant → connections; guarded by mu
	callers map[string]int     // :: caller → how many of known are its; guarded by mu
	unknown pool[netip.Prefix] // :: address → connections; guarded by mu
	waiting pool[netip.Prefix] // :: address → connections for which there is no room; guarded by mu
	turns   turns              // guarded by mu
	closed  [causes]uint64     // guarded by mu
	// leaving counts connections that were closed here, and whose servers have not let go of them: they still hold
	// memory. guarded by mu
	leaving int
	filling bool       // fillSoon has begun; guarded by mu
	left    *sync.Cond // leaving has become smaller, or a listener has been closed
}

// New checks cfg.
func New(cfg Config) (*Limiter, error) {
	if cfg.Max < 1 || cfg.RequestTime <= 0 {
		return nil, errors.New("limiting connections: Max and RequestTime must be positive")
	}
	l := &Limiter{cfg: cfg, callers: make(map[string]int)}
	l.left = sync.NewCond(&l.mu)
	l.turns.free = cfg.Handshakes
	return l, nil
}

// MaxOpen returns how many connections of unknown peers can hold memory at once if Config.Max is limit: those that may be
// open, and those that were closed for others and whose servers are about to let go of them.
func MaxOpen(limit int) int { return limit + maxLeaving(limit) }

// maxLeaving is how many connections may be closed and not yet let go of. A server lets go within microseconds, if it has
// a processor: it is a bound on how far it may fall behind those who connect.
func maxLeaving(limit int) int { return max(1, limit/8) }

// Stats returns the present state.
func (l *Limiter) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{Unauthenticated: l.unknown.total, Authenticated: l.known.total, Waiting: l.waiting.total, Closed: l.closed}
}

// unlimited is more than any connection reads.
const unlimited = 1 << 62

func budget(bytes int) int64 {
	if bytes == 0 {
		return unlimited
	}
	return int64(bytes)
}

// addressOf returns the address that addr counts for. All that have no IP count for one.
func addressOf(addr net.Addr) netip.Prefix {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	prefix, _ := ip.Prefix(bits)
	return prefix
}

// end closes a connection that its server has not closed, and counts why. l.mu is held.
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
	// It must not be closed under the lock of all, for a connection may take its time.
	go func() { _ = c.Conn.Close() }()
}

// remove forgets c, and lets in those that have waited for its place. l.mu is held.
func (l *Limiter) remove(c *Conn) {
	c.late.Stop()
	switch {
	case c.waiting:
		l.waiting.remove(c.address, c)
	case c.known:
		l.known.remove(c.tenant, c)
		if l.callers[c.caller]--; l.callers[c.caller] == 0 {
			delete(l.callers, c.caller)
		}
	default:
		l.unknown.remove(c.address, c)
	}
	c.stage = ended
	l.turns.give(c)
	l.fill()
}

// move puts c into another stage. l.mu is held.
func (l *Limiter) move(c *Conn, to stage) {
	if c.known {
		l.known.move(c.tenant, c, to)
	} else {
		l.unknown.move(c.address, c, to)
	}
}

// stage is how far a connection has come. In this order they give way to others.
type stage int

const (
	idle      stage = iota // its last request was answered
	arriving               // its first request has not arrived
	answering              // its request is being answered
	ended
	stages = int(ended) // how many there are in a pool
)

// Conn is a connection that is counted.
//
// The server reports how far it has come: Handshaken, then for each request Begin, perhaps Authenticated, and End.
type Conn struct {
	net.Conn
	limiter *Limiter
	from    *listener
	address netip.Prefix
	since   time.Time // it was accepted, or came to its stage; guarded by limiter.mu

	handshaking atomic.Bool
	bytes       atomic.Int64 // that may still be read

	// All below are guarded by limiter.mu.
	stage   stage
	waiting bool   // it is in the pool of waiting connections; its server has not seen it
	known   bool   // it is in the pool of authenticated connections
	tenant  string // while known
	caller  string // while known
	element *list.Element
	late    *time.Timer
	turn    *turn // nil: it neither has one nor waits
	leaving bool  // closed here, and not by the server
}

// Read implements net.Conn. Of what arrives before Handshaken it lets the caller compute in turns, and it fails once
// there are too many bytes.
func (c *Conn) Read(b []byte) (int, error) {
	handshaking := c.handshaking.Load()
	if handshaking {
		c.endTurn() // what had arrived has been dealt with
	}
	left := c.bytes.Load()
	if left <= 0 {
		c.limiter.mu.Lock()
		c.limiter.end(c, Flood)
		c.limiter.mu.Unlock()
		return 0, errFlood
	}
	n, err := c.Conn.Read(b[:min(int64(len(b)), left)])
	c.bytes.Add(-int64(n))
	if n > 0 && handshaking && !c.takeTurn() {
		return 0, net.ErrClosed
	}
	return n, err //nolint:wrapcheck // Servers look at the type.
}

var errFlood = errors.New("the peer has sent more than a request can have")

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
	return c.Conn.Close() //nolint:wrapcheck // It adds nothing.
}

// Handshaken says that the handshake is done. Further calls do nothing.
func (c *Conn) Handshaken() {
	if c.handshaking.Load() {
		c.handshaking.Store(false)
		c.endTurn()
	}
	c.reset()
}

// reset makes room for the bytes of one request.
func (c *Conn) reset() {
	if n := budget(c.limiter.cfg.RequestBytes); c.bytes.Load() != n {
		c.bytes.Store(n)
	}
}

// Begin says that a request has arrived in whole, and is being answered: from now on it is the server that takes time.
func (c *Conn) Begin() {
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.stage == idle || c.stage == arriving {
		c.late.Stop()
		c.since = time.Now()
		l.move(c, answering)
	}
}

// Authenticated says that the request being answered is one of that caller, of that tenant, and so is the connection from
// now on. It reports whether there is room for it. If not, the connection remains an unknown one, and the request should be
// refused.
func (c *Conn) Authenticated(tenant, caller string) bool {
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case c.stage != answering:
		return false // there is no request, or the connection is closed
	case c.known:
		return true
	case l.cfg.MaxPerCaller > 0 && l.callers[caller] >= l.cfg.MaxPerCaller:
		return false
	}
	var given *Conn
	if l.known.total >= l.cfg.MaxAuthenticated {
		if given = l.known.giveWay(tenant); given == nil {
			return false
		}
	}
	l.unknown.remove(c.address, c)
	c.known, c.tenant, c.caller = true, tenant, caller
	l.callers[caller]++
	l.known.add(tenant, c, answering)
	if given != nil {
		l.end(given, Crowded)
	}
	l.fill()
	return true
}

// End says that the request has been answered, whether or not all of it was read.
func (c *Conn) End() {
	c.reset()
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.stage != answering && c.stage != arriving {
		return
	}
	c.late.Stop()
	c.since = time.Now()
	l.move(c, idle)
	if l.cfg.IdleTime > 0 {
		c.late.Reset(l.cfg.IdleTime)
	}
}

// linger is how long a connection stays idle although others wait for its place: its response leaves meanwhile.
const linger = 100 * time.Millisecond

// fillSoon lets in connections that wait as soon as others give way to them, and not only when one ends. l.mu is held.
func (l *Limiter) fillSoon() {
	if l.filling {
		return
	}
	l.filling = true
	time.AfterFunc(linger, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.filling = false
		if l.fill(); l.waiting.total > 0 {
			l.fillSoon()
		}
	})
}

// arrive says that a part of the next request has arrived, so that an idle connection is not idle any more.
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

// tooLate closes a connection whose request has not arrived in time.
func (c *Conn) tooLate() {
	l := c.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.stage == idle || c.stage == arriving {
		l.end(c, Late)
	}
}
