package broker

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"

	"github.com/credence-iam/credence/broker/policy"
)

// Retainer keeps sessions fresh while somebody wants them, on behalf of a namespace. Retain fails when the
// namespace has as many distinct grants as it may; Release takes back a Retain that did not.
type Retainer interface {
	Retain(grant policy.Grant, namespace string) error
	Release(grant policy.Grant, namespace string)
}

// Prefetch keeps the grant of every injected pod that this broker owns warm, so that no pod waits for STS,
// and lets go of it when its last pod does.
//
// Changes come in by key through a set: however many there are, each pod is looked at once, and
// none is lost. Namespaces take turns, a pod each: the pods of one namespace, however many and
// however expensive to decide on, delay those of another by one pod at a time.
type Prefetch struct {
	cfg  PrefetchConfig
	wake chan struct{} // holds one

	mu      sync.Mutex
	dirty   map[string]struct{} // keys of pods to look at; guarded by mu
	queues  map[string][]string // :: namespace → those of its pods, next first; guarded by mu
	turns   []string            // the namespaces of queues, next first; guarded by mu
	looking bool                // Run looks at a pod that is not in dirty any more; guarded by mu

	// Used by Run alone.
	kept map[string]policy.Grant // :: pod key → what is kept for it
	full room
}

// PrefetchConfig configures [NewPrefetch].
type PrefetchConfig struct {
	// Lookup returns the injected pod of that key with its namespace; ok is false when there is
	// none any more. Required.
	Lookup func(key string) (pod policy.Pod, ns policy.Namespace, ok bool)
	// Owns says whether this broker is one of those that keep the sessions with a routing key warm; Changed is to
	// be called for all pods when its answers change. Default: it owns all of them.
	Owns func(routingKey string) bool
	// Rules decide on grants. Required.
	Rules *policy.Rules
	// Sessions keeps them. Required.
	Sessions Retainer
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
		queues: make(map[string][]string),
		kept:   make(map[string]policy.Grant),
		full:   room{waiting: make(map[string]map[string]struct{}), freed: make(map[string]bool)},
	}, nil
}

// Changed says that the pods of those keys appeared, changed or went. It does not block.
func (p *Prefetch) Changed(keys ...string) {
	p.mu.Lock()
	for _, key := range keys {
		if _, ok := p.dirty[key]; ok {
			continue
		}
		p.dirty[key] = struct{}{}
		namespace, _, _ := strings.Cut(key, "/")
		if len(p.queues[namespace]) == 0 {
			p.turns = append(p.turns, namespace)
		}
		p.queues[namespace] = append(p.queues[namespace], key)
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
		for ctx.Err() == nil {
			key, ok := p.next()
			if !ok {
				break
			}
			p.look(ctx, key)
		}
	}
}

// next takes out the key of a pod to look at, of the namespace whose turn it is.
func (p *Prefetch) next() (key string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looking = len(p.turns) > 0
	if !p.looking {
		return "", false
	}
	namespace := p.turns[0]
	p.turns = p.turns[1:]
	queue := p.queues[namespace]
	key, p.queues[namespace] = queue[0], queue[1:]
	delete(p.dirty, key)
	if len(queue) > 1 {
		p.turns = append(p.turns, namespace)
	} else {
		delete(p.queues, namespace)
	}
	return key, true
}

// look brings what is kept for one pod up to date, and has another one looked at where there may be room for it.
func (p *Prefetch) look(ctx context.Context, key string) {
	namespace, _, _ := strings.Cut(key, "/")
	p.full.leave(namespace, key)
	p.change(ctx, key, namespace, p.wanted(ctx, key))
	if next, ok := p.full.next(namespace); ok {
		p.Changed(next)
	}
}

// wanted is the grant of the pod; zero when it is gone, may have none, or is for other brokers to keep.
func (p *Prefetch) wanted(ctx context.Context, key string) policy.Grant {
	pod, ns, ok := p.cfg.Lookup(key)
	if !ok {
		return policy.Grant{}
	}
	if p.cfg.Owns != nil {
		// What does not parse is nobody's, and has no grant either.
		if key, err := pod.RoutingKey(); err == nil && !p.cfg.Owns(string(key)) {
			return policy.Grant{}
		}
	}
	grant, err := p.cfg.Rules.Grant(pod, ns)
	if err != nil {
		// The pod itself will be told, when it asks.
		p.cfg.Logger.DebugContext(ctx, "Not prefetching", "pod", key, "error", err)
		return policy.Grant{}
	}
	return grant
}

// change keeps now for the pod instead of what was kept before; either may be zero.
func (p *Prefetch) change(ctx context.Context, key, namespace string, now policy.Grant) {
	before := p.kept[key]
	if now == before {
		return
	}
	if !before.IsZero() {
		p.cfg.Sessions.Release(before, namespace)
		delete(p.kept, key)
		p.full.free(namespace)
	}
	if now.IsZero() {
		return
	}
	if err := p.cfg.Sessions.Retain(now, namespace); err != nil {
		p.cfg.Logger.DebugContext(ctx, "Not prefetching", "pod", key, "error", err)
		p.full.enter(namespace, key)
		return
	}
	p.kept[key] = now
}

// room knows the pods that wait until their namespace has room for one more grant.
type room struct {
	waiting map[string]map[string]struct{} // :: namespace → keys of pods
	freed   map[string]bool                // :: namespace → whether a grant was let go since it was last found full
}

// enter says that the pod found its namespace full.
func (r room) enter(namespace, key string) {
	if r.waiting[namespace] == nil {
		r.waiting[namespace] = make(map[string]struct{})
	}
	r.waiting[namespace][key] = struct{}{}
	delete(r.freed, namespace)
}

// leave says that the pod does not wait.
func (r room) leave(namespace, key string) {
	delete(r.waiting[namespace], key)
	if len(r.waiting[namespace]) == 0 {
		delete(r.waiting, namespace)
		delete(r.freed, namespace)
	}
}

// free says that a grant of the namespace was let go.
func (r room) free(namespace string) {
	if len(r.waiting[namespace]) > 0 {
		r.freed[namespace] = true
	}
}

// next takes out a pod that may find room. It is asked for one after each: those that have no use for the room
// leave it to the others.
func (r room) next(namespace string) (key string, ok bool) {
	if !r.freed[namespace] {
		return "", false
	}
	for key = range r.waiting[namespace] {
		break
	}
	r.leave(namespace, key)
	return key, true
}
