package client

import "sync"

const (
	// maxHedges is how many calls in a row may ask a second broker because the first is silent: enough for a pod that
	// starts while its broker hangs. Later calls are renewals, for which 2.5 s are no time.
	maxHedges = 1
	// hedgePart is how many answers without a hedge pay for one. In the long run a fifth of the calls can be hedges, so
	// that brokers that have become slow are not asked twice by all sidecars, which would make them slower.
	hedgePart = 4
)

// budget is how many hedges a client has. The zero value is full.
type budget struct {
	mu    sync.Mutex
	spent int // in parts of a hedge; guarded by mu
}

// take takes a hedge, if there is one.
func (b *budget) take() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.spent > (maxHedges-1)*hedgePart {
		return false
	}
	b.spent += hedgePart
	return true
}

// refund gives a part of a hedge back.
func (b *budget) refund() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spent = max(b.spent-1, 0)
}
