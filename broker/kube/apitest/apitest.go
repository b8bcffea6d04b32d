// Package apitest is a Kubernetes API server for tests: a real HTTP server that keeps objects in memory.
//
// It supports the objects and requests that a broker or a webhook needs: get, list, watch, create, update, delete, apply,
// label and field selectors, logs of pods, and token reviews. It refuses an update of an old version, publishes the keys that sign its
// tokens, and counts requests. [Server.Intercept] lets a test refuse requests. [Server.Put] and [Server.Delete] change
// objects as another client would. Clients connect over TCP with a kubeconfig file, or in memory with [Network.Config], which
// works in a synctest bubble.
//
// It does not authorize, set defaults, validate or stream lists. Its server-side apply merges maps without field ownership.
// The tests in integration run against a real API server.
package apitest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kind is a kind of object that the server stores.
type kind struct {
	version, name, resource string
	object                  metav1.Object
}

var kinds = []kind{
	{"v1", "Namespace", "namespaces", &corev1.Namespace{}},
	{"v1", "Pod", "pods", &corev1.Pod{}},
	{"v1", "ServiceAccount", "serviceaccounts", &corev1.ServiceAccount{}},
	{"v1", "ConfigMap", "configmaps", &corev1.ConfigMap{}},
	{"admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", &admissionregistrationv1.MutatingWebhookConfiguration{}},
	{"apps/v1", "Deployment", "deployments", &appsv1.Deployment{}},
	{"coordination.k8s.io/v1", "Lease", "leases", &coordinationv1.Lease{}},
	{"discovery.k8s.io/v1", "EndpointSlice", "endpointslices", &discoveryv1.EndpointSlice{}},
	{"events.k8s.io/v1", "Event", "events", &eventsv1.Event{}},
	{"rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", &rbacv1.ClusterRole{}},
	{"authentication.k8s.io/v1", "TokenReview", "tokenreviews", &authenticationv1.TokenReview{}},
}

// podLog is the resource of a pod's log.
const podLog = "pods/log"

// Version is the version of Kubernetes that the server reports.
const Version = "v1.37.2"

// Issuer is the issuer in the server's discovery document.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// Server is an API server. Make it with [Start]. It is safe for concurrent use.
type Server struct {
	*Network
	key *ecdsa.PrivateKey

	mu        sync.Mutex
	changes   []change                     // the nth one made version n; guarded by mu
	objects   map[location]object          // guarded by mu
	watchers  map[*watcher]bool            // guarded by mu
	logs      map[location]string          // of pods; guarded by mu
	requests  map[Request]int              // :: request without name and query → number; guarded by mu
	intercept func(Request) *metav1.Status // guarded by mu
}

// change is a change of an object, which is nil before its creation and after its deletion.
type change struct {
	at       location
	old, now object
}

// location identifies an object.
type location struct{ resource, namespace, name string }

// Request is a request for objects, as [Server.Requests] counts it and [Server.Intercept] sees it.
type Request struct {
	Method, Resource, Namespace, Name string
	Query                             string // URL-encoded
}

// Start runs a server until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		key:     key,
		objects: make(map[location]object), watchers: make(map[*watcher]bool), requests: make(map[Request]int), logs: make(map[location]string),
	}
	s.Network = Serve(t, http.HandlerFunc(s.serve))
	return s
}

// Kubeconfig serves on a TCP port until the test ends, writes a kubeconfig file for that port, and returns the file's
// path.
func (s *Server) Kubeconfig(t testing.TB) string {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(func() {
		server.CloseClientConnections() // watches
		server.Close()
	})
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q}}]
contexts: [{name: test, context: {cluster: test, user: test}}]
current-context: test
users: [{name: test, user: {}}]
`, server.URL)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// Put creates or replaces objects. If an object has no UID, Put sets one, in the caller's object too.
func (s *Server) Put(objects ...metav1.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range objects {
		stored := s.store(locate(o), encode(o))
		uid, _ := stored.meta()["uid"].(string)
		reflect.ValueOf(o).Elem().FieldByName("ObjectMeta").FieldByName("UID").SetString(uid)
	}
}

// Delete deletes the object with o's type, namespace and name.
func (s *Server) Delete(o metav1.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(locate(o), nil)
}

// SetLog sets the log of the containers of a pod.
func (s *Server) SetLog(namespace, pod, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.logs[location{podLog, namespace, pod}] = text
}

// Load reads the object with o's type, namespace and name into o, and reports whether it exists.
func (s *Server) Load(o metav1.Object) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	stored := s.objects[locate(o)]
	if stored == nil {
		return false
	}
	must(json.Unmarshal(must2(json.Marshal(stored)), o))
	return true
}

// Names returns the names of all objects with o's type in o's namespace.
func (s *Server) Names(o metav1.Object) (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	where := locate(o)
	for l := range s.objects {
		if l.resource == where.resource && l.namespace == where.namespace {
			names = append(names, l.name)
		}
	}
	return names
}

// Requests returns the number of requests so far with that HTTP method, resource (such as pods) and namespace. Empty
// arguments match all.
func (s *Server) Requests(method, resource, namespace string) (count int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r, n := range s.requests {
		if (method == "" || r.Method == method) && (resource == "" || r.Resource == resource) && (namespace == "" || r.Namespace == namespace) {
			count += n
		}
	}
	return count
}

// Intercept makes the server call f before each request. If f returns a status, such as one made by [Failure], that is the
// response, and nothing changes. Concurrent requests make concurrent calls of f. A nil f intercepts nothing.
func (s *Server) Intercept(f func(Request) *metav1.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intercept = f
}

// Failure returns a status that refuses a request.
func Failure(code int32, reason metav1.StatusReason, message string) *metav1.Status {
	return &metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: code, Reason: reason, Message: message,
	}
}

// kindOf returns the first kind that matches; ok is false if none does.
func kindOf(match func(kind) bool) (k kind, ok bool) {
	for _, k = range kinds {
		if match(k) {
			return k, true
		}
	}
	return kind{}, false
}

// locate panics if the server does not store o's type, because that is a mistake in the test.
func locate(o metav1.Object) location {
	k, ok := kindOf(func(k kind) bool { return reflect.TypeOf(k.object) == reflect.TypeOf(o) })
	if !ok {
		panic(fmt.Sprintf("apitest: %T is not among the stored kinds", o))
	}
	return location{k.resource, o.GetNamespace(), o.GetName()}
}

// object is an object decoded from JSON.
type object map[string]any

func encode(o any) (e object) {
	must(json.Unmarshal(must2(json.Marshal(o)), &e))
	return e
}

func (o object) meta() map[string]any {
	m, ok := o["metadata"].(map[string]any)
	if !ok {
		m = make(map[string]any)
		o["metadata"] = m
	}
	return m
}

// text returns the string at a path of fields such as metadata.name; "" if there is none.
func (o object) text(path string) string {
	var value any = map[string]any(o)
	for field := range strings.SplitSeq(path, ".") {
		fields, ok := value.(map[string]any)
		if !ok {
			return ""
		}
		value = fields[field]
	}
	text, _ := value.(string)
	return text
}

// store stores o, or deletes the object if o is nil, and sends the change to the watches. The caller holds mu.
func (s *Server) store(at location, o object) object {
	old := s.objects[at]
	if o == nil && old == nil {
		return nil
	}
	version := strconv.Itoa(len(s.changes) + 1)
	if o == nil {
		delete(s.objects, at)
	} else {
		o = encode(o)
		m := o.meta()
		m["name"], m["resourceVersion"] = at.name, version
		if at.namespace != "" {
			m["namespace"] = at.namespace
		}
		if uid, _ := m["uid"].(string); uid == "" {
			if old != nil {
				m["uid"] = old.meta()["uid"]
			} else {
				m["uid"] = fmt.Sprintf("00000000-0000-4000-8000-%012d", len(s.changes)+1)
			}
		}
		s.objects[at] = o
	}
	s.changes = append(s.changes, change{at, old, o})
	for w := range s.watchers {
		w.inform(at, old, o)
	}
	return o
}

// must panics with an error that only a mistake in a test or in this package can cause.
func must(err error) {
	if err != nil {
		panic("apitest: " + err.Error())
	}
}

func must2[T any](value T, err error) T {
	must(err)
	return value
}
