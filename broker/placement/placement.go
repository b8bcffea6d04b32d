package placement

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Members are the brokers that one broker sees, without those that are shutting down.
type Members struct {
	// Self is the broker that sees them.
	Self netip.Addr
	// Ready are those that sidecars call. Starting are those that sidecars do not call yet.
	Ready, Starting []netip.Addr
	// ShuttingDown is set once Self is shutting down.
	ShuttingDown bool
}

// DefaultSettleTime is how long the brokers must be unchanged before a broker owns sessions as second owner. A rolling
// update changes them every few seconds, and nearly every second owner in between is not second at the end. Without the
// wait, an update of 3 brokers fetched each session 2.4 times, and one of 10 brokers 3.2 times. With it they fetch 2.1
// and 2.3 times; the minimum is 2 (TestRollingUpdate).
const DefaultSettleTime = 2 * time.Minute

// Placement knows which keys one broker owns. Its methods are safe for concurrent use.
//
// A broker immediately owns each session for which it ranks first among the ready and starting brokers. So a starting
// broker is warm before sidecars call it, and the others fetch nothing that is about to move. It owns those for which it
// ranks second among the ready brokers, a standby for the loss of another, after the settle time without a change, or
// immediately if there are so few brokers that the fetch cannot be wasted.
type Placement struct {
	settleTime time.Duration
	wake       chan struct{} // holds one

	// notifying is locked while handlers run, so that the last call of each handler follows the last change.
	notifying sync.Mutex

	mu           sync.Mutex
	known        bool         // handlers ran after the first Update; guarded by mu
	shuttingDown bool         // guarded by mu
	self         netip.Addr   // guarded by mu
	all          []netip.Addr // ready, starting and self, sorted; empty before Update; guarded by mu
	ready        []netip.Addr // those that sidecars call, sorted; guarded by mu
	stable       []netip.Addr // ready and self, as they were when last unchanged for settleTime; guarded by mu
	promoteAt    time.Time    // when stable becomes the present brokers; zero if it is; guarded by mu
	handlers     []func()     // guarded by mu
}

// New returns a placement that owns nothing before Update. settleTime is how long the brokers must be unchanged before
// this one owns sessions as second owner, see [DefaultSettleTime].
func New(settleTime time.Duration) *Placement {
	return &Placement{settleTime: settleTime, wake: make(chan struct{}, 1)}
}

// Known reports whether Update was called, and has called the handlers of OnChange.
func (p *Placement) Known() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known
}

// Brokers returns how many brokers call STS, this one and starting ones included; 0 before Update.
func (p *Placement) Brokers() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all)
}

// Owns reports whether this broker should keep the session of key warm.
func (p *Placement) Owns(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.all) == 0 {
		return false
	}
	rank := rankOf(key, p.self, p.all)
	return rank == 0 || rank < Owners && p.ownsAllPositions() ||
		slices.Contains(p.stable, p.self) && rankOf(key, p.self, p.stable) < Owners
}

// ownsAllPositions reports whether there are so few brokers that this one can own sessions as second owner at once. Two
// brokers own everything. A broker that starts beside two others will be one of two, whichever of them leaves. The caller
// holds mu.
func (p *Placement) ownsAllPositions() bool {
	starting := !slices.Contains(p.ready, p.self)
	return len(p.all) <= Owners || starting && len(p.all) == Owners+1
}

// OnChange makes handler run whenever the results of Owns and Brokers may have changed. It must neither block nor call
// Update.
func (p *Placement) OnChange(handler func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handlers = append(p.handlers, handler)
}

// Update sets the brokers.
func (p *Placement) Update(m Members) {
	p.notifying.Lock()
	defer p.notifying.Unlock()
	if p.apply(m) {
		p.notify()
		p.mu.Lock()
		p.known = true
		p.mu.Unlock()
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// apply sets the brokers, and reports whether that may change any result.
func (p *Placement) apply(m Members) (changed bool) {
	all := sorted(append(slices.Concat(m.Ready, m.Starting), m.Self))
	ready := sorted(m.Ready)
	p.mu.Lock()
	defer p.mu.Unlock()
	known := len(p.all) > 0
	if m.ShuttingDown && known {
		// It keeps its sessions, and fetches no others in its last seconds.
		p.shuttingDown, p.promoteAt = true, time.Time{}
		return false
	}
	if known && !p.shuttingDown && slices.Equal(all, p.all) && slices.Equal(ready, p.ready) {
		return false
	}
	if !known || p.shuttingDown || !slices.Equal(ready, p.ready) {
		p.promoteAt = time.Now().Add(p.settleTime)
	}
	p.shuttingDown, p.self, p.all, p.ready = false, m.Self.Unmap(), all, ready
	return true
}

// Run makes this broker a second owner once the brokers are unchanged for the settle time. It returns when ctx ends.
func (p *Placement) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
		case <-timer.C:
		}
		if wait := p.promoteSecond(); wait > 0 {
			timer.Reset(wait)
		}
	}
}

// promoteSecond makes this broker a second owner if the settle time has passed. Otherwise it returns how long that takes;
// 0 if there is nothing to wait for.
func (p *Placement) promoteSecond() time.Duration {
	p.notifying.Lock()
	defer p.notifying.Unlock()
	p.mu.Lock()
	if p.promoteAt.IsZero() {
		p.mu.Unlock()
		return 0
	}
	if wait := time.Until(p.promoteAt); wait > 0 {
		p.mu.Unlock()
		return wait
	}
	p.stable, p.promoteAt = sorted(append(slices.Clone(p.ready), p.self)), time.Time{}
	p.mu.Unlock()
	p.notify()
	return 0
}

// notify runs the handlers. The caller holds notifying.
func (p *Placement) notify() {
	p.mu.Lock()
	handlers := p.handlers
	p.mu.Unlock()
	for _, handler := range handlers {
		handler()
	}
}

// sorted returns the addresses sorted and without duplicates.
func sorted(addresses []netip.Addr) []netip.Addr {
	unmapped := make([]netip.Addr, len(addresses))
	for i, a := range addresses {
		unmapped[i] = a.Unmap()
	}
	slices.SortFunc(unmapped, netip.Addr.Compare)
	return slices.Compact(unmapped)
}
