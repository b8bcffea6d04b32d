package policy

import "sync"

// maxMemo bounds what one memo keeps, in bytes as its callers estimate them. Whoever may change a
// namespace may write a new expression into it every second, so a bound on their number would be none.
// This is enough for some three thousand expressions of ordinary length. Where there are more, one is
// compiled anew now and then, which takes 20 µs.
const maxMemo = 32 << 20

// memo keeps what was made of texts that every call brings again. The zero value is ready.
type memo[T any] struct {
	mu   sync.RWMutex
	kept map[string]T // :: text → what was made of it; guarded by mu
	cost int          // estimated bytes of kept; guarded by mu
}

// get returns what parse makes of text, with about how many bytes it takes; errors are not kept.
func (m *memo[T]) get(text string, parse func(string) (T, int, error)) (T, error) {
	m.mu.RLock()
	value, ok := m.kept[text]
	m.mu.RUnlock()
	if ok {
		return value, nil
	}
	// Without the lock: what one namespace says may take long, and others must not wait for it. Two
	// callers at once do the work twice.
	value, cost, err := parse(text)
	if err != nil {
		return value, err
	}
	if cost += len(text); cost > maxMemo/8 {
		return value, nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.kept[text]; ok {
		return value, nil
	}
	if m.kept == nil || m.cost+cost > maxMemo {
		m.kept, m.cost = make(map[string]T), 0
	}
	m.kept[text] = value
	m.cost += cost
	return value, nil
}
