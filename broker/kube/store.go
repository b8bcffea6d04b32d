package kube

import (
	"maps"
	"slices"
	"sync"
)

// store holds the objects of one watch in memory, and notifies handlers of changes.
type store struct {
	changed *broadcast

	mu       sync.RWMutex
	objects  map[string]map[string]*object // :: namespace → name → object; guarded by mu
	listed   bool                          // guarded by mu
	handlers []func(*object)               // guarded by mu
}

func newStore(changed *broadcast) store {
	return store{changed: changed, objects: make(map[string]map[string]*object)}
}

// get returns the object of that name; nil if there is none.
func (s *store) get(namespace, name string) *object {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.objects[namespace][name]
}

// synced reports whether the store has had a complete list, and the handlers were notified of it.
func (s *store) synced() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.listed
}

// keys returns the keys of all objects of a namespace.
func (s *store) keys(namespace string) []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys := make([]string, 0, len(s.objects[namespace]))
	for _, o := range s.objects[namespace] {
		keys = append(keys, o.key())
	}
	return keys
}

// allKeys returns the keys of all objects.
func (s *store) allKeys() (keys []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, objects := range s.objects {
		for _, o := range objects {
			keys = append(keys, o.key())
		}
	}
	return keys
}

// used returns the subsets that objects have.
func (s *store) used() map[*metaSubset]bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	used := make(map[*metaSubset]bool)
	for _, objects := range s.objects {
		for _, o := range objects {
			used[o.metaSubset] = true
		}
	}
	return used
}

// onChange calls handler with each object in the store, and later with each that is added, changed or removed, when get
// shows the change. The handler must not block: the watch waits for it.
func (s *store) onChange(handler func(*object)) {
	s.mu.Lock()
	s.handlers = append(s.handlers, handler)
	var all []*object
	for _, objects := range s.objects {
		all = slices.AppendSeq(all, maps.Values(objects))
	}
	s.mu.Unlock()
	for _, o := range all {
		handler(o)
	}
}

// set adds or replaces an object. It notifies the handlers unless the store has this very object.
func (s *store) set(o *object) {
	s.mu.Lock()
	before := s.objects[o.namespace][o.name]
	if s.objects[o.namespace] == nil {
		s.objects[o.namespace] = make(map[string]*object)
	}
	s.objects[o.namespace][o.name] = o
	handlers := s.handlers
	s.mu.Unlock()
	if before != o {
		s.notify(handlers, o)
	}
}

// remove removes an object. It notifies the handlers if the store has one of that name.
func (s *store) remove(o *object) {
	s.mu.Lock()
	before := s.objects[o.namespace][o.name]
	delete(s.objects[o.namespace], o.name)
	if len(s.objects[o.namespace]) == 0 {
		delete(s.objects, o.namespace)
	}
	handlers := s.handlers
	s.mu.Unlock()
	if before != nil {
		s.notify(handlers, o)
	}
}

// replace replaces all objects by a complete list.
func (s *store) replace(all []*object) {
	s.mu.Lock()
	before := s.objects
	s.objects = make(map[string]map[string]*object, len(before))
	var different []*object
	for _, o := range all {
		in := s.objects[o.namespace]
		if in == nil {
			in = make(map[string]*object, len(before[o.namespace]))
			s.objects[o.namespace] = in
		}
		in[o.name] = o
		if before[o.namespace][o.name] != o {
			different = append(different, o)
		}
	}
	for namespace, objects := range before {
		for name, o := range objects {
			if s.objects[namespace][name] == nil {
				different = append(different, o)
			}
		}
	}
	handlers := s.handlers
	s.mu.Unlock()
	for _, o := range different {
		s.notify(handlers, o)
	}
	s.mu.Lock()
	s.listed = true
	s.mu.Unlock()
	s.changed.send()
}

func (s *store) notify(handlers []func(*object), o *object) {
	for _, handler := range handlers {
		handler(o)
	}
	s.changed.send()
}
