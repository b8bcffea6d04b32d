//go:build linux

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// sessionsPage is the JSON of "credence sessions".
type sessionsPage struct {
	Brokers []struct {
		Name, Error string
		Right       string `json:"missing_right"`
	}
	Sessions []struct {
		Broker, Role string
		Owner        bool
		Key          string   `json:"access_key_id"`
		PodNames     []string `json:"pod_names"`
	}
}

// TestSessionsOfRealBrokers reads three brokers through real kubelets, as a user with the few rights that the page in docs
// names, also while brokers are deleted. It drops sessions, and finds the pods of a key in the brokers' logs.
func TestSessionsOfRealBrokers(t *testing.T) {
	before, err := d.Pods(t.Context(), "broker")
	if err != nil {
		t.Fatal(err)
	}
	scale(t, "broker", 3)
	t.Cleanup(func() { scale(t, "broker", len(before)) })
	program := command(t)
	allow(t, "oncall", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}},
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods/portforward"}, Verbs: []string{"create"}},
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods/log"}, Verbs: []string{"get"}})
	allow(t, "reader", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}})
	run := func(user string, args ...string) (string, error) {
		return d.Run(t.Context(), "", program, append([]string{"--as=" + user, "--credence-namespace=" + deployment.Namespace, "sessions"}, args...)...)
	}
	read := func(args ...string) (page sessionsPage, err error) {
		out, runErr := run("oncall", append(args, "-o=json")...)
		return page, errors.Join(json.Unmarshal([]byte(out), &page), runErr)
	}

	ns := d.Namespace(t)
	for _, name := range []string{"cart-1", "cart-2"} {
		kubetest.Create(t, d.Client, ns, paused(name, map[string]string{roleKey: "cart"}))
	}
	for _, name := range []string{"cart-1", "cart-2"} {
		kubetest.AwaitReady(t, d.Client, ns, name)
	}
	pods := []string{ns + "/cart-1", ns + "/cart-2"}
	owners := func() (keys map[string]string) {
		await.Until(t, "two of three brokers own the session", func() error {
			keys = map[string]string{}
			page, err := read("--pod=cart-2", "-n="+ns)
			for _, s := range page.Sessions {
				if s.Owner && s.Key != "" && s.Role == stack.RoleARN("cart") && slices.Equal(s.PodNames, pods) {
					keys[s.Broker] = s.Key
				}
			}
			if len(keys) != 2 || len(page.Brokers) != 3 {
				return fmt.Errorf("%+v, %w", page, err)
			}
			return err
		})
		return keys
	}
	first := owners()

	if out, err := run("reader"); err == nil || strings.Count(out, "needs: create pods/portforward in namespace "+deployment.Namespace) != 3 {
		t.Errorf("without the right: %v\n%s", err, out)
	}
	if out, err := run("oncall", "drop", "--role=cart", "--yes"); err != nil || strings.Count(out, ": dropped ") != 3 {
		t.Errorf("drop: %v\n%s", err, out)
	}
	after := owners()
	for name, key := range first {
		if after[name] == key {
			t.Errorf("broker %s still has key %s", name, key)
		}
	}
	// Sidecars have called an owner or, after 250 ms, the next one, so one of the first keys is theirs.
	found := 0
	for _, key := range first {
		out, err := run("oncall", "who", key)
		if strings.Contains(out, "cart-1") && strings.Contains(out, "cart-2") && err == nil {
			found++
			t.Logf("\n%s", out)
		}
	}
	if found == 0 {
		t.Errorf("no pod is known for any of %v", first)
	}
	out, err := run("oncall", "-o=wide")
	t.Logf("%v\n%s", err, out)

	brokers, err := d.Pods(t.Context(), "broker")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range brokers {
		if err := d.Client.CoreV1().Pods(deployment.Namespace).Delete(t.Context(), b.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	reads, incomplete := 0, 0
	await.Until(t, "the brokers are replaced", func() error {
		page, err := read()
		failed := false
		for _, b := range page.Brokers {
			failed = failed || b.Error != ""
		}
		if reads++; failed {
			incomplete++
		}
		if failed != (err != nil) && len(page.Brokers) > 0 { // Without a broker there is no page.
			t.Errorf("the exit code does not fit: %v, %+v", err, page.Brokers)
		}
		return replaced(t.Context(), 3)
	})
	t.Logf("%d reads while the brokers were replaced, %d incomplete", reads, incomplete)
	owners()
}

// replaced returns nil if that many brokers are ready and none terminates.
func replaced(ctx context.Context, count int) error {
	pods, err := d.Pods(ctx, "broker")
	for n := range pods {
		err = errors.Join(err, kubetest.Ready(&pods[n]))
		if pods[n].DeletionTimestamp != nil {
			err = errors.Join(err, errors.New(pods[n].Name+" terminates"))
		}
	}
	if len(pods) != count {
		err = errors.Join(err, fmt.Errorf("%d brokers", len(pods)))
	}
	return err
}

// allow gives a user these rights in the namespace of Credence until the test ends.
func allow(t *testing.T, user string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	rbac, object := d.Client.RbacV1(), metav1.ObjectMeta{Name: "test-" + user}
	if _, err := rbac.Roles(deployment.Namespace).Create(t.Context(), &rbacv1.Role{ObjectMeta: object, Rules: rules}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := rbac.RoleBindings(deployment.Namespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: object, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: object.Name},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: user}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		err := rbac.RoleBindings(deployment.Namespace).Delete(ctx, object.Name, metav1.DeleteOptions{})
		if err := errors.Join(err, rbac.Roles(deployment.Namespace).Delete(ctx, object.Name, metav1.DeleteOptions{})); err != nil {
			t.Error(err)
		}
	})
}
