package connlimit

import (
	"errors"
	"net"
	"sync"
	"time"
)

// Listen returns a listener whose connections are those of inner, bounded. They are of type [*Conn].
func (l *Limiter) Listen(inner net.Listener) net.Listener {
	return &listener{Listener: inner, limiter: l, news: sync.NewCond(&l.mu)}
}

// listener accepts connections as fast as they come, for the kernel's queue knows no addresses, and gives its server
// those for which there is room.
type listener struct {
	net.Listener
	limiter *Limiter
	begin   sync.Once

	// All below are guarded by limiter.mu.
	ready []*Conn
	err   error
	ended bool
	news  *sync.Cond // ready, err or ended have changed
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	l.begin.Do(func() { go l.run() })
	l.limiter.mu.Lock()
	defer l.limiter.mu.Unlock()
	for len(l.ready) == 0 && l.err == nil && !l.ended {
		l.news.Wait()
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
		l.err = nil // It may pass: the server decides.
		l.news.Broadcast()
	}
	return nil, err
}

// Close closes the listener and the connections that its server has not seen.
func (l *listener) Close() error {
	l.limiter.mu.Lock()
	l.ended = true
	l.news.Broadcast()
	l.limiter.left.Broadcast()
	unseen := append(l.limiter.waiting.all(func(c *Conn) bool { return c.from == l }), l.ready...)
	l.ready = nil
	l.limiter.mu.Unlock()
	for _, c := range unseen {
		_ = c.Close()
	}
	return l.Listener.Close() //nolint:wrapcheck // It adds nothing.
}

// run accepts until the inner listener is closed.
func (l *listener) run() {
	for {
		raw, err := l.Listener.Accept()
		if err == nil {
			l.offer(raw)
			continue
		}
		l.limiter.mu.Lock()
		l.err = err
		l.news.Broadcast()
		for l.err != nil && !l.ended {
			l.news.Wait()
		}
		over := l.ended
		l.limiter.mu.Unlock()
		if over {
			return
		}
	}
}

// waitingBuffer is what the kernel may keep of a connection that waits, in bytes: a ClientHello.
const waitingBuffer = 4 << 10

// offer lets a connection in, lets it wait, or closes it.
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
	c.late = time.AfterFunc(m.cfg.RequestTime, c.tooLate)
	if m.unknown.total < m.cfg.Max {
		m.enter(c)
		return
	}
	if given := m.unknown.victim(c.address, c.since, true); given != nil {
		m.enter(c)
		m.end(given, Crowded)
		return
	}
	c.waiting = true
	c.buffers(waitingBuffer)
	m.waiting.add(c.address, c, arriving)
	m.fillSoon()
	if m.waiting.total > m.cfg.MaxWaiting {
		m.end(m.waiting.newest(), Crowded)
	}
}

// buffers bounds what the kernel keeps of c. If it does not take the bound, it keeps more, and there is no other harm.
func (c *Conn) buffers(bytes int) {
	if tcp, ok := c.Conn.(interface{ SetReadBuffer(int) error }); ok && c.limiter.cfg.SocketBuffer > 0 {
		_ = tcp.SetReadBuffer(bytes)
	}
}

// enter gives c to its server. l.mu is held.
func (l *Limiter) enter(c *Conn) {
	c.waiting = false
	c.buffers(l.cfg.SocketBuffer)
	if tcp, ok := c.Conn.(interface{ SetWriteBuffer(int) error }); ok && l.cfg.SocketBuffer > 0 {
		_ = tcp.SetWriteBuffer(l.cfg.SocketBuffer)
	}
	l.unknown.add(c.address, c, arriving)
	c.from.ready = append(c.from.ready, c)
	c.from.news.Broadcast()
}

// fill lets in connections that wait while there is room, those of the address first that has the fewest inside. If there
// is none, it makes room where an address that waits has fewer than another. l.mu is held.
func (l *Limiter) fill() {
	for l.waiting.total > 0 && l.leaving < maxLeaving(l.cfg.Max) {
		next := l.waiting.least(l.unknown.held)
		var given *Conn
		if l.unknown.total >= l.cfg.Max {
			if given = l.unknown.victim(next.address, time.Now(), false); given == nil {
				return
			}
		}
		l.waiting.remove(next.address, next)
		l.enter(next)
		if given != nil {
			l.end(given, Crowded) // which fills again
			return
		}
	}
}
