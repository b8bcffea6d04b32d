package broker

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/credence-iam/credence/broker/policy"
)

// Keeper keeps sessions fresh while somebody wants them.
type Keeper interface {
	Keep(grant policy.Grant)
	Release(grant policy.Grant)
}

// Prefetch keeps the grant of every injected pod warm, so that no pod waits for STS, and lets go of
// it when its last pod does.
//
// Changes come in by key through a set: however many there are, each pod is looked at once, and
// none is lost.
type Prefetch struct {
	cfg  PrefetchConfig
	wake chan struct{} // holds one

	mu    sync.Mutex
	dirty map[string]struct{} // keys of pods to look at; guarded by mu

	grants map[string]policy.Grant // :: pod key → what is kept for it; used by Run alone
}

// PrefetchConfig configures [NewPrefetch].
type PrefetchConfig struct {
	// Lookup returns the injected pod of that key with its namespace; ok is false when there is
	// none any more. Required.
	Lookup func(key string) (pod policy.Pod, ns policy.Namespace, ok bool)
	// Rules decide on grants. Required.
	Rules *policy.Rules
	// Sessions keeps them. Required.
	Sessions Keeper
	// Logger is told at debug level why a pod's grant is not kept. Required.
	Logger *slog.Logger
}

// NewPrefetch checks cfg.
func NewPrefetch(cfg PrefetchConfig) (*Prefetch, error) {
	if cfg.Lookup == nil || cfg.Rules == nil || cfg.Sessions == nil || cfg.Logger == nil {
		return nil, errors.New("prefetching needs Lookup, Rules, Sessions and a Logger")
	}
	return &Prefetch{
		cfg:    cfg,
		wake:   make(chan struct{}, 1),
		dirty:  make(map[string]struct{}),
		grants: make(map[string]policy.Grant),
	}, nil
}

// Changed says that the pod of that key appeared, changed or went. It does not block.
func (p *Prefetch) Changed(key string) {
	p.mu.Lock()
	p.dirty[key] = struct{}{}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run follows changes until ctx ends.
func (p *Prefetch) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
		}
		p.mu.Lock()
		keys := p.dirty
		p.dirty = make(map[string]struct{})
		p.mu.Unlock()
		for key := range keys {
			p.look(ctx, key)
		}
	}
}

// look brings what is kept for one pod up to date.
func (p *Prefetch) look(ctx context.Context, key string) {
	var now policy.Grant
	if pod, ns, ok := p.cfg.Lookup(key); ok {
		grant, err := p.cfg.Rules.Grant(pod, ns)
		if err != nil {
			// The pod itself will be told, when it asks.
			p.cfg.Logger.DebugContext(ctx, "Not prefetching", "pod", key, "error", err)
		}
		now = grant
	}
	before := p.grants[key]
	if now == before {
		return
	}
	if !now.IsZero() {
		p.cfg.Sessions.Keep(now)
		p.grants[key] = now
	} else {
		delete(p.grants, key)
	}
	if !before.IsZero() {
		p.cfg.Sessions.Release(before)
	}
}
