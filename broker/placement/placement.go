package placement

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Members are the brokers that there are, as one of them sees them. Those that are about to end are not among them.
type Members struct {
	// Self is the broker that looks.
	Self netip.Addr
	// Ready are those that sidecars ask, and Starting those that they do not ask yet.
	Ready, Starting []netip.Addr
	// Ending is set once Self is about to end.
	Ending bool
}

// DefaultSettleTime is how long the brokers must have been the same ones for a broker to take up what it is second for. A
// rolling update changes them every few seconds, and what is second in between is hardly ever second at its end:
// taking it up at once, an update of 3 brokers fetched each session 2.4 times and one of 10 brokers 3.2 times; like
// this it is 2.1 and 2.3 times, where 2 are the least (TestRollingUpdate).
const DefaultSettleTime = 2 * time.Minute

// Placement is what one broker owns. Its methods may be called concurrently.
//
// What it is first for among all that are there or start it owns at once: a broker that starts has warm what it will
// be asked for, and those that are there fetch nothing that is about to be another's. What it is second for among those
// that are ready, which is needed only when another broker is lost, it owns after a time without a change; or at once
// where that cannot be in vain, because there are so few brokers.
type Placement struct {
	settleTime time.Duration
	wake       chan struct{} // holds one

	// changing is held while handlers are told of a change, so that each is told of the latest one last.
	changing sync.Mutex

	mu       sync.Mutex
	told     bool         // the handlers, once; guarded by mu
	ending   bool         // guarded by mu
	self     netip.Addr   // guarded by mu
	all      []netip.Addr // that there are, sorted; empty until Update; guarded by mu
	ready    []netip.Addr // among whom sidecars choose; sorted; guarded by mu
	settled  []netip.Addr // ready, and this one, as they were when they had last been the same for settleTime; guarded by mu
	settleAt time.Time    // when that is so again; zero when it is; guarded by mu
	handlers []func()     // guarded by mu
}

// New returns one that owns nothing until Update has been called. settleTime is how long the brokers must have been
// the same ones for it to take up what it is second for; see [DefaultSettleTime].
func New(settleTime time.Duration) *Placement {
	return &Placement{settleTime: settleTime, wake: make(chan struct{}, 1)}
}

// Known reports whether Update has been called, and what OnChange was given after that.
func (p *Placement) Known() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.told
}

// Brokers returns how many brokers make calls of STS, this one and those that start included; 0 while that is not known.
func (p *Placement) Brokers() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all)
}

// Owns reports whether this broker should have the session of key warm.
func (p *Placement) Owns(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.all) == 0 {
		return false
	}
	before := above(key, p.self, p.all)
	return before == 0 || p.few() && before < Owners ||
		slices.Contains(p.settled, p.self) && above(key, p.self, p.settled) < Owners
}

// few reports whether there are so few brokers that this one will be second for what it is second for now: two own
// everything, and one that starts beside two others will be one of two, whoever of them goes. The caller holds mu.
func (p *Placement) few() bool {
	starts := !slices.Contains(p.ready, p.self)
	return len(p.all) <= Owners || starts && len(p.all) == Owners+1
}

// OnChange has changed called whenever the answers of Owns and Brokers may have changed. It must not block, and must not
// call Update.
func (p *Placement) OnChange(changed func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handlers = append(p.handlers, changed)
}

// Update says which brokers there are.
func (p *Placement) Update(m Members) {
	p.changing.Lock()
	defer p.changing.Unlock()
	if p.take(m) {
		p.tell()
		p.mu.Lock()
		p.told = true
		p.mu.Unlock()
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// take notes which brokers there are, and reports whether that changes any answer.
func (p *Placement) take(m Members) (changed bool) {
	all := set(append(slices.Concat(m.Ready, m.Starting), m.Self))
	ready := set(m.Ready)
	p.mu.Lock()
	defer p.mu.Unlock()
	known := len(p.all) > 0
	if m.Ending && known {
		// It keeps what it has, and takes nothing up for its last seconds.
		p.ending, p.settleAt = true, time.Time{}
		return false
	}
	if known && !p.ending && slices.Equal(all, p.all) && slices.Equal(ready, p.ready) {
		return false
	}
	if !known || p.ending || !slices.Equal(ready, p.ready) {
		p.settleAt = time.Now().Add(p.settleTime)
	}
	p.ending, p.self, p.all, p.ready = false, m.Self.Unmap(), all, ready
	return true
}

// Run lets changes settle until ctx ends.
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
		if wait := p.settle(); wait > 0 {
			timer.Reset(wait)
		}
	}
}

// settle takes up what this broker is second for once the time has come, and returns how long that is still; 0 when there is nothing to
// wait for.
func (p *Placement) settle() time.Duration {
	p.changing.Lock()
	defer p.changing.Unlock()
	p.mu.Lock()
	if p.settleAt.IsZero() {
		p.mu.Unlock()
		return 0
	}
	if wait := time.Until(p.settleAt); wait > 0 {
		p.mu.Unlock()
		return wait
	}
	p.settled, p.settleAt = set(append(slices.Clone(p.ready), p.self)), time.Time{}
	p.mu.Unlock()
	p.tell()
	return 0
}

// tell tells the handlers. The caller holds changing.
func (p *Placement) tell() {
	p.mu.Lock()
	handlers := p.handlers
	p.mu.Unlock()
	for _, changed := range handlers {
		changed()
	}
}

// set sorts addresses, and removes those that are there twice.
func set(addresses []netip.Addr) []netip.Addr {
	unmapped := make([]netip.Addr, len(addresses))
	for i, a := range addresses {
		unmapped[i] = a.Unmap()
	}
	slices.SortFunc(unmapped, netip.Addr.Compare)
	return slices.Compact(unmapped)
}
