//go:build unix

package admission

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/chart"
)

// TestInstallation follows one release from its installation over an upgrade that changes every key's prefix to
// the end, and tries the policies before and after.
func TestInstallation(t *testing.T) {
	own := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: chart.Namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}}}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), own, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if !t.Run("EveryObjectIsTaken", everyObjectIsTaken) {
		return
	}
	for _, release := range []struct{ name, prefix string }{
		{"Installed", "iam.amazonaws.com"},
		{"UpgradedToAnotherPrefix", "aws.example.com"},
	} {
		t.Run(release.name, func(t *testing.T) {
			cfg := config()
			cfg.Set = []string{"annotationPrefix=" + release.prefix}
			if err := chart.Install(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
			w := &world{prefix: release.prefix}
			t.Run("OwnPodsAreAdmitted", ownPodsAreAdmitted)
			t.Run("PoliciesAreWellTyped", policiesAreWellTyped)
			t.Run("WebhookAway", w.webhookAway)
			// From here on, not even its configuration is there.
			if err := client.AdmissionregistrationV1().MutatingWebhookConfigurations().Delete(t.Context(), "credence", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			w.awaitPolicies(t)
			t.Run("Injected", w.injected)
			t.Run("FixedKeys", w.fixedKeys)
			t.Run("Commands", w.commands)
			t.Run("Recreated", w.recreated)
			t.Run("Relabelled", w.relabelled)
			t.Run("Forged", w.forged)
			t.Run("Warned", w.warned)
			t.Run("OthersAreUnaffected", w.othersAreUnaffected)
			t.Run("LaterWebhooks", w.laterWebhooks)
			if release.name == "Installed" { // which takes seconds, and no prefix makes a difference
				t.Run("Monsters", w.monsters)
			}
		})
	}
	t.Run("UninstallLeavesNothingThatBlocks", uninstall)
}

// everyObjectIsTaken: for each kind of installation, by the API server's own validation, which knows more than
// the types do.
func everyObjectIsTaken(t *testing.T) {
	files, err := filepath.Glob("../testdata/*.values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 5 {
		t.Fatalf("there are values for %d installations, want at least 5", len(files))
	}
	for _, file := range files {
		rendered, err := chart.Render(t.Context(), chart.Config{ValueFiles: []string{file}})
		if err != nil {
			t.Fatal(err)
		}
		all, err := chart.Decode(rendered)
		if err != nil {
			t.Fatal(err)
		}
		for _, object := range all {
			if kind := object.GetObjectKind().GroupVersionKind(); kind.Group == "monitoring.coreos.com" {
				t.Logf("%s: %s is not tried: its definition comes with the Prometheus Operator, which is not here", filepath.Base(file), kind.Kind)
				continue
			}
			if err := dryRun(t, object); err != nil {
				t.Errorf("%s: %v", filepath.Base(file), err)
			}
		}
	}
}

// dryRun applies an object on the server's side, without storing it.
func dryRun(t *testing.T, object runtime.Object) error {
	t.Helper()
	kind := object.GetObjectKind().GroupVersionKind()
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	resource, _ := meta.UnsafeGuessKindToResource(kind)
	m := object.(metav1.Object)
	_, err = objects.Resource(resource).Namespace(m.GetNamespace()).Patch(t.Context(), m.GetName(), types.ApplyPatchType, text, metav1.PatchOptions{
		DryRun: []string{metav1.DryRunAll}, FieldManager: "test", FieldValidation: metav1.FieldValidationStrict,
	})
	if err != nil {
		return fmt.Errorf("%s %s: %w", kind.Kind, m.GetName(), err)
	}
	return nil
}

// ownPodsAreAdmitted: to a namespace that enforces PodSecurity "restricted", with the priority of what a cluster
// cannot do without. Their controllers make them, as on any cluster; no node runs them.
func ownPodsAreAdmitted(t *testing.T) {
	for _, name := range []string{"credence-broker", "credence-webhook"} {
		if err := poll(t.Context(), func() error {
			d, err := client.AppsV1().Deployments(chart.Namespace).Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, c := range d.Status.Conditions {
				if c.Type == "ReplicaFailure" && c.Status == corev1.ConditionTrue {
					return errors.New(c.Message)
				}
			}
			if d.Status.ObservedGeneration != d.Generation || d.Status.UpdatedReplicas == 0 {
				return fmt.Errorf("%s has no pods: %+v", name, d.Status)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

// policiesAreWellTyped: the API server checks expressions against the types of what they are asked about, and
// says in the status what it thinks.
func policiesAreWellTyped(t *testing.T) {
	policies := client.AdmissionregistrationV1().ValidatingAdmissionPolicies()
	list, err := policies.List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=credence"})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Items) != 5 {
		t.Fatalf("there are %d policies, want 5", len(list.Items))
	}
	for _, p := range list.Items {
		var checked *admissionregistrationv1.ValidatingAdmissionPolicy
		if err := poll(t.Context(), func() (err error) {
			checked, err = policies.Get(t.Context(), p.Name, metav1.GetOptions{})
			if err == nil && checked.Status.ObservedGeneration != checked.Generation {
				err = errors.New("it is not checked")
			}
			return err
		}); err != nil {
			t.Fatalf("policy %s: %v", p.Name, err)
		}
		if checking := checked.Status.TypeChecking; checking != nil && len(checking.ExpressionWarnings) > 0 {
			t.Errorf("policy %s: %+v", p.Name, checking.ExpressionWarnings)
		}
	}
}

// uninstall ends the release. Afterwards nothing of it is left that has a say in whether a pod starts.
func uninstall(t *testing.T) {
	w := &world{prefix: "aws.example.com"}
	namespace := w.namespace(t, true)
	if _, err := chart.Helm(t.Context(), config(), "uninstall", chart.Release); err != nil {
		t.Fatal(err)
	}
	// The API server forgets a policy when its watch says so.
	if err := poll(t.Context(), func() error {
		_, err := client.CoreV1().Pods(namespace).Create(t.Context(), w.pod(w.annotated), metav1.CreateOptions{})
		return err
	}); err != nil {
		t.Errorf("an annotated pod of an opted-in namespace: %v", err)
	}
	left := map[string]int{}
	options := metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=credence"}
	count := func(kind string, list runtime.Object, err error) {
		if err != nil {
			t.Fatal(err)
		}
		if n := meta.LenList(list); n > 0 {
			left[kind] = n
		}
	}
	registration, rbac := client.AdmissionregistrationV1(), client.RbacV1()
	mutating, err := registration.MutatingWebhookConfigurations().List(t.Context(), options)
	count("MutatingWebhookConfiguration", mutating, err)
	policies, err := registration.ValidatingAdmissionPolicies().List(t.Context(), options)
	count("ValidatingAdmissionPolicy", policies, err)
	bindings, err := registration.ValidatingAdmissionPolicyBindings().List(t.Context(), options)
	count("ValidatingAdmissionPolicyBinding", bindings, err)
	roles, err := rbac.ClusterRoles().List(t.Context(), options)
	count("ClusterRole", roles, err)
	roleBindings, err := rbac.ClusterRoleBindings().List(t.Context(), options)
	count("ClusterRoleBinding", roleBindings, err)
	deployments, err := client.AppsV1().Deployments("").List(t.Context(), options)
	count("Deployment", deployments, err)
	budgets, err := client.PolicyV1().PodDisruptionBudgets("").List(t.Context(), options)
	count("PodDisruptionBudget", budgets, err)
	if diff := cmp.Diff(map[string]int{}, left); diff != "" {
		t.Errorf("the release has left (+):\n%s", diff)
	}
}

// webhookAway: its configuration is there and nobody answers, as while it is being installed, or down.
func (w *world) webhookAway(t *testing.T) {
	optedIn, plain := w.namespace(t, true), w.namespace(t, false)
	if err := poll(t.Context(), func() error {
		_, err := client.CoreV1().Pods(optedIn).Create(t.Context(), w.pod(w.annotated), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil || !strings.Contains(err.Error(), `failed calling webhook "inject.credence-iam.github.io"`) {
			return fmt.Errorf("an annotated pod of an opted-in namespace: %w", err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for name, create := range map[string]struct {
		namespace string
		pod       *corev1.Pod
	}{
		"a pod that is not annotated, in an opted-in namespace": {optedIn, w.pod()},
		"an annotated pod of another namespace":                 {plain, w.pod(w.annotated)},
	} {
		if _, err := client.CoreV1().Pods(create.namespace).Create(t.Context(), create.pod, metav1.CreateOptions{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
