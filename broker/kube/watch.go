package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"

	"github.com/credence-iam/credence/broker/policy"
)

const (
	// pageSize bounds what is in memory of a list at once: 500 objects are some 3 MB as they arrive. An API
	// server that streams (Kubernetes 1.34, by default) is not asked for lists at all.
	pageSize = 500
	// maxPages bounds a list whose end does not come: five million objects are more than any API server has.
	maxPages = 10_000
	// firstPause and longestPause are those between two attempts to watch. client-go's own grow to a minute,
	// which is long to be blind in after the API server is back; brokers are few, so they may knock more often.
	firstPause   = 500 * time.Millisecond
	longestPause = 5 * time.Second
	// quiet is how long a healthy watch may bring nothing: API servers send a bookmark about once a minute.
	quiet = 3 * time.Minute
)

// watched is one metadata-only watch of a resource, and what is kept of its objects.
//
// It is a reflector of client-go with a store of our own in the place of a shared informer, which keeps the type
// that it receives and puts every list into queues besides. With 100,000 pods informers took the broker to
// 1.1 GB and more at the peak of lists that come in one piece, and to 0.53 GB of streamed ones; this takes it to
// between 0.18 and 0.23 GB of either (broker_rss_100k_pods_bytes of the benchmark).
type watched struct {
	resource string
	client   metadata.Getter
	tweak    func(*metav1.ListOptions) // may be nil
	// labels and annotations say which of them are kept; nil keeps none.
	labels, annotations func(name string) bool
	// parse reads the annotations of pods; nil for other objects, whose annotations stay as they are.
	parse   func(annotations map[string]string) *policy.Request
	changed *broadcast

	mu       sync.RWMutex
	objects  map[string]map[string]*object // :: namespace → name → object; guarded by mu
	listed   bool                          // guarded by mu
	handlers []func(*object)               // guarded by mu

	shareMu sync.Mutex
	shared  map[string]*texts // :: canonical form → texts; guarded by shareMu
	sweepAt int               // size of shared at which what is not used is dropped; guarded by shareMu

	hearing
}

// object is what is kept of a watched object. It is never changed, and stays the same pointer for as long as
// nothing of it changes, however often it is listed.
type object struct {
	namespace, name, uid string
	*texts
}

// texts are labels and annotations. Objects that have equal ones share them: the pods of a Deployment
// differ in name and UID only. They are never changed.
type texts struct {
	labels, annotations map[string]string

	parse  func(annotations map[string]string) *policy.Request
	parsed sync.Once
	result *policy.Request // set by parsed, which drops the annotations
}

// request returns what the annotations of a pod ask for. It parses them when it is first called, and once for all pods
// that have the same. So the watch does not wait for that, whatever the annotations of any pod: a caller waits for its own
// pod, and prefetch for one pod of each namespace in turn. All that the pods of a namespace can make the broker parse is
// one text for each pod created, 4 ms at most, which is less than the API server and the webhook need to admit the pod.
func (t *texts) request() *policy.Request {
	t.parsed.Do(func() { t.result, t.annotations = t.parse(t.annotations), nil })
	return t.result
}

func (o *object) key() string { return o.namespace + "/" + o.name }

// GetObjectKind and DeepCopyObject let objects be in client-go's list type.

func (o *object) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }
func (o *object) DeepCopyObject() runtime.Object   { return o }

func newWatched(client metadata.Interface, resource string, changed *broadcast) *watched {
	return &watched{
		resource: resource,
		client:   client.Resource(corev1.SchemeGroupVersion.WithResource(resource)),
		changed:  changed,
		objects:  make(map[string]map[string]*object),
		shared:   make(map[string]*texts),
	}
}

// run watches until ctx ends.
func (w *watched) run(ctx context.Context) {
	w.hear(nil)
	cache.NewReflectorWithOptions(source{w}, &metav1.PartialObjectMetadata{}, sink{w}, cache.ReflectorOptions{
		Name:    "credence/" + w.resource,
		Backoff: &wait.Backoff{Duration: firstPause, Cap: longestPause, Steps: 16, Factor: 2, Jitter: 0.5},
	}).RunWithContext(ctx)
}

// get returns the object of that name, nil when there is none.
func (w *watched) get(namespace, name string) *object {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.objects[namespace][name]
}

// synced reports whether everything has been listed once, and the handlers told.
func (w *watched) synced() bool {
	w.mu.RLock()
	defer w.mu.RUnlock()
	return w.listed
}

// keys are those of all objects of a namespace.
func (w *watched) keys(namespace string) []string {
	w.mu.RLock()
	defer w.mu.RUnlock()
	keys := make([]string, 0, len(w.objects[namespace]))
	for _, o := range w.objects[namespace] {
		keys = append(keys, o.key())
	}
	return keys
}

// allKeys are those of all objects.
func (w *watched) allKeys() (keys []string) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	for _, objects := range w.objects {
		for _, o := range objects {
			keys = append(keys, o.key())
		}
	}
	return keys
}

// onChange calls handler with each object that there is, and from then on with each that appears, changes
// or goes, after that can be seen. It must not block: the watch waits for it.
func (w *watched) onChange(handler func(*object)) {
	w.mu.Lock()
	w.handlers = append(w.handlers, handler)
	var all []*object
	for _, objects := range w.objects {
		all = slices.AppendSeq(all, maps.Values(objects))
	}
	w.mu.Unlock()
	for _, o := range all {
		handler(o)
	}
}

// hearing is when a watch last heard of the API server.
type hearing struct {
	mu    sync.Mutex
	heard time.Time // when the API server last sent something; zero before it was asked; guarded by mu
	away  bool      // when last asked, it did not answer; guarded by mu
}

// age is how long ago the API server was last heard, and 0 while the watch is well.
func (h *hearing) age() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.heard.IsZero() {
		return 0
	}
	if age := time.Since(h.heard); h.away || age > quiet {
		return age
	}
	return 0
}

// hear notes that the API server was asked, or sent something, and what came of it. An answer that is a
// refusal, such as one for lack of rights, keeps the watch from hearing of changes just as well; that a
// version has expired does not, for a new list follows at once.
func (h *hearing) hear(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		h.away = true
		return
	}
	h.away, h.heard = false, time.Now()
}

// cut returns what is kept of m: the very object that is held, if nothing of it has changed.
func (w *watched) cut(m *metav1.PartialObjectMetadata) *object {
	t := w.share(m.Labels, m.Annotations)
	if held := w.get(m.Namespace, m.Name); held != nil && held.uid == string(m.UID) && held.texts == t {
		return held
	}
	return &object{namespace: m.Namespace, name: m.Name, uid: string(m.UID), texts: t}
}

// share returns the texts that are kept of these, the same ones for equal ones.
func (w *watched) share(labels, annotations map[string]string) *texts {
	form := appendKept(appendKept(nil, labels, w.labels), annotations, w.annotations)
	w.shareMu.Lock()
	defer w.shareMu.Unlock()
	if t, ok := w.shared[string(form)]; ok {
		return t
	}
	canonical := string(form)
	t := &texts{parse: w.parse}
	// Cut out of the canonical form, so that their bytes are there once.
	var rest string
	t.labels, rest = takeKept(canonical)
	t.annotations, _ = takeKept(rest)
	w.shared[canonical] = t
	return t
}

// appendKept appends the kept ones of a map: their number, and of each its key and value in the order of keys,
// each behind its length.
func appendKept(b []byte, all map[string]string, keep func(string) bool) []byte {
	var names []string
	if keep != nil {
		for name := range all {
			if keep(name) {
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

// takeKept reads what appendKept wrote. A map of none is nil.
func takeKept(canonical string) (all map[string]string, rest string) {
	count, rest := takeNumber(canonical)
	if count > 0 {
		all = make(map[string]string, count)
	}
	for range count {
		var pair [2]string
		for i := range pair {
			var n int
			n, rest = takeNumber(rest)
			pair[i], rest = rest[:n], rest[n:]
		}
		all[pair[0]] = pair[1]
	}
	return all, rest
}

func takeNumber(s string) (int, string) {
	digits, rest, _ := strings.Cut(s, ":")
	n, _ := strconv.Atoi(digits) // appendKept wrote it
	return n, rest
}

// sweep drops texts that no object has any more, once there are so many that it pays.
func (w *watched) sweep() {
	w.shareMu.Lock()
	defer w.shareMu.Unlock()
	if len(w.shared) < w.sweepAt {
		return
	}
	used := make(map[*texts]bool)
	w.mu.RLock()
	for _, objects := range w.objects {
		for _, o := range objects {
			used[o.texts] = true
		}
	}
	w.mu.RUnlock()
	maps.DeleteFunc(w.shared, func(_ string, t *texts) bool { return !used[t] })
	w.sweepAt = 2*len(w.shared) + 1000
}

// put stores an object, or removes it, and tells the handlers if that changes anything.
func (w *watched) put(o *object, there bool) {
	w.mu.Lock()
	held := w.objects[o.namespace][o.name]
	if there {
		if w.objects[o.namespace] == nil {
			w.objects[o.namespace] = make(map[string]*object)
		}
		w.objects[o.namespace][o.name] = o
	} else if held != nil {
		delete(w.objects[o.namespace], o.name)
		if len(w.objects[o.namespace]) == 0 {
			delete(w.objects, o.namespace)
		}
	}
	handlers := w.handlers
	w.mu.Unlock()
	if there && held != o || !there && held != nil {
		w.tell(handlers, o)
	}
	w.sweep()
}

func (w *watched) tell(handlers []func(*object), o *object) {
	for _, handler := range handlers {
		handler(o)
	}
	w.changed.send()
}

// replace stores these objects in the place of all that there are.
func (w *watched) replace(all []*object) {
	w.mu.Lock()
	old := w.objects
	w.objects = make(map[string]map[string]*object, len(old))
	var different []*object
	for _, o := range all {
		in := w.objects[o.namespace]
		if in == nil {
			in = make(map[string]*object, len(old[o.namespace]))
			w.objects[o.namespace] = in
		}
		in[o.name] = o
		if old[o.namespace][o.name] != o {
			different = append(different, o)
		}
	}
	for namespace, objects := range old {
		for name, o := range objects {
			if w.objects[namespace][name] == nil {
				different = append(different, o)
			}
		}
	}
	handlers := w.handlers
	w.mu.Unlock()
	for _, o := range different {
		w.tell(handlers, o)
	}
	w.mu.Lock()
	w.listed = true
	w.mu.Unlock()
	w.changed.send()
	w.sweep()
}

// source is what the reflector reads: client-go's metadata client, overheard.
type source struct{ w *watched }

func (s source) options(o metav1.ListOptions) metav1.ListOptions {
	if s.w.tweak != nil {
		s.w.tweak(&o)
	}
	return o
}

// ListWithContext reads page after page and keeps of each no more than is kept for good. Asked as a reflector
// asks by itself, an API server answers from its watch cache with everything at once, which for 100,000 pods is
// 300 MB in one piece.
func (s source) ListWithContext(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	o = s.options(o)
	o.ResourceVersion, o.ResourceVersionMatch, o.Limit, o.Continue = "", "", pageSize, ""
	all := new(internalversion.List)
	for range maxPages {
		page, err := s.w.client.List(ctx, o)
		s.w.hear(err)
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w", s.w.resource, err)
		}
		for i := range page.Items {
			all.Items = append(all.Items, s.w.cut(&page.Items[i]))
		}
		if all.ResourceVersion = page.ResourceVersion; page.Continue == "" {
			return all, nil
		}
		o.Continue = page.Continue
	}
	return nil, fmt.Errorf("listing %s: there is no end after %d pages", s.w.resource, maxPages)
}

// WatchWithContext watches, and notes whatever comes.
func (s source) WatchWithContext(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	w, err := s.w.client.Watch(ctx, s.options(o))
	s.w.hear(err)
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", s.w.resource, err)
	}
	return overhear(w, &s.w.hearing), nil
}

// overhear returns a watch of which every event is noted.
func overhear(w watch.Interface, h *hearing) watch.Interface {
	heard := &overheard{Interface: w, events: make(chan watch.Event), stopped: make(chan struct{})}
	go heard.listen(h)
	return heard
}

// overheard is such a watch. watch.Filter would do, but leaves its goroutine behind when
// it is stopped with an event on the way.
type overheard struct {
	watch.Interface
	events  chan watch.Event
	stop    sync.Once
	stopped chan struct{}
}

func (o *overheard) listen(h *hearing) {
	defer close(o.events)
	for e := range o.Interface.ResultChan() {
		if e.Type == watch.Error {
			h.hear(apierrors.FromObject(e.Object))
		} else {
			h.hear(nil)
		}
		select {
		case o.events <- e:
		case <-o.stopped:
			return
		}
	}
}

// ResultChan implements watch.Interface.
func (o *overheard) ResultChan() <-chan watch.Event { return o.events }

// Stop implements watch.Interface.
func (o *overheard) Stop() {
	o.stop.Do(func() { close(o.stopped) })
	o.Interface.Stop()
}

// List and Watch are what reflectors called before there were contexts. None does where the two above are.

func (source) List(metav1.ListOptions) (runtime.Object, error)   { return nil, errNoContext }
func (source) Watch(metav1.ListOptions) (watch.Interface, error) { return nil, errNoContext }

var errNoContext = errors.New("a watch was asked for without a context")

// sink is what the reflector writes to. It calls from one goroutine.
type sink struct{ w *watched }

// Transformer cuts each object of a streamed list as it arrives.
func (s sink) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if m, ok := obj.(*metav1.PartialObjectMetadata); ok {
			return s.w.cut(m), nil
		}
		return obj, nil
	}
}

func (s sink) object(obj any) (*object, error) {
	switch o := obj.(type) {
	case *object:
		return o, nil
	case *metav1.PartialObjectMetadata:
		return s.w.cut(o), nil
	default:
		return nil, fmt.Errorf("a watch of %s brought %T", s.w.resource, obj)
	}
}

func (s sink) set(obj any, there bool) error {
	o, err := s.object(obj)
	if err == nil {
		s.w.put(o, there)
	}
	return err
}

func (s sink) Add(obj any) error    { return s.set(obj, true) }
func (s sink) Update(obj any) error { return s.set(obj, true) }
func (s sink) Delete(obj any) error { return s.set(obj, false) }
func (s sink) Resync() error        { return nil }

func (s sink) Replace(list []any, _ string) error {
	all := make([]*object, 0, len(list))
	for _, obj := range list {
		o, err := s.object(obj)
		if err != nil {
			return err
		}
		all = append(all, o)
	}
	s.w.replace(all)
	return nil
}
