package client

import "sync"

const (
	// maxHedges is how many calls in a row may call a second broker because the first does not respond. One is enough for
	// a starting pod whose broker hangs. Later calls are renewals, for which 2.5 s do not matter.
	maxHedges = 1
	// refundsPerHedge is how many finished calls without a hedge pay for one. In the long run, at most a fifth of all calls
	// are hedged. So if brokers become slow, the sidecars do not all call two of them, which would make them slower.
	refundsPerHedge = 4
)

// budget counts the hedges that a client may use. The zero value is full.
type budget struct {
	mu    sync.Mutex
	spent int // refunds that are missing; guarded by mu
}

// take uses a hedge. It returns false if none is available.
func (b *budget) take() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.spent > (maxHedges-1)*refundsPerHedge {
		return false
	}
	b.spent += refundsPerHedge
	return true
}

// refund returns a part of a hedge.
func (b *budget) refund() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spent = max(b.spent-1, 0)
}
