package broker

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/credence-iam/credence/broker/policy"
)

// Retainer renews sessions while they are retained on behalf of a namespace. Retain fails if the namespace has its maximum
// of distinct grants. Release ends a Retain that did not fail.
type Retainer interface {
	Retain(grant policy.Grant, namespace string) error
	Release(grant policy.Grant, namespace string)
}

// Prefetch retains the grant of every injected pod that this broker owns, so that no pod waits for STS, and releases it
// when its last pod is deleted.
//
// Changed pods wait in a set of keys: however many changes a pod has, Prefetch looks at it once, and misses none. Namespaces
// take turns, one pod each. So the pods of one namespace, however many and however expensive to decide on, delay those of
// another namespace by one pod at a time. That includes the time to parse a pod's annotations, see [policy.Request].
type Prefetch struct {
	cfg  PrefetchConfig
	wake chan struct{} // has room for one

	mu      sync.Mutex
	dirty   map[string]struct{} // keys of pods to look at; guarded by mu
	queues  map[string][]string // :: namespace → the keys of its pods in dirty, next first; guarded by mu
	turns   []string            // the namespaces of queues, next first; guarded by mu
	looking bool                // Run looks at a pod that is no longer in dirty; guarded by mu
	// retained has the retained grants by pod, and grants the pods by grant. Only Run changes them,
	// holding mu.
	retained map[string]*retained
	grants   map[policy.Grant]*retained

	full waitlist // used by Run alone
}

// retained is a grant that is retained for pods.
type retained struct {
	grant policy.Grant
	pods  map[string]struct{} // by key; not empty
}

// PrefetchConfig configures [NewPrefetch].
type PrefetchConfig struct {
	// Lookup returns the injected pod of that key with its namespace; ok is false if there is none. Required.
	Lookup func(key string) (pod policy.Pod, ns policy.Namespace, ok bool)
	// Owns reports whether this broker keeps the sessions with that routing key warm. When its results change, the caller
	// calls Changed for all pods. Default: this broker owns all sessions.
	Owns func(routingKey string) bool
	// Sessions renews the retained sessions. Required.
	Sessions Retainer
	// Logger receives at debug level why a pod's grant is not retained. Required.
	Logger *slog.Logger
}

// NewPrefetch checks cfg.
func NewPrefetch(cfg PrefetchConfig) (*Prefetch, error) {
	if cfg.Lookup == nil || cfg.Sessions == nil || cfg.Logger == nil {
		return nil, errors.New("prefetch needs Lookup, Sessions and a Logger")
	}
	return &Prefetch{
		cfg:      cfg,
		wake:     make(chan struct{}, 1),
		dirty:    make(map[string]struct{}),
		queues:   make(map[string][]string),
		retained: make(map[string]*retained),
		grants:   make(map[policy.Grant]*retained),
		full:     waitlist{waiting: make(map[string]map[string]struct{}), freed: make(map[string]bool)},
	}, nil
}

// Changed records that the pods of those keys were created, changed or deleted. It does not block, and may be called before Run.
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

// Pending returns how many pods Run must still look at. It is 0 only when Run has finished with the last of them.
func (p *Prefetch) Pending() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.looking {
		return len(p.dirty) + 1
	}
	return len(p.dirty)
}

// Run looks at changed pods until ctx ends, and decides on their grants by rules. Call it once.
func (p *Prefetch) Run(ctx context.Context, rules *policy.Rules) error {
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
			p.look(ctx, rules, key)
		}
	}
}

// next removes and returns the next key of the namespace whose turn it is.
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

// look retains the current grant of one pod. If that frees a place in the namespace, it makes a waiting pod dirty.
func (p *Prefetch) look(ctx context.Context, rules *policy.Rules, key string) {
	namespace, _, _ := strings.Cut(key, "/")
	p.full.remove(namespace, key)
	p.retain(ctx, key, namespace, p.grantFor(ctx, rules, key))
	if next, ok := p.full.next(namespace); ok {
		p.Changed(next)
	}
}

// grantFor returns the grant to retain for the pod; zero if the pod was deleted or refused, or if other brokers own its session.
func (p *Prefetch) grantFor(ctx context.Context, rules *policy.Rules, key string) policy.Grant {
	pod, ns, ok := p.cfg.Lookup(key)
	if !ok {
		return policy.Grant{}
	}
	if p.cfg.Owns != nil {
		// A pod whose annotations do not parse has no routing key, and the rules refuse it below.
		if routing, err := pod.RoutingKey(); err == nil && !p.cfg.Owns(string(routing)) {
			return policy.Grant{}
		}
	}
	grant, err := rules.Grant(pod, ns)
	if err != nil {
		// The pod gets the refusal when it calls.
		p.cfg.Logger.DebugContext(ctx, "Skipped the prefetch of a session", "pod", key, "error", err)
		return policy.Grant{}
	}
	return grant
}

// retain retains the grant for the pod, and releases the one before. Either may be zero.
func (p *Prefetch) retain(ctx context.Context, key, namespace string, grant policy.Grant) {
	before, _ := p.Grant(key)
	if grant == before {
		return
	}
	if !before.IsZero() {
		p.cfg.Sessions.Release(before, namespace)
		p.setRetained(key, policy.Grant{})
		p.full.free(namespace)
	}
	if grant.IsZero() {
		return
	}
	if err := p.cfg.Sessions.Retain(grant, namespace); err != nil {
		p.cfg.Logger.DebugContext(ctx, "Skipped the prefetch of a session", "pod", key, "error", err)
		p.full.add(namespace, key)
		return
	}
	p.setRetained(key, grant)
}

// setRetained records the grant that is retained for the pod; zero: none.
func (p *Prefetch) setRetained(key string, grant policy.Grant) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.retained[key]; r != nil {
		delete(p.retained, key)
		if delete(r.pods, key); len(r.pods) == 0 {
			delete(p.grants, r.grant)
		}
	}
	if grant.IsZero() {
		return
	}
	r := p.grants[grant]
	if r == nil {
		r = &retained{grant: grant, pods: make(map[string]struct{})}
		p.grants[grant] = r
	}
	r.pods[key], p.retained[key] = struct{}{}, r
}

// Grant returns the grant that is retained for the pod with that key; ok is false if there is none.
func (p *Prefetch) Grant(pod string) (grant policy.Grant, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.retained[pod]
	if r == nil {
		return policy.Grant{}, false
	}
	return r.grant, true
}

// Pods returns the keys of the pods for which the grant is retained, in no order.
func (p *Prefetch) Pods(grant policy.Grant) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.grants[grant]
	if r == nil {
		return nil
	}
	return slices.Collect(maps.Keys(r.pods))
}

// waitlist holds the pods that wait until their namespace may have one more grant.
type waitlist struct {
	waiting map[string]map[string]struct{} // :: namespace → keys of pods
	freed   map[string]bool                // :: namespace → whether a grant was released since add was last called
}

// add records that the namespace is full for the pod.
func (w waitlist) add(namespace, key string) {
	if w.waiting[namespace] == nil {
		w.waiting[namespace] = make(map[string]struct{})
	}
	w.waiting[namespace][key] = struct{}{}
	delete(w.freed, namespace)
}

// remove removes the pod.
func (w waitlist) remove(namespace, key string) {
	delete(w.waiting[namespace], key)
	if len(w.waiting[namespace]) == 0 {
		delete(w.waiting, namespace)
		delete(w.freed, namespace)
	}
}

// free records that a grant of the namespace was released.
func (w waitlist) free(namespace string) {
	if len(w.waiting[namespace]) > 0 {
		w.freed[namespace] = true
	}
}

// next removes and returns a pod that may fit now. look calls it after each pod, so a pod that does not need the free place
// leaves it to the next.
func (w waitlist) next(namespace string) (key string, ok bool) {
	if !w.freed[namespace] {
		return "", false
	}
	for key = range w.waiting[namespace] {
		break
	}
	w.remove(namespace, key)
	return key, true
}
