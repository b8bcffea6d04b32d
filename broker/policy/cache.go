package policy

import (
	"errors"
	"strings"
	"sync"
)

// Bounds of what one [Rules] caches, in bytes as estimated below.
const (
	// maxCached bounds all namespaces together. It has room for some three thousand expressions of ordinary length.
	// Where there are more, some are compiled again now and then, which takes 20 µs.
	maxCached = 32 << 20
	// maxCachedEach bounds one namespace. A user who may change a namespace may write a new expression into it every
	// second, so a bound on their number would be none. It has room for the largest expression.
	maxCachedEach = 4 << 20
	// namespaceCost, textCost and answerCost are about how many bytes a namespace, a text and an answer take besides
	// their content. Most of it is for maps with free places.
	namespaceCost = 1000
	textCost      = 350
	answerCost    = 100
)

// kind says what a cached text is.
type kind string

// The kinds. The text of the last three is the generation of the rules file, because their answers depend on the list of
// the entry that matches the namespace.
const (
	permittedText    kind = "permitted"
	allowedText      kind = "allowed-roles"
	rulesRoles       kind = "roles"
	rulesExternalIDs kind = "externalIDs"
	rulesNames       kind = "sessionNames"
)

// cache remembers the meaning of the texts of a namespace, and their answers. A changed text is another one, so a
// change takes effect at once. No namespace evicts what another one has, as long as that is within its equal share.
// The zero value is ready.
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

// text is a text that has been seen.
type text struct {
	parsed  bool // meant has been found out
	meant   meant
	answers map[string]answer // :: subject of the decision, such as a role's ARN → the answer
}

// meant is what a text means.
type meant struct {
	value any
	err   error // why it means nothing
}

type answer struct {
	yes bool
	err error
}

// meaning returns what text means, or why it means nothing, if that is cached.
func (c *cache) meaning(namespace string, key textKey) (m meant, ok bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if n := c.namespaces[namespace]; n != nil {
		if t := n.texts[key]; t != nil {
			return t.meant, t.parsed
		}
	}
	return meant{}, false
}

// answer returns what text answers about a subject, if that is cached.
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

// keep has change note something about a text, which takes about cost bytes more. It does nothing if there is no room.
func (c *cache) keep(namespace string, key textKey, cost int, change func(*text)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Assume that neither is there, so that the cost does not depend on the evictions below.
	reserved := cost + textCost + len(key.text) + namespaceCost
	if n := c.namespaces[namespace]; n != nil && n.cost+reserved > maxCachedEach {
		c.drop(namespace)
	}
	if c.cost+reserved > maxCached {
		share := maxCached / (len(c.namespaces) + 1)
		for name, n := range c.namespaces {
			if n.cost >= share {
				c.drop(name)
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

// drop forgets a namespace. The caller holds mu.
func (c *cache) drop(namespace string) {
	c.cost -= c.namespaces[namespace].cost
	delete(c.namespaces, namespace)
}

// evaluation is the part of a decision that may take long: it reads texts and matches them. It uses what the cache
// has. Whether it may evaluate what the cache lacks is up to its caller, because that takes a turn at the gate.
type evaluation struct {
	rules     *Rules
	namespace string
	mayWork   bool
	lacks     bool // the cache lacks something, and mayWork is false: what the evaluation returns means nothing

	file  *limits // nil: there is no rules file
	entry *entry  // that matches the namespace; nil: there is no rules file
}

// errNotCached never leaves the package.
var errNotCached = errors.New("not cached")

// meaning returns what a text means: what parse returns, with about how many bytes it takes.
func meaning[T any](e *evaluation, kind kind, of string, parse func(string) (T, int, error)) (T, error) {
	key := textKey{kind, of}
	if m, ok := e.rules.cache.meaning(e.namespace, key); ok {
		return m.value.(T), m.err
	}
	if !e.mayWork {
		e.lacks = true
		var none T
		return none, errNotCached
	}
	key.text = strings.Clone(of) // it may be a part of a longer text, which would be kept with it
	value, cost, err := parse(key.text)
	if err != nil {
		cost = len(err.Error())
	}
	e.rules.cache.keep(e.namespace, key, cost, func(t *text) { t.parsed, t.meant = true, meant{value, err} })
	return value, err
}

// ask returns what a text answers about a subject: what match returns.
func (e *evaluation) ask(kind kind, of, subject string, match func(e *evaluation, of, subject string) (bool, error)) (bool, error) {
	key := textKey{kind, of}
	if a, ok := e.rules.cache.answer(e.namespace, key, subject); ok {
		return a.yes, a.err
	}
	if !e.mayWork {
		e.lacks = true
		return false, errNotCached
	}
	yes, err := match(e, of, subject)
	cost := answerCost + len(subject)
	if err != nil {
		cost += len(err.Error())
	}
	e.rules.cache.keep(e.namespace, key, cost, func(t *text) {
		if t.answers == nil {
			t.answers = make(map[string]answer)
		}
		t.answers[strings.Clone(subject)] = answer{yes, err}
	})
	return yes, err
}
