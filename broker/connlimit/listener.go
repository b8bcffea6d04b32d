package connlimit

import (
	"errors"
	"net"
	"sync"
	"time"
)

// Listen returns a listener that limits the connections of inner. Its connections have type [*Conn].
func (l *Limiter) Listen(inner net.Listener) net.Listener {
	return &listener{Listener: inner, limiter: l, changed: sync.NewCond(&l.mu)}
}

// listener accepts connections as fast as they arrive, because the kernel's queue does not know addresses. Its Accept
// returns a connection when there is room.
type listener struct {
	net.Listener
	limiter *Limiter
	begin   sync.Once

	// The following fields are guarded by limiter.mu.
	ready   []*Conn
	err     error
	ended   bool
	changed *sync.Cond // signals that ready, err or ended has changed
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	l.begin.Do(func() { go l.run() })
	l.limiter.mu.Lock()
	defer l.limiter.mu.Unlock()
	for len(l.ready) == 0 && l.err == nil && !l.ended {
		l.changed.Wait()
	}
	if l.ended {
		return nil, net.ErrClosed
	}
	if len(l.ready) > 0 {
		c := l.ready[0]
		l.ready = l.ready[1:]
		return c, nil
	}
	err := l.err
	if !errors.Is(err, net.ErrClosed) {
		l.err = nil // It may be temporary: the server decides.
		l.changed.Broadcast()
	}
	return nil, err
}

// Close closes the listener, and the connections that the server has not accepted.
func (l *listener) Close() error {
	l.limiter.mu.Lock()
	l.ended = true
	l.changed.Broadcast()
	l.limiter.left.Broadcast()
	unseen := append(l.limiter.waiting.all(func(c *Conn) bool { return c.from == l }), l.ready...)
	l.ready = nil
	l.limiter.mu.Unlock()
	for _, c := range unseen {
		_ = c.Close()
	}
	return l.Listener.Close() //nolint:wrapcheck // A wrapper adds nothing.
}

// run accepts connections until the inner listener is closed.
func (l *listener) run() {
	for {
		raw, err := l.Listener.Accept()
		if err == nil {
			l.offer(raw)
			continue
		}
		l.limiter.mu.Lock()
		l.err = err
		l.changed.Broadcast()
		for l.err != nil && !l.ended {
			l.changed.Wait()
		}
		over := l.ended
		l.limiter.mu.Unlock()
		if over {
			return
		}
	}
}

// waitingBuffer is how many bytes the kernel may buffer for a waiting connection: one ClientHello.
const waitingBuffer = 4 << 10

// offer gives a connection to the server, makes it wait, or closes it.
func (l *listener) offer(raw net.Conn) {
	m := l.limiter
	c := &Conn{Conn: raw, limiter: m, from: l, address: addressOf(raw.RemoteAddr()), since: time.Now()}
	c.bytes.Store(budget(m.cfg.HandshakeBytes))
	c.handshaking.Store(m.cfg.Handshakes > 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.leaving >= maxLeaving(m.cfg.Max) && !l.ended {
		m.left.Wait()
	}
	if l.ended {
		go func() { _ = raw.Close() }()
		return
	}
	c.late = time.AfterFunc(m.cfg.RequestTime, c.closeLate)
	if m.unknown.total() < m.cfg.Max {
		m.enter(c)
		return
	}
	if victim := m.unknown.victim(c, c.since, true); victim != nil {
		m.enter(c)
		m.end(victim, Crowded)
		return
	}
	c.waiting = true
	c.buffers(waitingBuffer)
	m.waiting.add(c, arriving)
	m.fillSoon()
	if m.waiting.total() > m.cfg.MaxWaiting {
		m.end(m.waiting.newest(), Crowded)
	}
}

// buffers limits what the kernel buffers for c. If the kernel refuses the limit, c only holds more memory.
func (c *Conn) buffers(bytes int) {
	if tcp, ok := c.Conn.(interface{ SetReadBuffer(int) error }); ok && c.limiter.cfg.SocketBuffer > 0 {
		_ = tcp.SetReadBuffer(bytes)
	}
}

// enter gives c to the server. The caller holds l.mu.
func (l *Limiter) enter(c *Conn) {
	c.waiting = false
	c.buffers(l.cfg.SocketBuffer)
	if tcp, ok := c.Conn.(interface{ SetWriteBuffer(int) error }); ok && l.cfg.SocketBuffer > 0 {
		_ = tcp.SetWriteBuffer(l.cfg.SocketBuffer)
	}
	l.unknown.add(c, arriving)
	c.from.ready = append(c.from.ready, c)
	c.from.changed.Broadcast()
}

// fill lets waiting connections in while there is room. It prefers the address with the fewest connections inside. If
// there is no room, it makes room if a waiting address has fewer connections than another. The caller holds l.mu.
func (l *Limiter) fill() {
	for l.waiting.total() > 0 && l.leaving < maxLeaving(l.cfg.Max) {
		next := l.waiting.least(&l.unknown)
		var victim *Conn
		if l.unknown.total() >= l.cfg.Max {
			if victim = l.unknown.victim(next, time.Now(), false); victim == nil {
				return
			}
		}
		l.waiting.remove(next)
		l.enter(next)
		if victim != nil {
			l.end(victim, Crowded) // end calls fill again
			return
		}
	}
}
