package kube

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/credence-iam/credence/broker/policy"
)

// object is the part of a watched object that decisions need. It never changes. While nothing of it changes, it is the same
// pointer, in each list and event.
type object struct {
	namespace, name, uid string
	*metaSubset
}

func (o *object) key() string { return o.namespace + "/" + o.name }

// GetObjectKind and DeepCopyObject let client-go's list type hold objects.

func (o *object) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }
func (o *object) DeepCopyObject() runtime.Object   { return o }

// metaSubset holds the labels and annotations of an object that decisions need. Objects with equal ones share it: the pods
// of a Deployment differ in name and UID only. The maps never change.
type metaSubset struct {
	labels, annotations map[string]string

	parse  func(annotations map[string]string) *policy.Request // nil unless the object is a pod
	parsed sync.Once
	result *policy.Request // set by parsed, which drops the annotations
}

// request returns what the annotations of a pod request. The first call parses them, once for all pods with equal ones. So
// parsing never delays the watch: a caller waits for its own pod, and prefetch for one pod of each namespace in turn. The
// pods of one namespace make the broker parse at most once for each pod created, and for 4 ms at most
// ([policy.Keys.Request]), less than the API server and the webhook need to admit the pod.
func (m *metaSubset) request() *policy.Request {
	m.parsed.Do(func() { m.result, m.annotations = m.parse(m.annotations), nil })
	return m.result
}

// interning stores each distinct metaSubset once.
type interning struct {
	// labels and annotations select the names to store; nil selects none.
	labels, annotations func(name string) bool
	// parse reads the annotations of pods; nil for other objects.
	parse func(annotations map[string]string) *policy.Request

	mu      sync.Mutex
	shared  map[string]*metaSubset // :: canonical form → subset; guarded by mu
	sweepAt int                    // size of shared at which sweep drops unused ones; guarded by mu
}

// subset returns the stored subset of these labels and annotations.
func (i *interning) subset(labels, annotations map[string]string) *metaSubset {
	form := appendSelected(appendSelected(nil, labels, i.labels), annotations, i.annotations)
	i.mu.Lock()
	defer i.mu.Unlock()
	if m, ok := i.shared[string(form)]; ok {
		return m
	}
	canonical := string(form)
	m := &metaSubset{parse: i.parse}
	// The maps are substrings of the canonical form, so that their bytes are in memory once.
	var rest string
	m.labels, rest = cutSelected(canonical)
	m.annotations, _ = cutSelected(rest)
	if i.shared == nil {
		i.shared = make(map[string]*metaSubset)
	}
	i.shared[canonical] = m
	return m
}

// sweep drops the subsets that used does not return, if there are enough to be worth it.
func (i *interning) sweep(used func() map[*metaSubset]bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.shared) < i.sweepAt {
		return
	}
	inUse := used()
	maps.DeleteFunc(i.shared, func(_ string, m *metaSubset) bool { return !inUse[m] })
	i.sweepAt = 2*len(i.shared) + 1000
}

// reduce returns the part of m to store: the object before if nothing has changed.
func (i *interning) reduce(m *metav1.PartialObjectMetadata, before *object) *object {
	subset := i.subset(m.Labels, m.Annotations)
	if before != nil && before.uid == string(m.UID) && before.metaSubset == subset {
		return before
	}
	return &object{namespace: m.Namespace, name: m.Name, uid: string(m.UID), metaSubset: subset}
}

// appendSelected appends the selected entries of a map: their number, and the key and value of each in the order of keys,
// each behind its length.
func appendSelected(b []byte, all map[string]string, selects func(string) bool) []byte {
	var names []string
	if selects != nil {
		for name := range all {
			if selects(name) {
				names = append(names, name)
			}
		}
		slices.Sort(names)
	}
	b = append(strconv.AppendInt(b, int64(len(names)), 10), ':')
	for _, name := range names {
		for _, s := range []string{name, all[name]} {
			b = append(append(strconv.AppendInt(b, int64(len(s)), 10), ':'), s...)
		}
	}
	return b
}

// cutSelected reads a map that appendSelected wrote, and returns the text behind it. An empty map is nil.
func cutSelected(canonical string) (all map[string]string, rest string) {
	count, rest := cutNumber(canonical)
	if count > 0 {
		all = make(map[string]string, count)
	}
	for range count {
		var pair [2]string
		for at := range pair {
			var n int
			n, rest = cutNumber(rest)
			pair[at], rest = rest[:n], rest[n:]
		}
		all[pair[0]] = pair[1]
	}
	return all, rest
}

func cutNumber(s string) (int, string) {
	digits, rest, _ := strings.Cut(s, ":")
	n, _ := strconv.Atoi(digits) // appendSelected wrote it
	return n, rest
}
