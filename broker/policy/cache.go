package policy

import (
	"errors"
	"strings"
	"sync"
)

// Bounds of the cache of one [Rules], in estimated bytes.
const (
	// maxCached bounds all namespaces together. It has room for about three thousand expressions of ordinary length. With more,
	// some are compiled again from time to time, which takes 20 µs.
	maxCached = 32 << 20
	// maxCachedEach bounds one namespace. It has room for the largest expression. A user who may change a namespace may write
	// a new expression every second, so a bound on their number would not help.
	maxCachedEach = 4 << 20
	// namespaceCost, textCost and answerCost are about how many bytes a namespace, a text and an answer take besides their
	// content. Most of it is for maps with free places.
	namespaceCost = 1000
	textCost      = 350
	answerCost    = 100
)

// kind is the kind of a cached text.
type kind string

// The kinds. The text of the last three is the generation of the rules file, because the answers depend on a list in the
// entry that matches the namespace.
const (
	permittedText    kind = "permitted"
	allowedText      kind = "allowed-roles"
	rulesRoles       kind = "roles"
	rulesExternalIDs kind = "externalIDs"
	rulesNames       kind = "sessionNames"
)

// cache holds compiled texts of namespaces, and their answers. A changed text is another text, so a change takes effect
// immediately. A namespace evicts nothing of another namespace that uses no more than its equal share. The zero value is
// ready.
type cache struct {
	mu         sync.RWMutex
	namespaces map[string]*cached // guarded by mu
	cost       int                // estimated bytes of all; guarded by mu
}

// cached holds the texts of one namespace.
type cached struct {
	texts map[textKey]*text
	cost  int // estimated bytes
}

type textKey struct {
	kind kind
	text string
}

// text is the cached result of one text.
type text struct {
	isCompiled bool
	compiled   compiled
	answers    map[string]answer // :: subject of the decision, such as a role's ARN → the answer
}

// compiled is a compiled text, or the error of an invalid one.
type compiled struct {
	value any
	err   error
}

type answer struct {
	yes bool
	err error
}

// compiled returns the compiled text if it is cached.
func (c *cache) compiled(namespace string, key textKey) (result compiled, ok bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if n := c.namespaces[namespace]; n != nil {
		if t := n.texts[key]; t != nil {
			return t.compiled, t.isCompiled
		}
	}
	return compiled{}, false
}

// answer returns the text's answer about a subject if it is cached.
func (c *cache) answer(namespace string, key textKey, subject string) (answer, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if n := c.namespaces[namespace]; n != nil {
		if t := n.texts[key]; t != nil {
			a, ok := t.answers[subject]
			return a, ok
		}
	}
	return answer{}, false
}

// add calls change to add something of about cost bytes to a text. If there is no room, it does nothing.
func (c *cache) add(namespace string, key textKey, cost int, change func(*text)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Assume that neither namespace nor text is cached, so that the cost does not depend on the evictions below.
	reserved := cost + textCost + len(key.text) + namespaceCost
	if n := c.namespaces[namespace]; n != nil && n.cost+reserved > maxCachedEach {
		c.evict(namespace)
	}
	if c.cost+reserved > maxCached {
		equalShare := maxCached / (len(c.namespaces) + 1)
		for name, n := range c.namespaces {
			if n.cost >= equalShare {
				c.evict(name)
			}
		}
	}
	if reserved > maxCachedEach || c.cost+reserved > maxCached {
		return
	}
	n := c.namespaces[namespace]
	if n == nil {
		if c.namespaces == nil {
			c.namespaces = make(map[string]*cached)
		}
		n = &cached{texts: make(map[textKey]*text), cost: namespaceCost}
		c.namespaces[namespace] = n
		c.cost += namespaceCost
	}
	t := n.texts[key]
	if t == nil {
		t = &text{}
		n.texts[key] = t
		cost += textCost + len(key.text)
	}
	change(t)
	n.cost += cost
	c.cost += cost
}

// evict drops everything of a namespace. The caller holds mu.
func (c *cache) evict(namespace string) {
	c.cost -= c.namespaces[namespace].cost
	delete(c.namespaces, namespace)
}

// evaluation is the part of a decision that may take long: it compiles texts and matches them. It uses cached results. Its
// caller says whether it may compute results that are not cached, because that needs a turn at the gate.
type evaluation struct {
	rules      *Rules
	namespace  string
	mayCompute bool
	incomplete bool // a result is not cached, and mayCompute is false; the result of the evaluation is then invalid

	file  *limits // nil: there is no rules file
	entry *entry  // the entry that matches the namespace; nil: there is no rules file
}

// errNotCached never leaves the package.
var errNotCached = errors.New("not cached")

// compile returns the compiled text of a kind. compute returns it together with about how many bytes it takes.
func compile[T any](e *evaluation, kind kind, of string, compute func(string) (T, int, error)) (T, error) {
	key := textKey{kind, of}
	if c, ok := e.rules.cache.compiled(e.namespace, key); ok {
		return c.value.(T), c.err
	}
	if !e.mayCompute {
		e.incomplete = true
		var none T
		return none, errNotCached
	}
	key.text = strings.Clone(of) // A substring would keep the longer text in memory.
	value, cost, err := compute(key.text)
	if err != nil {
		cost = len(err.Error())
	}
	e.rules.cache.add(e.namespace, key, cost, func(t *text) { t.isCompiled, t.compiled = true, compiled{value, err} })
	return value, err
}

// answer returns the answer of a text about a subject, as match returns it.
func (e *evaluation) answer(kind kind, of, subject string, match func(e *evaluation, of, subject string) (bool, error)) (bool, error) {
	key := textKey{kind, of}
	if a, ok := e.rules.cache.answer(e.namespace, key, subject); ok {
		return a.yes, a.err
	}
	if !e.mayCompute {
		e.incomplete = true
		return false, errNotCached
	}
	yes, err := match(e, of, subject)
	cost := answerCost + len(subject)
	if err != nil {
		cost += len(err.Error())
	}
	e.rules.cache.add(e.namespace, key, cost, func(t *text) {
		if t.answers == nil {
			t.answers = make(map[string]answer)
		}
		t.answers[strings.Clone(subject)] = answer{yes, err}
	})
	return yes, err
}
