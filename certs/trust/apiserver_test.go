package trust_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"
)

// apiServer does what an API server does for the few resources that are used here, over connections that
// stay inside a synctest bubble: get, list, watch, create, update with conflicts, and server-side apply of
// ConfigMaps. That the real one does the same is shown in integration.
type apiServer struct {
	conns chan net.Conn
	done  chan struct{}
	away  atomic.Bool // new connections are refused, and open ones lost

	mu       sync.Mutex
	version  int
	objects  map[string]object // :: resource/namespace/name
	watchers map[*watcher]bool
	open     map[net.Conn]bool
	refuse   func(method, resource, namespace string) *metav1.Status
	applied  []string // namespaces, in the order of the writes
}

type object map[string]any

func (o object) meta() map[string]any {
	m, ok := o["metadata"].(map[string]any)
	if !ok {
		m = make(map[string]any)
		o["metadata"] = m
	}
	return m
}

func (o object) clone() object {
	text, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	var c object
	if err := json.Unmarshal(text, &c); err != nil {
		panic(err)
	}
	return c
}

type watcher struct {
	query
	events chan watchEvent
}

type watchEvent struct {
	Type   string `json:"type"`
	Object object `json:"object"`
}

// query is what a list or a watch asks for.
type query struct {
	resource, namespace, name string
	labels                    labels.Selector
	metadataOnly              bool
}

func (q query) matches(key string, o object) bool {
	parts := strings.Split(key, "/")
	set := labels.Set{}
	if l, ok := o.meta()["labels"].(map[string]any); ok {
		for k, v := range l {
			set[k] = fmt.Sprint(v)
		}
	}
	return o != nil && parts[0] == q.resource && (q.namespace == "" || q.namespace == parts[1]) &&
		(q.name == "" || q.name == parts[2]) && q.labels.Matches(set)
}

func startAPIServer(t *testing.T) (*apiServer, *rest.Config) {
	t.Helper()
	s := &apiServer{
		conns: make(chan net.Conn), done: make(chan struct{}), objects: make(map[string]object),
		watchers: make(map[*watcher]bool), open: make(map[net.Conn]bool),
	}
	server := &http.Server{Handler: http.HandlerFunc(s.serve), ReadHeaderTimeout: time.Hour}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(s) }()
	t.Cleanup(func() { close(s.done); _ = server.Close(); s.cut(); <-served })
	return s, s.config()
}

// config is a configuration whose connections are its own.
func (s *apiServer) config() *rest.Config {
	asJSON := rest.ContentConfig{ContentType: "application/json"}
	return &rest.Config{Host: "http://api-server", ContentConfig: asJSON, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		if s.away.Load() {
			return nil, errors.New("connection refused")
		}
		ours, theirs := net.Pipe()
		select {
		case s.conns <- theirs:
			s.mu.Lock()
			s.open[ours] = true
			s.mu.Unlock()
			return ours, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.done:
			return nil, net.ErrClosed
		}
	}}
}

func (s *apiServer) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}
func (s *apiServer) Close() error   { return nil }
func (s *apiServer) Addr() net.Addr { return &net.UnixAddr{Name: "api-server"} }

// cut loses all connections.
func (s *apiServer) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		_ = c.Close()
	}
	clear(s.open)
}

// put stores an object, or deletes it when it is nil, as anybody but us would.
func (s *apiServer) put(resource, namespace, name string, o object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(resource+"/"+namespace+"/"+name, o)
}

// store tells those who watch. The caller holds mu.
func (s *apiServer) store(key string, o object) object {
	s.version++
	old := s.objects[key]
	if o == nil {
		delete(s.objects, key)
	} else {
		o = o.clone()
		parts := strings.Split(key, "/")
		m := o.meta()
		m["name"], m["resourceVersion"] = parts[2], fmt.Sprint(s.version)
		if parts[1] != "" {
			m["namespace"] = parts[1]
		}
		if m["uid"] == nil {
			m["uid"] = fmt.Sprint("uid-", s.version)
		}
		s.objects[key] = o
	}
	for w := range s.watchers {
		was, is := old != nil && w.matches(key, old), o != nil && w.matches(key, o)
		event := watchEvent{"MODIFIED", o}
		switch {
		case !was && !is:
			continue
		case !was:
			event.Type = "ADDED"
		case !is:
			event = watchEvent{"DELETED", old}
		}
		w.events <- event
	}
	return o
}

func (s *apiServer) get(resource, namespace, name string) object {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o := s.objects[resource+"/"+namespace+"/"+name]; o != nil {
		return o.clone()
	}
	return nil
}

// configMap is the one of our name in that namespace; nil when there is none.
func (s *apiServer) configMap(t *testing.T, namespace string) *corev1.ConfigMap {
	t.Helper()
	o := s.get("configmaps", namespace, "credence-trust")
	if o == nil {
		return nil
	}
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	m := new(corev1.ConfigMap)
	if err := json.Unmarshal(text, m); err != nil {
		t.Fatal(err)
	}
	return m
}

// namespace makes one with that value of the label; empty for none.
func (s *apiServer) namespace(name, inject string) {
	o := object{}
	if inject != "" {
		o.meta()["labels"] = map[string]any{"iam.amazonaws.com/inject": inject}
	}
	s.put("namespaces", "", name, o)
}

// writes are the namespaces written to since the last call.
func (s *apiServer) writes() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.applied
	s.applied = nil
	return all
}

func (s *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	// /api/v1/[namespaces/NS/]RESOURCE[/NAME] or /apis/GROUP/v1/…
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	path = path[slices.Index(path, "v1")+1:]
	q := query{labels: labels.Everything(), metadataOnly: strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata")}
	if path[0] == "namespaces" && len(path) > 2 {
		q.namespace, path = path[1], path[2:]
	}
	q.resource = path[0]
	if len(path) > 1 {
		q.name = path[1]
	}
	s.mu.Lock()
	refuse := s.refuse
	s.mu.Unlock()
	if refuse != nil {
		if status := refuse(r.Method, q.resource, q.namespace); status != nil {
			answer(w, int(status.Code), status)
			return
		}
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if r.Method == http.MethodGet && q.name == "" {
		s.list(w, r, q)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := q.resource + "/" + q.namespace + "/" + q.name
	old := s.objects[key]
	var sent object
	if len(body) > 0 {
		if err := json.Unmarshal(body, &sent); err != nil {
			answer(w, http.StatusBadRequest, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error()))
			return
		}
	}
	switch r.Method {
	case http.MethodPost:
		key += fmt.Sprint(sent.meta()["name"])
		if s.objects[key] != nil {
			answer(w, http.StatusConflict, failure(http.StatusConflict, metav1.StatusReasonAlreadyExists, "there"))
			return
		}
		answer(w, http.StatusCreated, s.store(key, sent))
		return
	case http.MethodPatch:
		if r.URL.Query().Get("force") != "true" || r.URL.Query().Get("fieldManager") != "credence-broker" {
			answer(w, http.StatusBadRequest, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, "not our apply"))
			return
		}
		s.applied = append(s.applied, q.namespace)
		answer(w, http.StatusOK, s.store(key, apply(old, sent)))
		return
	}
	if old == nil {
		answer(w, http.StatusNotFound, failure(http.StatusNotFound, metav1.StatusReasonNotFound, "there is no "+key))
		return
	}
	if r.Method == http.MethodPut {
		if sent.meta()["resourceVersion"] != old.meta()["resourceVersion"] {
			answer(w, http.StatusConflict, failure(http.StatusConflict, metav1.StatusReasonConflict, "changed meanwhile"))
			return
		}
		old = s.store(key, sent)
	}
	answer(w, http.StatusOK, shape(old, q))
}

// apply is server-side apply by one manager that has always applied the same two keys.
func apply(old, sent object) object {
	if old == nil {
		return sent
	}
	next := old.clone()
	data, ok := next["data"].(map[string]any)
	if !ok {
		data = make(map[string]any)
	}
	delete(data, "roots.pem")
	delete(data, "record.json")
	maps.Copy(data, sent["data"].(map[string]any))
	next["data"] = data
	next.meta()["ownerReferences"] = sent.meta()["ownerReferences"]
	return next
}

func (s *apiServer) list(w http.ResponseWriter, r *http.Request, q query) {
	if r.URL.Query().Get("sendInitialEvents") == "true" { // as servers without it do; clients fall back to a list
		answer(w, http.StatusUnprocessableEntity, failure(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents"))
		return
	}
	if name, ok := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name="); ok {
		q.name = name
	}
	var err error
	if q.labels, err = labels.Parse(r.URL.Query().Get("labelSelector")); err != nil {
		answer(w, http.StatusBadRequest, failure(http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error()))
		return
	}
	s.mu.Lock()
	if r.URL.Query().Get("watch") != "true" {
		defer s.mu.Unlock()
		items := []object{}
		for key, o := range s.objects {
			if q.matches(key, o) {
				items = append(items, shape(o, q))
			}
		}
		slices.SortFunc(items, func(a, b object) int {
			return cmp.Compare(fmt.Sprint(a.meta()["namespace"], a.meta()["name"]), fmt.Sprint(b.meta()["namespace"], b.meta()["name"]))
		})
		list := object{"kind": "List", "apiVersion": "v1", "metadata": object{"resourceVersion": fmt.Sprint(s.version)}, "items": items}
		if q.metadataOnly {
			list["kind"], list["apiVersion"] = "PartialObjectMetadataList", "meta.k8s.io/v1"
		} else {
			list["kind"] = "ConfigMapList"
		}
		answer(w, http.StatusOK, list)
		return
	}
	watch := &watcher{q, make(chan watchEvent, 10_000)} // more than any test makes
	if since := r.URL.Query().Get("resourceVersion"); since != fmt.Sprint(s.version) {
		// What came between list and watch: all that is there is told again, which clients must bear.
		for key, o := range s.objects {
			if q.matches(key, o) {
				watch.events <- watchEvent{"MODIFIED", o}
			}
		}
	}
	s.watchers[watch] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, watch)
	}()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for {
		select {
		case e := <-watch.events:
			s.mu.Lock()
			e.Object = shape(e.Object, q)
			s.mu.Unlock()
			if err := json.NewEncoder(w).Encode(e); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		case <-s.done:
			return
		}
	}
}

// shape is an object as it was asked for.
func shape(o object, q query) object {
	o = o.clone()
	switch {
	case q.metadataOnly:
		return object{"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": o["metadata"]}
	case q.resource == "configmaps":
		o["kind"], o["apiVersion"] = "ConfigMap", "v1"
	case q.resource == "leases":
		o["kind"], o["apiVersion"] = "Lease", "coordination.k8s.io/v1"
	}
	return o
}

func failure(code int32, reason metav1.StatusReason, message string) *metav1.Status {
	return &metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: code, Reason: reason, Message: message,
	}
}

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
