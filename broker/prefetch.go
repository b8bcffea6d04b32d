package broker

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"

	"github.com/credence-iam/credence/broker/policy"
)

// Keeper keeps sessions fresh while somebody wants them, on behalf of a namespace. Keep fails when the
// namespace has as many distinct grants as it may; Release takes back a Keep that did not.
type Keeper interface {
	Keep(grant policy.Grant, namespace string) error
	Release(grant policy.Grant, namespace string)
}

// Prefetch keeps the grant of every injected pod warm, so that no pod waits for STS, and lets go of
// it when its last pod does.
//
// Changes come in by key through a set: however many there are, each pod is looked at once, and
// none is lost.
type Prefetch struct {
	cfg  PrefetchConfig
	wake chan struct{} // holds one

	mu      sync.Mutex
	dirty   map[string]struct{} // keys of pods to look at; guarded by mu
	looking bool                // Run has taken keys out of dirty, and is not through with them; guarded by mu

	// Used by Run alone.
	kept    map[string]held                // :: pod key → what is kept for it
	waiting map[string]map[string]struct{} // :: namespace that is full → keys of pods that would want something
}

// held is what is kept for a pod.
type held struct {
	grant     policy.Grant
	namespace string
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
		cfg:     cfg,
		wake:    make(chan struct{}, 1),
		dirty:   make(map[string]struct{}),
		kept:    make(map[string]held),
		waiting: make(map[string]map[string]struct{}),
	}, nil
}

// Changed says that the pods of those keys appeared, changed or went. It does not block.
func (p *Prefetch) Changed(keys ...string) {
	p.mu.Lock()
	for _, key := range keys {
		p.dirty[key] = struct{}{}
	}
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Pending returns how many pods are still to be looked at. It is not 0 before the last of them has been.
func (p *Prefetch) Pending() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.looking {
		return len(p.dirty) + 1
	}
	return len(p.dirty)
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
		p.looking = true
		p.mu.Unlock()
		for key := range keys {
			p.look(ctx, key)
		}
		p.mu.Lock()
		p.looking = false
		p.mu.Unlock()
	}
}

// look brings what is kept for one pod up to date.
func (p *Prefetch) look(ctx context.Context, key string) {
	namespace, _, _ := strings.Cut(key, "/")
	p.stopWaiting(namespace, key)
	var now held
	if pod, ns, ok := p.cfg.Lookup(key); ok {
		grant, err := p.cfg.Rules.Grant(pod, ns)
		if err != nil {
			// The pod itself will be told, when it asks.
			p.cfg.Logger.DebugContext(ctx, "Not prefetching", "pod", key, "error", err)
		} else {
			now = held{grant, namespace}
		}
	}
	before := p.kept[key]
	if now == before {
		return
	}
	if before != (held{}) {
		delete(p.kept, key)
		p.release(before)
	}
	if now == (held{}) {
		return
	}
	if err := p.cfg.Sessions.Keep(now.grant, namespace); err != nil {
		p.cfg.Logger.DebugContext(ctx, "Not prefetching", "pod", key, "error", err)
		if p.waiting[namespace] == nil {
			p.waiting[namespace] = make(map[string]struct{})
		}
		p.waiting[namespace][key] = struct{}{}
		return
	}
	p.kept[key] = now
}

// release lets go of what was kept, and has one of the pods looked at that may take its place.
func (p *Prefetch) release(h held) {
	p.cfg.Sessions.Release(h.grant, h.namespace)
	for key := range p.waiting[h.namespace] {
		p.stopWaiting(h.namespace, key)
		p.Changed(key)
		break
	}
}

func (p *Prefetch) stopWaiting(namespace, key string) {
	delete(p.waiting[namespace], key)
	if len(p.waiting[namespace]) == 0 {
		delete(p.waiting, namespace)
	}
}
