package policy

import (
	"fmt"
	"testing"
)

// Internals for the tests outside of the package.
var (
	PodKeys       = podKeys[:]
	NamespaceKeys = namespaceKeys
)

// Cached returns how many texts and answers r has cached for a namespace, and about how many bytes they take.
func (r *Rules) Cached(namespace string) (texts, answers, cost int) {
	r.cache.mu.RLock()
	defer r.cache.mu.RUnlock()
	n := r.cache.namespaces[namespace]
	if n == nil {
		return 0, 0, 0
	}
	for _, t := range n.texts {
		texts++
		answers += len(t.answers)
	}
	return texts, answers, n.cost
}

// CachedCost returns about how many bytes the whole cache of r takes.
func (r *Rules) CachedCost() int {
	r.cache.mu.RLock()
	defer r.cache.mu.RUnlock()
	return r.cache.cost
}

// Uncached returns rules that decide as r does, with an empty cache.
func (r *Rules) Uncached() *Rules {
	u := &Rules{keys: r.keys, base: r.base, cluster: r.cluster, chained: r.chained, names: r.names}
	u.limits.Store(r.limits.Load())
	return u
}

// Bounds of the cache.
const (
	MaxCached     = maxCached
	MaxCachedEach = maxCachedEach
)

// holder occupies the gate of rules, so that no evaluation gets a turn.
type holder struct {
	r       *Rules
	tenants []string
}

// Hold occupies the gate until release.
func (r *Rules) Hold(t *testing.T) *holder {
	t.Helper()
	h := &holder{r: r}
	h.occupy()
	if len(h.tenants) == 0 {
		t.Fatal("the gate admits no evaluation")
	}
	return h
}

// occupy takes turns until the gate admits no more.
func (h *holder) occupy() {
	done := make(chan struct{})
	close(done)
	for tenant := "held-0"; h.r.gate.Enter(done, tenant); tenant = fmt.Sprint("held-", len(h.tenants)) {
		h.tenants = append(h.tenants, tenant)
	}
}

func (h *holder) release() {
	for _, tenant := range h.tenants {
		h.r.gate.Leave(tenant)
	}
	h.tenants = nil
}

// Pause admits evaluations while f runs.
func (h *holder) Pause(f func()) {
	h.release()
	defer h.occupy()
	f()
}
