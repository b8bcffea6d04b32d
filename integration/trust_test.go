//go:build unix

package integration

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/stack"
)

// trustName is the name of the ConfigMaps that the broker publishes.
const trustName = "credence-trust"

func TestTrustIsRepaired(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	maps := credence.Client.CoreV1().ConfigMaps(ns)
	good, err := maps.Get(t.Context(), trustName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	role, err := credence.Client.RbacV1().ClusterRoles().Get(t.Context(), "credence-broker", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Kubernetes deletes the ConfigMaps with their owner, at an uninstall.
	owners := []metav1.OwnerReference{{APIVersion: "rbac.authorization.k8s.io/v1", Kind: "ClusterRole", Name: role.Name, UID: role.UID}}
	repaired := func(what string, data map[string]string) {
		t.Helper()
		await.Until(t, what+" ConfigMap is repaired", func() error {
			m, err := maps.Get(t.Context(), trustName, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if diff := cmp.Diff(data, m.Data) + cmp.Diff(owners, m.OwnerReferences); diff != "" {
				return errors.New(diff)
			}
			return nil
		})
	}
	repaired("the first", good.Data)
	edited := good.DeepCopy()
	edited.Data, edited.OwnerReferences = map[string]string{trust.RootsKey: "none", "theirs": "kept"}, nil
	if _, err := maps.Update(t.Context(), edited, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	repaired("an edited", map[string]string{trust.RootsKey: good.Data[trust.RootsKey], "theirs": "kept"})
	if err := maps.Delete(t.Context(), trustName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	repaired("a deleted", good.Data)
}

// TestProgramsHaveOnlyTheirRights guards all other tests: with all rights of the cluster they would pass too.
func TestProgramsHaveOnlyTheirRights(t *testing.T) {
	t.Parallel()
	for _, account := range []string{"credence-broker", "credence-webhook"} {
		config, err := control.ServiceAccount(t.Context(), stack.SystemNamespace, account)
		if err != nil {
			t.Fatal(err)
		}
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("%s lists Secrets: got %v, want forbidden", account, err)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// verbOf returns a request as RBAC sees it: verb, resource and name.
func verbOf(r *http.Request) string {
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	path = append(path[slices.Index(path, "v1")+1:], "")
	if path[0] == "namespaces" && len(path) > 3 {
		path = path[2:]
	}
	resource, name := path[0], path[1]
	verb := map[string]string{http.MethodGet: "get", http.MethodPost: "create", http.MethodPut: "update", http.MethodPatch: "patch"}[r.Method]
	if verb == "get" && name == "" {
		verb, name = "list", strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
		if r.URL.Query().Get("watch") == "true" {
			verb = "watch"
		}
	}
	return verb + " " + resource + " " + name
}

// TestTrustUsesAllItsRights shows that the chart gives a publisher of roots no right that it does not use. All other
// tests show that the rights suffice. The publisher has its own namespace, names and label, and no limit by RBAC.
func TestTrustUsesAllItsRights(t *testing.T) {
	t.Parallel()
	const name, owner, label = "rights-roots", "rights-owner", "credence-test/rights"
	home := namespaceWith(t, map[string]string{label: "yes"}, nil)
	roles := credence.Client.RbacV1().ClusterRoles()
	if _, err := roles.Create(t.Context(), &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: owner}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	used := map[string]bool{} // guarded by mu
	config := control.Config()
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			mu.Lock()
			used[verbOf(r)] = true
			mu.Unlock()
			return next.RoundTrip(r)
		})
	})
	volume := t.TempDir()
	cert, key := certstest.NewCA(t).Leaf("localhost").WriteTo(volume)
	pair, err := certs.NewKeyPair(cert, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	publisher, err := trust.New(trust.Config{
		REST: config, Pair: pair, RootsFile: filepath.Join(volume, "ca.crt"), Namespace: home, ConfigMap: name,
		Namespaces: label + "=yes", Owner: owner, Logger: logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- publisher.Run(ctx) }()
	await.Until(t, "the roots are published", func() error {
		_, err := credence.Client.CoreV1().ConfigMaps(home).Get(t.Context(), name, metav1.GetOptions{})
		return errors.Join(err, publisher.Err())
	})
	cancel() // it updates the Lease
	if err := <-done; err != nil {
		t.Error(err)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, right := range []string{
		"watch namespaces ", "watch configmaps " + name, "get configmaps " + name, "patch configmaps " + name,
		"get clusterroles " + owner, "create leases ", "get leases " + trust.Lease, "update leases " + trust.Lease,
	} {
		if !used[right] {
			t.Errorf("the right to %q was not used", right)
		}
		delete(used, right)
	}
	// The chart also gives the right to list, which a watch falls back to, and to create the ConfigMap, which the first
	// apply needs.
	for right := range used {
		if right != "list namespaces " && right != "list configmaps "+name {
			t.Errorf("the request %q needs a right that the chart does not give", right)
		}
	}
}
