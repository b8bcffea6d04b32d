package policy

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// The cache keeps the results of a namespace, however many new ones others have. It bounds each namespace and all together.
func TestCacheIsSharedEqually(t *testing.T) {
	var c cache
	check := func(when string) {
		t.Helper()
		sum := 0
		for name, n := range c.namespaces {
			sum += n.cost
			if n.cost > maxCachedEach {
				t.Errorf("%s: %s takes %d bytes, the limit is %d", when, name, n.cost, maxCachedEach)
			}
		}
		if sum != c.cost || sum > maxCached {
			t.Errorf("%s: namespaces take %d bytes, counted as %d, the limit is %d", when, sum, c.cost, maxCached)
		}
		for i := range 1000 {
			name := fmt.Sprint("small-", i)
			if m, ok := c.compiled(name, textKey{permittedText, "text"}); !ok || m.err != nil || m.value != name {
				t.Fatalf("%s: %s has %v, %v", when, name, m, ok)
			}
			if a, ok := c.answer(name, textKey{permittedText, "text"}, "role"); !ok || !a.yes {
				t.Fatalf("%s: the answer of %s is %v, %v", when, name, a, ok)
			}
		}
	}
	for i := range 1000 {
		name := fmt.Sprint("small-", i)
		c.add(name, textKey{permittedText, "text"}, 1000, func(t *text) { t.isCompiled, t.compiled.value = true, name })
		c.add(name, textKey{permittedText, "text"}, 100, func(t *text) { t.answers = map[string]answer{"role": {yes: true}} })
	}
	check("at first")
	if n := c.namespaces["small-0"].cost; n != 1000+100+namespaceCost+textCost+len("text") {
		t.Errorf("a text with an answer is counted as %d bytes", n)
	}
	for i := range 100 {
		c.add("hog", textKey{permittedText, fmt.Sprint(i)}, 1<<20, func(t *text) { t.isCompiled = true })
		check("with one large namespace")
		if _, ok := c.compiled("hog", textKey{permittedText, fmt.Sprint(i)}); !ok {
			t.Fatalf("text %d of the large namespace is not cached", i)
		}
	}
	for i := range 100 {
		c.add(fmt.Sprint("hog-", i%20), textKey{permittedText, fmt.Sprint(i)}, 3<<20, func(t *text) { t.isCompiled = true })
		check("with many large namespaces")
	}
	// The cache does not keep a text that is larger than the limit of a namespace, and evicts nothing for it.
	c.add("large", textKey{permittedText, strings.Repeat("x", maxCachedEach)}, 0, func(t *text) { t.isCompiled = true })
	check("with a text that is too large")
	if c.namespaces["large"] != nil {
		t.Error("a text that is too large is cached")
	}
	// There is room for a small namespace, even if it comes last.
	c.add("new", textKey{permittedText, "text"}, 1000, func(t *text) { t.isCompiled = true })
	check("with a new namespace")
	if _, ok := c.compiled("new", textKey{permittedText, "text"}); !ok {
		t.Error("there is no room for a new small namespace")
	}
}

// The cache may have a compiled text without its answers, and answers without the compiled text. It does not mix up kinds.
func TestCacheKeepsThingsApart(t *testing.T) {
	var c cache
	key := textKey{permittedText, "text"}
	c.add("shop", key, 1, func(t *text) { t.answers = map[string]answer{"role": {}} })
	if _, ok := c.compiled("shop", key); ok {
		t.Error("a text without a compiled form has one")
	}
	for name, miss := range map[string]bool{
		"another subject":   func() bool { _, ok := c.answer("shop", key, "other"); return !ok }(),
		"another text":      func() bool { _, ok := c.answer("shop", textKey{permittedText, "x"}, "role"); return !ok }(),
		"another kind":      func() bool { _, ok := c.answer("shop", textKey{allowedText, "text"}, "role"); return !ok }(),
		"another namespace": func() bool { _, ok := c.answer("team", key, "role"); return !ok }(),
	} {
		if !miss {
			t.Errorf("%s has an answer", name)
		}
	}
	if a, ok := c.answer("shop", key, "role"); !ok || a.yes {
		t.Errorf("the answer is %v, %v", a, ok)
	}
}

// The cache counts the memory that it takes, for few large results and for very many small ones.
func TestCacheCountsWhatItTakes(t *testing.T) {
	keys, err := NewKeys(DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	heap := func() int {
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return int(stats.HeapAlloc)
	}
	ofFew := func(i int) string { return fmt.Sprint("ns-", i%8) }
	ofMany := func(i int) string { return fmt.Sprint("ns-", i) }
	for _, tt := range []struct {
		name                     string
		namespace                func(i int) string
		role, permitted, allowed string // %d is i
	}{
		{"roles", ofFew, "r%d", ".*", ""},
		{"expressions", ofFew, "r", ".*|%d", ""},
		{"invalid expressions", ofFew, "r", "(%d", ""},
		{"classes", ofFew, "r", ".*|" + strings.Repeat("[acegikmoqsuwyACEGIKMOQSUWY02468:/,-]", 100) + "%d", ""},
		{"groups", ofFew, "r", ".*|" + strings.Repeat("()", 400) + "%d", ""},
		{"lists", ofFew, "r", "", `["*","%d"]`},
		{"lists of stars", ofFew, "r", "", "[" + strings.Repeat(`"`+strings.Repeat("*", 32)+`",`, 998) + `"*","%d"]`},
		{"namespaces", ofMany, "r", ".*", ""},
		{"namespaces with lists", ofMany, "r", "", `["*"]`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rules, err := New(Config{Keys: keys})
			if err != nil {
				t.Fatal(err)
			}
			before := heap()
			for i, cost := 0, 0; rules.CachedCost() >= cost && rules.CachedCost() < maxCached/4; i++ {
				cost = rules.CachedCost()
				number := func(text string) string { return strings.ReplaceAll(text, "%d", fmt.Sprint(i)) }
				ns := Namespace{Name: tt.namespace(i), Labels: map[string]string{keys.Name(Inject): Enabled}, Annotations: map[string]string{}}
				pod := Pod{Namespace: ns.Name, Request: keys.Request(map[string]string{keys.Name(Role): "arn:aws:iam::123456789012:role/" + number(tt.role)})}
				if tt.permitted != "" {
					ns.Annotations[keys.Name(Permitted)] = number(tt.permitted)
				}
				if tt.allowed != "" {
					ns.Annotations[keys.Name(AllowedRoles)] = number(tt.allowed)
				}
				_, _ = rules.Grant(pod, ns)
			}
			taken, counted := heap()-before, rules.CachedCost()
			if taken > counted*5/4 || counted < maxCached/5 {
				t.Errorf("the cache counts %d bytes, and takes %d", counted, taken)
			}
			runtime.KeepAlive(rules)
		})
	}
}
