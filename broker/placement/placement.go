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
// What it is first for it owns at once, so that what sidecars ask it for is warm: a broker that starts counts
// itself and all that start with it, before any sidecar asks. What it is second for, which is needed only when
// another broker is lost, it owns after a time without a change.
type Placement struct {
	settleTime time.Duration
	wake       chan struct{} // holds one

	mu       sync.Mutex
	known    bool         // guarded by mu
	told     bool         // and the handlers have been told; guarded by mu
	self     netip.Addr   // guarded by mu
	current  []netip.Addr // among whom sidecars choose, or will; sorted; guarded by mu
	settled  []netip.Addr // current as it was when it had last been the same for settleTime; guarded by mu
	settleAt time.Time    // when current becomes settled; zero when it is; guarded by mu
	sharing  int          // how many brokers there are; guarded by mu
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
	return p.sharing
}

// Owns reports whether this broker should have the session of key warm.
func (p *Placement) Owns(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known {
		return false
	}
	return above(key, p.self, p.current) == 0 ||
		slices.Contains(p.settled, p.self) && above(key, p.self, p.settled) < Owners
}

// OnChange has changed called whenever the answers of Owns and Brokers may have changed. It must not block.
func (p *Placement) OnChange(changed func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handlers = append(p.handlers, changed)
}

// Update says which brokers there are.
func (p *Placement) Update(m Members) {
	everybody := set(append(slices.Concat(m.Ready, m.Starting), m.Self))
	current := everybody
	if slices.Contains(m.Ready, m.Self) {
		current = set(m.Ready)
	}
	p.mu.Lock()
	if m.Ending {
		// It keeps what it has, and takes nothing up for its last seconds.
		p.settleAt = time.Time{}
	}
	if p.known && (m.Ending || slices.Equal(current, p.current) && len(everybody) == p.sharing) {
		p.mu.Unlock()
		return
	}
	if !p.known || !slices.Equal(current, p.current) {
		p.current, p.settleAt = current, time.Now().Add(p.settleTime)
	}
	p.known, p.self, p.sharing = true, m.Self, len(everybody)
	handlers := p.handlers
	p.mu.Unlock()
	tell(handlers)
	p.mu.Lock()
	p.told = true
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
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

// settle takes up current once its time has come, and returns how long that is still; 0 when there is nothing to
// wait for.
func (p *Placement) settle() time.Duration {
	p.mu.Lock()
	if p.settleAt.IsZero() {
		p.mu.Unlock()
		return 0
	}
	if wait := time.Until(p.settleAt); wait > 0 {
		p.mu.Unlock()
		return wait
	}
	p.settled, p.settleAt = p.current, time.Time{}
	handlers := p.handlers
	p.mu.Unlock()
	tell(handlers)
	return 0
}

func tell(handlers []func()) {
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
