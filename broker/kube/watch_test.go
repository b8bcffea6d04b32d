package kube_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
)

// world is an API server that serves lists, watches and single reads of its objects.
type world struct {
	away    atomic.Bool
	reads   atomic.Int64 // of single objects
	largest atomic.Int64 // page
	streams bool         // whether it streams lists
	silent  atomic.Bool  // whether it sends no bookmarks
	behind  atomic.Bool  // whether its watches send nothing, while reads return current objects

	mu      sync.Mutex
	objects map[string]map[string]metav1.PartialObjectMetadata // :: resource → path → object; guarded by mu
	phases  map[string]corev1.PodPhase                         // :: path → phase of a pod; guarded by mu
	version int                                                // guarded by mu
	changed chan struct{}                                      // closed at the next change; guarded by mu
	events  []change                                           // guarded by mu
	expired chan struct{}                                      // closed to end all watches with 410; guarded by mu
	cut     chan struct{}                                      // closed to end all watches; guarded by mu
}

type change struct {
	version  int
	resource string
	kind     string
	object   metav1.PartialObjectMetadata
	phase    corev1.PodPhase
}

// selects reports whether a list or watch selects the object, by its labels and its phase.
func selects(r *http.Request, m metav1.PartialObjectMetadata, phase corev1.PodPhase) bool {
	byLabels, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		return false
	}
	byFields, err := fields.ParseSelector(r.URL.Query().Get("fieldSelector"))
	return err == nil && byLabels.Matches(labels.Set(m.Labels)) && byFields.Matches(fields.Set{"status.phase": string(phase)})
}

func newWorld() *world {
	return &world{objects: make(map[string]map[string]metav1.PartialObjectMetadata), phases: make(map[string]corev1.PodPhase), changed: make(chan struct{}), expired: make(chan struct{}), cut: make(chan struct{})}
}

func (w *world) put(kind, resource, namespace, name, uid string, annotations map[string]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.version++
	m := metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"}}
	m.Namespace, m.Name, m.UID, m.ResourceVersion, m.Annotations = namespace, name, types.UID(uid), strconv.Itoa(w.version), annotations
	m.Labels = map[string]string{policy.DefaultPrefix + "/inject": "enabled", policy.DefaultPrefix + "/injected": "true", "other": "x"}
	m.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "kubelet"}}
	if w.objects[resource] == nil {
		w.objects[resource] = make(map[string]metav1.PartialObjectMetadata)
	}
	w.objects[resource][namespace+"/"+name] = m
	if kind == "DELETED" {
		delete(w.objects[resource], namespace+"/"+name)
	}
	w.record(change{w.version, resource, kind, m, w.phases[namespace+"/"+name]})
}

// record records a change for the watches. The caller holds mu.
func (w *world) record(c change) {
	w.events = append(w.events, c)
	close(w.changed)
	w.changed = make(chan struct{})
}

// edit changes an existing object.
func (w *world) edit(resource, path string, edit func(*metav1.PartialObjectMetadata)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.version++
	m := w.objects[resource][path]
	m.Labels = maps.Clone(m.Labels)
	m.ResourceVersion = strconv.Itoa(w.version)
	edit(&m)
	w.objects[resource][path] = m
	w.record(change{w.version, resource, "MODIFIED", m, w.phases[path]})
}

// setPhase sets the phase of a pod of the namespace shop.
func (w *world) setPhase(name string, phase corev1.PodPhase) {
	w.mu.Lock()
	w.phases["shop/"+name] = phase
	w.mu.Unlock()
	w.edit("pods", "shop/"+name, func(*metav1.PartialObjectMetadata) {})
}

func (w *world) pod(name, uid, role string) {
	w.put("ADDED", "pods", "shop", name, uid, map[string]string{policy.DefaultPrefix + "/role": role, "other": uid})
}

func (w *world) namespace(name string) {
	w.put("ADDED", "namespaces", "", name, "n-"+name, nil)
	w.put("ADDED", "serviceaccounts", name, "cart", "s-1", nil)
}

// end ends all watches, with 410 Gone or as on shutdown.
func (w *world) end(gone bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	which := &w.cut
	if gone {
		which = &w.expired
	}
	close(*which)
	*which = make(chan struct{})
}

func (w *world) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	if w.away.Load() {
		panic(http.ErrAbortHandler) // on a connection from before the outage
	}
	rw.Header().Set("Content-Type", "application/json")
	q := r.URL.Query()
	path := strings.Split(strings.TrimPrefix(r.URL.Path, "/api/v1/"), "/")
	switch {
	case len(path) == 1 && q.Get("sendInitialEvents") == "true" && !w.streams:
		w.status(rw, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
	case len(path) == 1 && q.Get("watch") == "true":
		w.watch(rw, r, path[0])
	case len(path) == 1:
		w.list(rw, r, path[0])
	default:
		w.reads.Add(1)
		time.Sleep(10 * time.Millisecond)
		key, resource := "/"+path[1], path[0]
		if len(path) == 4 {
			key, resource = path[1]+"/"+path[3], path[2]
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		m, ok := w.objects[resource][key]
		if !ok {
			w.status(rw, http.StatusNotFound, metav1.StatusReasonNotFound)
			return
		}
		if resource == "pods" {
			_ = json.NewEncoder(rw).Encode(corev1.Pod{
				TypeMeta: metav1.TypeMeta{Kind: "Pod", APIVersion: "v1"}, ObjectMeta: m.ObjectMeta, Status: corev1.PodStatus{Phase: w.phases[key]},
			})
			return
		}
		m.Kind, m.APIVersion = map[string]string{"namespaces": "Namespace", "serviceaccounts": "ServiceAccount"}[resource], "v1"
		_ = json.NewEncoder(rw).Encode(m)
	}
}

func (w *world) status(rw http.ResponseWriter, code int, reason metav1.StatusReason) {
	rw.WriteHeader(code)
	_ = json.NewEncoder(rw).Encode(gone(code, reason))
}

func gone(code int, reason metav1.StatusReason) metav1.Status {
	return metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: reason}
}

func (w *world) list(rw http.ResponseWriter, r *http.Request, resource string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	from, _ := strconv.Atoi(r.URL.Query().Get("continue"))
	limit, _ := strconv.Atoi(r.URL.Query().Get("limit"))
	keys := slices.Sorted(maps.Keys(w.objects[resource]))
	keys = slices.DeleteFunc(keys, func(key string) bool { return !selects(r, w.objects[resource][key], w.phases[key]) })
	list := metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"}}
	list.ResourceVersion = strconv.Itoa(w.version)
	end := len(keys)
	if limit > 0 && from+limit < end {
		end = from + limit
		list.Continue = strconv.Itoa(end)
	}
	for _, key := range keys[from:end] {
		list.Items = append(list.Items, w.objects[resource][key])
	}
	w.largest.Store(max(w.largest.Load(), int64(end-from)))
	_ = json.NewEncoder(rw).Encode(list)
}

func (w *world) watch(rw http.ResponseWriter, r *http.Request, resource string) {
	encoder := json.NewEncoder(rw)
	send := func(kind string, object any) {
		_ = encoder.Encode(map[string]any{"type": kind, "object": object})
		_ = http.NewResponseController(rw).Flush()
	}
	bookmark := func(version int, annotations map[string]string) {
		m := metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"}}
		m.ResourceVersion, m.Annotations = strconv.Itoa(version), annotations
		send("BOOKMARK", m)
	}
	w.mu.Lock()
	expired, cut := w.expired, w.cut
	after, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		for key, m := range w.objects[resource] {
			if selects(r, m, w.phases[key]) {
				send("ADDED", m)
			}
		}
		after = w.version
		bookmark(after, map[string]string{metav1.InitialEventsAnnotationKey: "true"})
	}
	w.mu.Unlock()
	_ = http.NewResponseController(rw).Flush()
	minute := time.NewTicker(time.Minute)
	defer minute.Stop()
	for {
		w.mu.Lock()
		next, version := w.changed, w.version
		if !w.behind.Load() {
			for _, e := range w.events {
				switch {
				case e.version <= after || e.resource != resource:
				case selects(r, e.object, e.phase):
					send(e.kind, e.object)
				default:
					send("DELETED", e.object) // the object is no longer selected
				}
			}
			after = version
		}
		w.mu.Unlock()
		select {
		case <-next:
		case <-minute.C:
			if !w.silent.Load() {
				bookmark(after, nil)
			}
		case <-expired:
			send("ERROR", gone(http.StatusGone, metav1.StatusReasonExpired))
			return
		case <-cut:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// watchWorld runs a directory of that world until the test ends.
func watchWorld(t *testing.T, w *world) *kube.Directory {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	config := serve(t, w, &w.away)
	d, err := kube.NewDirectory(config, keys, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := withCancel(t)
	done := make(chan struct{})
	go func() { defer close(done); _ = d.Run(ctx) }()
	t.Cleanup(func() { stop(); w.end(false); <-done })
	return d
}

// both runs a test with an API server that streams lists, and with one that has pages.
func both(t *testing.T, test func(t *testing.T, w *world)) {
	t.Helper()
	for _, streams := range []bool{true, false} {
		t.Run("streams="+strconv.FormatBool(streams), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				w.streams = streams
				test(t, w)
			})
		})
	}
}

func has(d *kube.Directory, key, uid string) bool {
	p, _, ok := d.Pod(key)
	return ok && p.UID == uid
}

func TestEverythingIsListed(t *testing.T) {
	both(t, func(t *testing.T, w *world) {
		w.namespace("shop")
		const pods = 1203
		for i := range pods {
			w.pod(fmt.Sprint("p-", i), fmt.Sprint("u-", i), fmt.Sprint("role-", i%2))
		}
		d := watchWorld(t, w)
		synctest.Wait()
		if !d.Synced() {
			t.Fatal("the directory is not synced")
		}
		for i := range pods {
			if !has(d, fmt.Sprint("shop/p-", i), fmt.Sprint("u-", i)) {
				t.Fatalf("pod %d is missing", i)
			}
		}
		if n := w.largest.Load(); n > 500 {
			t.Errorf("a page had %d objects, want 500 at most", n)
		}
		// Pods with equal annotations share them, whatever their other annotations.
		zero, _, _ := d.Pod("shop/p-0")
		two, _, _ := d.Pod("shop/p-2")
		if zero.Request == nil || zero.Request != two.Request {
			t.Error("pods with equal annotations do not share them")
		}
		if one, _, _ := d.Pod("shop/p-1"); roleOf(one) != "role-1" || one.Request == zero.Request {
			t.Errorf("a pod with another role requests %q", roleOf(one))
		}
	})
}

func TestHandlersAreNotified(t *testing.T) {
	both(t, func(t *testing.T, w *world) {
		w.namespace("shop")
		w.pod("stays", "u-1", "a")
		w.pod("goes", "u-2", "a")
		d := watchWorld(t, w)
		var mu sync.Mutex
		var notified []string
		d.OnChange(func(key string) { mu.Lock(); defer mu.Unlock(); notified = append(notified, key) })
		want := func(what string, keys ...string) {
			t.Helper()
			time.Sleep(10 * time.Second) // longer than the pause of a watch
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			slices.Sort(notified)
			if got := slices.Compact(notified); !slices.Equal(got, keys) {
				t.Errorf("%s: handlers were notified of %q, want %q", what, got, keys)
			}
			notified = nil
		}
		want("at first", "shop/goes", "shop/stays")
		w.pod("comes", "u-3", "a")
		want("a new pod", "shop/comes")
		w.pod("comes", "u-3", "b")
		want("a changed annotation", "shop/comes")
		w.pod("comes", "u-4", "b")
		want("a recreated pod", "shop/comes")
		w.put("DELETED", "pods", "shop", "goes", "u-2", nil)
		want("a deleted pod", "shop/goes")
		w.put("MODIFIED", "namespaces", "", "shop", "n-shop", map[string]string{policy.DefaultPrefix + "/permitted": ".*"})
		want("a changed namespace", "shop/comes", "shop/stays")
		w.end(true)
		want("a new list of the same")
		w.away.Store(true)
		w.end(false)
		time.Sleep(5 * time.Minute)
		w.put("DELETED", "pods", "shop", "stays", "u-1", nil)
		w.end(true)
		w.away.Store(false)
		want("a deletion during an outage", "shop/stays")
	})
}

func TestAgeOfWatches(t *testing.T) {
	both(t, func(t *testing.T, w *world) {
		w.namespace("shop")
		d := watchWorld(t, w)
		for range 4 * 60 {
			if time.Sleep(15 * time.Second); d.Age() != 0 {
				t.Fatalf("the age of a healthy watch without changes is %s", d.Age())
			}
		}
		// The connection is open, but nothing arrives.
		w.silent.Store(true)
		time.Sleep(4 * time.Minute)
		if age := d.Age(); age < 3*time.Minute {
			t.Errorf("the age of a watch without an event for four minutes is %s", age)
		}
		w.silent.Store(false)
		time.Sleep(time.Minute + time.Second)
		if age := d.Age(); age != 0 {
			t.Errorf("after a bookmark the age is %s, want 0", age)
		}
		w.away.Store(true)
		w.end(false)
		time.Sleep(time.Minute)
		if age := d.Age(); age < time.Minute {
			t.Errorf("after an outage of a minute the age is %s", age)
		}
		time.Sleep(9 * time.Minute)
		if age := d.Age(); age < 9*time.Minute || age > 11*time.Minute {
			t.Errorf("after an outage of ten minutes the age is %s", age)
		}
		w.away.Store(false)
		time.Sleep(10 * time.Second)
		if age := d.Age(); age != 0 {
			t.Errorf("seconds after the outage the age is %s, want 0", age)
		}
	})
}

func podOf(namespace, name, uid string) identity.Pod {
	return identity.Pod{Namespace: namespace, Name: name, UID: uid, ServiceAccount: "cart", ServiceAccountUID: "s-1"}
}

func TestUnknownPodsOfOneNamespaceLeaveReadsForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.streams = true
		w.namespace("shop")
		w.namespace("bank")
		d := watchWorld(t, w)
		synctest.Wait()
		outcomes := make(map[credential.Reason]int)
		var mu sync.Mutex
		var flood sync.WaitGroup
		for i := range 500 {
			flood.Go(func() {
				_, _, err := d.Bind(t.Context(), podOf("shop", fmt.Sprint("gone-", i), "u"))
				mu.Lock()
				defer mu.Unlock()
				outcomes[credential.ReasonOf(err)]++
			})
		}
		flood.Wait()
		if n := outcomes[credential.ReasonPodNotFound]; n < 20 || n > 30 {
			t.Errorf("%d of 500 unknown pods of one namespace were read: %v", n, outcomes)
		}
		for i := range 20 {
			flood.Go(func() {
				if _, _, err := d.Bind(t.Context(), podOf("bank", fmt.Sprint("gone-", i), "u")); credential.ReasonOf(err) != credential.ReasonPodNotFound {
					t.Errorf("Bind of a pod of another namespace returned %v", err)
				}
			})
		}
		flood.Wait()
		// Concurrent calls for the same pod make one read.
		time.Sleep(time.Minute)
		before := w.reads.Load()
		for range 50 {
			flood.Go(func() { _, _, _ = d.Bind(t.Context(), podOf("bank", "gone", "u")) })
		}
		flood.Wait()
		if n := w.reads.Load() - before; n > 2 {
			t.Errorf("50 calls for one pod made %d reads", n)
		}
	})
}

func TestBindWaitsForUnknownPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.streams = true
		w.namespace("shop")
		d := watchWorld(t, w)
		synctest.Wait()
		go func() {
			time.Sleep(time.Second)
			w.pod("late", "u-1", "a")
		}()
		began := time.Now()
		if _, _, err := d.Bind(t.Context(), podOf("shop", "late", "u-1")); err != nil || time.Since(began) != time.Second || w.reads.Load() != 0 {
			t.Errorf("Bind of a pod that the watch has a second later returned %v after %s and %d reads", err, time.Since(began), w.reads.Load())
		}
		began = time.Now()
		if _, _, err := d.Bind(t.Context(), podOf("shop", "none", "u-1")); credential.ReasonOf(err) != credential.ReasonPodNotFound || time.Since(began) != 2*time.Second+10*time.Millisecond || w.reads.Load() != 1 {
			t.Errorf("Bind of a pod that does not exist returned %v after %s and %d reads", err, time.Since(began), w.reads.Load())
		}
		// The namespace does not exist.
		if _, _, err := d.Bind(t.Context(), podOf("nowhere", "none", "u-1")); credential.ReasonOf(err) != credential.ReasonNamespaceNotFound {
			t.Errorf("Bind of a pod of a namespace that does not exist returned %v", err)
		}
		w.away.Store(true)
		w.end(false)
		if _, _, err := d.Bind(t.Context(), podOf("shop", "other", "u-1")); credential.ReasonOf(err) != credential.ReasonAPIServerUnavailable {
			t.Errorf("during an outage, Bind of an unknown pod returned %v", err)
		}
		if _, _, err := d.Bind(t.Context(), podOf("shop", "late", "u-1")); err != nil {
			t.Errorf("during an outage, Bind of a known pod returned %v", err)
		}
	})
}
