//go:build unix

package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/integration/stack"
)

// trustName is the name of the ConfigMaps that the broker publishes.
const trustName = "credence-trust"

// eventually waits for what takes an API server and a controller moments. The time is a bound on a machine
// that compiles meanwhile, not a measurement.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// configMap reads one; nil when there is none.
func configMap(t *testing.T, namespace, name string) *corev1.ConfigMap {
	t.Helper()
	m, err := credence.Client.CoreV1().ConfigMaps(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestTrustIsRepaired(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	maps := credence.Client.CoreV1().ConfigMaps(ns)
	good := configMap(t, ns, trustName)
	repaired := func() bool {
		m := configMap(t, ns, trustName)
		return m != nil && m.Data[trust.RootsKey] == good.Data[trust.RootsKey] && cmp.Equal(m.OwnerReferences, good.OwnerReferences)
	}
	edited := good.DeepCopy()
	edited.Data = map[string]string{trust.RootsKey: "none", "theirs": "kept"}
	edited.OwnerReferences = nil
	if _, err := maps.Update(t.Context(), edited, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "repairing what was edited", repaired)
	if m := configMap(t, ns, trustName); m.Data["theirs"] != "kept" {
		t.Errorf("the keys of others are gone: %v", m.Data)
	}
	if err := maps.Delete(t.Context(), trustName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "repairing what was deleted", repaired)
	role, err := credence.Client.RbacV1().ClusterRoles().Get(t.Context(), "credence-broker", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := []metav1.OwnerReference{{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "ClusterRole", Name: role.Name, UID: role.UID}}
	if diff := cmp.Diff(want, configMap(t, ns, trustName).OwnerReferences); diff != "" {
		t.Errorf("owners (-want +got):\n%s", diff)
	}
}

func TestPodOfANamespaceThatWasJustLabelledStarts(t *testing.T) {
	t.Parallel()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "just-labelled", Annotations: map[string]string{permittedKey: ".*"}}}
	if err := credence.MakeNamespace(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	label := fmt.Sprintf(`{"metadata":{"labels":{%q:"enabled"}}}`, injectLabel)
	if _, err := credence.Client.CoreV1().Namespaces().Patch(t.Context(), ns.Name, "application/merge-patch+json", []byte(label), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	// Until the API server itself has seen the label, it does not call the webhook.
	var pod *corev1.Pod
	eventually(t, "injecting", func() bool {
		pod = create(t, ns.Name, "app", map[string]string{roleKey: "cart"})
		if slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == stack.SidecarName }) {
			return true
		}
		remove(t, pod)
		return false
	})
	if got, err := command(t, app(t, run(t, pod)), "", awsclient, "whoami"); got != assumed("cart") {
		t.Errorf("an SDK saw %q, %v", got, err)
	}
}

// publisher is a trust.Trust in this process, with a service account, an owner and namespaces of its own.
type publisher struct {
	*trust.Trust
	stop func()
	dead atomic.Bool // reaches no API server any more
}

// trustBench is where publishers of one test live.
type trustBench struct {
	t                 *testing.T
	home, owner, name string
	label             string
	volume            string
	pair              *certs.KeyPair
	config            *rest.Config

	mu    sync.Mutex
	calls map[call]bool // guarded by mu
}

// call is a request as RBAC sees it.
type call struct{ verb, resource, namespace, name string }

// publishing are the rights that a publisher has: those that docs/certificates.md lists.
func publishing(name, owner string) (everywhere, there []rbacv1.PolicyRule) {
	return []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: []string{"list", "watch"}},
			{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{name}, Verbs: []string{"list", "watch", "create", "patch"}},
			{APIGroups: []string{rbacv1.GroupName}, Resources: []string{"clusterroles"}, ResourceNames: []string{owner}, Verbs: []string{"get"}},
		}, []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{name}, Verbs: []string{"get"}},
			{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"create"}},
			{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, ResourceNames: []string{trust.Lease}, Verbs: []string{"get", "update"}},
		}
}

func newTrustBench(t *testing.T, id string) *trustBench {
	t.Helper()
	b := &trustBench{
		t: t, home: id, owner: id + "-owner", name: id + "-roots", label: "credence-test/" + id, volume: t.TempDir(), calls: make(map[call]bool),
	}
	ctx, client := t.Context(), credence.Client
	if err := credence.MakeNamespace(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: b.home}}); err != nil {
		t.Fatal(err)
	}
	everywhere, there := publishing(b.name, b.owner)
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "broker"}}
	subjects := []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: b.home, Name: account.Name}}
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	create := metav1.CreateOptions{}
	must(client.CoreV1().ServiceAccounts(b.home).Create(ctx, account, create))
	must(client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: id}, Rules: everywhere}, create))
	must(client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: id}, Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: id},
	}, create))
	must(client.RbacV1().Roles(b.home).Create(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: id}, Rules: there}, create))
	must(client.RbacV1().RoleBindings(b.home).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: id}, Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: id},
	}, create))
	b.makeOwner()
	var err error
	if b.config, err = control.ServiceAccount(ctx, b.home, account.Name); err != nil {
		t.Fatal(err)
	}
	cert, key := certstest.NewCA(t).Leaf("localhost").WriteTo(b.volume)
	if b.pair, err = certs.NewKeyPair(cert, key, nil); err != nil {
		t.Fatal(err)
	}
	return b
}

// makeOwner makes a ClusterRole that gives nobody anything.
func (b *trustBench) makeOwner() {
	b.t.Helper()
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: b.owner}}
	if _, err := credence.Client.RbacV1().ClusterRoles().Create(b.t.Context(), role, metav1.CreateOptions{}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *trustBench) namespace(name string) string {
	b.t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: b.home + "-" + name, Labels: map[string]string{b.label: "yes"}}}
	if _, err := credence.Client.CoreV1().Namespaces().Create(b.t.Context(), ns, metav1.CreateOptions{}); err != nil {
		b.t.Fatal(err)
	}
	return ns.Name
}

func (b *trustBench) published(namespace string) bool {
	b.t.Helper()
	return configMap(b.t, namespace, b.name) != nil
}

func (b *trustBench) start() *publisher {
	b.t.Helper()
	p := new(publisher)
	config := rest.CopyConfig(b.config)
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			if p.dead.Load() {
				return nil, errors.New("cut off")
			}
			b.note(r)
			return next.RoundTrip(r)
		})
	})
	var err error
	p.Trust, err = trust.New(trust.Config{
		REST: config, Pair: b.pair, RootsFile: filepath.Join(b.volume, "ca.crt"), Namespace: b.home, ConfigMap: b.name,
		Namespaces: b.label + "=yes", Owner: b.owner, Logger: logger(b.t),
	})
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = p.Run(ctx) }()
	p.stop = func() { cancel(); <-done }
	b.t.Cleanup(p.stop)
	return p
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// note remembers a request by the verb that RBAC gives it.
func (b *trustBench) note(r *http.Request) {
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	path = path[slices.Index(path, "v1")+1:]
	var c call
	if path[0] == "namespaces" && len(path) > 2 {
		c.namespace, path = path[1], path[2:]
	}
	c.resource = path[0]
	if len(path) > 1 {
		c.name = path[1]
	}
	switch {
	case r.Method == http.MethodGet && c.name == "":
		c.name = strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
		c.verb = "list"
		if r.URL.Query().Get("watch") == "true" {
			c.verb = "watch"
		}
	case r.Method == http.MethodGet:
		c.verb = "get"
	default:
		c.verb = map[string]string{http.MethodPost: "create", http.MethodPut: "update"}[r.Method]
		if r.Method == http.MethodPatch {
			c.verb = "patch"
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls[c] = true
}

func TestTrustIsCollectedWithItsOwner(t *testing.T) {
	t.Parallel()
	b := newTrustBench(t, "trust-owner")
	shop := b.namespace("shop")
	p := b.start()
	published := func() bool { return b.published(shop) && b.published(b.home) }
	eventually(t, "publishing", published)
	roles := credence.Client.RbacV1().ClusterRoles()
	if err := roles.Delete(t.Context(), b.owner, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "collecting", func() bool { return !b.published(shop) && !b.published(b.home) })
	// And it stays away, though the publisher runs on: it may take its time to end.
	time.Sleep(3 * time.Second)
	if b.published(shop) || b.published(b.home) {
		t.Error("what was collected came back without an owner")
	}
	if err := p.Err(); err == nil || !strings.Contains(err.Error(), b.owner) {
		t.Errorf("Err does not name the owner: %v", err)
	}
	b.makeOwner()
	eventually(t, "publishing for a new owner", published)
}

func TestTrustIsPublishedByOneReplicaAtATime(t *testing.T) {
	t.Parallel()
	b := newTrustBench(t, "trust-lead")
	one := b.start()
	eventually(t, "leading", one.Leading)
	two := b.start()
	first := b.namespace("first")
	eventually(t, "publishing under the first", func() bool { return b.published(first) })
	if two.Leading() {
		t.Error("two replicas lead")
	}
	one.dead.Store(true) // as if killed: it gives up nothing
	second := b.namespace("second")
	eventually(t, "publishing under the second", func() bool { return b.published(second) })
	eventually(t, "the lead of the first to end", func() bool { return !one.Leading() && two.Leading() })
	one.dead.Store(false)
	two.stop() // gives up the lead
	third := b.namespace("third")
	eventually(t, "publishing under the first again", func() bool { return b.published(third) })
}

// TestTrustNeedsTheRightsThatItHas compares what was asked of the API server with what was granted. A right
// that was missing would have failed the test before.
func TestTrustNeedsTheRightsThatItHas(t *testing.T) {
	t.Parallel()
	b := newTrustBench(t, "trust-rights")
	shop := b.namespace("shop")
	p := b.start()
	eventually(t, "publishing", func() bool { return b.published(shop) && b.published(b.home) && p.Err() == nil })
	p.stop() // updates the Lease
	used := make(map[string]bool)
	b.mu.Lock()
	for c := range b.calls {
		used[strings.Join([]string{c.verb, c.resource, c.name}, " ")] = true
	}
	b.mu.Unlock()
	everywhere, there := publishing(b.name, b.owner)
	for _, rule := range append(everywhere, there...) {
		for _, verb := range rule.Verbs {
			names := rule.ResourceNames
			if len(names) == 0 {
				names = []string{""}
			}
			for _, name := range names {
				right := strings.Join([]string{verb, rule.Resources[0], name}, " ")
				switch {
				case used[right]:
				case right == "create configmaps "+b.name: // an apply that finds nothing creates
				case verb == "list" && used["watch "+rule.Resources[0]+" "+name]: // what a watch falls back to
				default:
					t.Errorf("the right to %q is not used", right)
				}
			}
		}
	}
	if len(used) < 7 {
		t.Errorf("only %d kinds of requests were seen: %v", len(used), used)
	}
}
