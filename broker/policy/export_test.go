package policy

import (
	"regexp/syntax"
	"testing"
)

// What the tests outside of the package look into.
var (
	PodKeys       = podKeys[:]
	NamespaceKeys = namespaceKeys
	MatchGlob     = matchGlob
)

// Cached is how many texts and answers r has cached for a namespace, and about how many bytes they take.
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

// CachedCost is about how many bytes all that r has cached takes.
func (r *Rules) CachedCost() int {
	r.cache.mu.RLock()
	defer r.cache.mu.RUnlock()
	return r.cache.cost
}

// Uncached returns rules that decide as r does, and have nothing cached.
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

// MaxVisits is the bound on what matching costs.
const MaxVisits = maxVisits

// Visits counts the visits of matching expression with text.
func Visits(expression, text string) (int, error) {
	re, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return 0, err
	}
	prog, err := syntax.Compile(re.Simplify())
	if err != nil {
		return 0, err
	}
	return visits(prog, text), nil
}

// Compile compiles a text of [Permitted].
func Compile(text string) error {
	_, _, err := compile(text)
	return err
}

// holder is the only evaluation that runs.
type holder struct{ r *Rules }

// Hold occupies all that evaluations run in, until the test ends.
func (r *Rules) Hold(t *testing.T) holder {
	t.Helper()
	r.gate.mu.Lock()
	defer r.gate.mu.Unlock()
	r.gate.limit, r.gate.running = 1, 1
	return holder{r}
}

// Pause lets evaluations run while f does.
func (h holder) Pause(f func()) {
	h.set(0)
	defer h.set(1)
	f()
}

func (h holder) set(running int) {
	h.r.gate.mu.Lock()
	defer h.r.gate.mu.Unlock()
	h.r.gate.running = running
}
