//go:build unix

package admission

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
)

// TestInstallation installs a release, upgrades it to another prefix of all keys, and uninstalls it. It tests the policies
// after the installation and after the upgrade.
func TestInstallation(t *testing.T) {
	own := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: chart.Namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}}}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), own, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if !t.Run("EveryObjectIsAccepted", everyObjectIsAccepted) {
		return
	}
	for _, release := range []struct{ name, prefix string }{
		{"Installed", "iam.amazonaws.com"},
		{"UpgradedToAnotherPrefix", "aws.example.com"},
	} {
		t.Run(release.name, func(t *testing.T) {
			cfg := config()
			cfg.Set = []string{"annotationPrefix=" + release.prefix}
			// No node runs the check. Check acts as one.
			if _, err := chart.Install(t.Context(), cfg, "--no-hooks"); err != nil {
				t.Fatal(err)
			}
			w := &world{prefix: release.prefix}
			t.Run("OwnPodsAreAdmitted", ownPodsAreAdmitted)
			t.Run("PoliciesAreWellTyped", policiesAreWellTyped)
			t.Run("WebhookUnavailable", w.webhookUnavailable)
			// The policies must hold even without the webhook's configuration.
			if err := client.AdmissionregistrationV1().MutatingWebhookConfigurations().Delete(t.Context(), "credence", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			w.awaitPolicies(t)
			t.Run("Injected", w.injected)
			t.Run("FixedKeys", w.fixedKeys)
			t.Run("Recreated", w.recreated)
			t.Run("Relabelled", w.relabelled)
			t.Run("EphemeralContainers", w.ephemeralContainers)
			t.Run("Warned", w.warned)
			t.Run("OthersAreUnaffected", w.othersAreUnaffected)
			t.Run("LaterWebhooks", w.laterWebhooks)
			if release.name == "Installed" { // it takes seconds and does not depend on the prefix
				t.Run("Monsters", w.monsters)
			}
		})
	}
	t.Run("Check", check)
	t.Run("OldNodesAreNamed", oldNodesAreNamed)
	t.Run("UninstallLeavesNothingThatBlocks", uninstall)
}

// everyObjectIsAccepted validates the objects of each kind of installation on the API server, which checks more than the
// types do.
func everyObjectIsAccepted(t *testing.T) {
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
		for _, namespace := range []string{"credentials", "monitoring", "shop"} { // of the case "everything"
			if err := apply(t, &corev1.Namespace{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: namespace}}); err != nil {
				t.Fatal(err)
			}
		}
		for _, object := range all {
			if kind := object.GetObjectKind().GroupVersionKind(); kind.Group == "monitoring.coreos.com" {
				t.Logf("%s: %s is not tested, because the Prometheus Operator, which defines it, is not installed", filepath.Base(file), kind.Kind)
				continue
			}
			if err := apply(t, object, metav1.DryRunAll); err != nil {
				t.Errorf("%s: %v", filepath.Base(file), err)
			}
		}
	}
}

// ownPodsAreAdmitted shows that the pods of the chart are admitted to a namespace that enforces PodSecurity "restricted",
// with a system priority. Their controllers create them, and no node runs them.
func ownPodsAreAdmitted(t *testing.T) {
	for _, name := range []string{"credence-broker", "credence-webhook"} {
		await.Until(t, "the pods of "+name+" are admitted", func() error {
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
				return fmt.Errorf("there are no pods: %+v", d.Status)
			}
			return nil
		})
	}
}

// policiesAreWellTyped shows that the API server's type check has no warning about the expressions of the policies.
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
		await.Until(t, "policy "+p.Name+" is checked", func() (err error) {
			checked, err = policies.Get(t.Context(), p.Name, metav1.GetOptions{})
			if err == nil && checked.Status.ObservedGeneration != checked.Generation {
				err = errors.New("it is not checked")
			}
			return err
		})
		if checking := checked.Status.TypeChecking; checking != nil && len(checking.ExpressionWarnings) > 0 {
			t.Errorf("policy %s: %+v", p.Name, checking.ExpressionWarnings)
		}
	}
}

// uninstall shows that nothing of an uninstalled release decides about pods.
func uninstall(t *testing.T) {
	w := &world{prefix: "aws.example.com"}
	namespace := w.namespace(t, true)
	if _, err := chart.Helm(t.Context(), config(), "uninstall", chart.Release); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "an annotated pod is admitted", func() error { // the API server watches policies
		return try(t, namespace, w.pod(w.annotated))
	})
	for _, resource := range []schema.GroupVersionResource{
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "mutatingwebhookconfigurations"},
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicies"},
		{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicybindings"},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "roles"},
		{Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"},
		{Version: "v1", Resource: "serviceaccounts"},
		{Version: "v1", Resource: "configmaps"},
		{Group: "batch", Version: "v1", Resource: "jobs"},
		{Group: "apps", Version: "v1", Resource: "deployments"},
		{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"},
	} {
		list, err := objects.Resource(resource).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=credence"})
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Items) > 0 {
			t.Errorf("the release left %d %s", len(list.Items), resource.Resource)
		}
	}
}

// webhookUnavailable shows that the API server refuses annotated pods while no webhook runs. It admits all other pods,
// so it does not call the webhook for them: with failurePolicy Fail, such a call would fail.
func (w *world) webhookUnavailable(t *testing.T) {
	optedIn, plain := w.namespace(t, true), w.namespace(t, false)
	await.Until(t, "an annotated pod of an opted-in namespace is refused", func() error {
		err := tryDry(t, optedIn, w.pod(w.annotated))
		if err == nil || !strings.Contains(err.Error(), `failed calling webhook "inject.credence-iam.github.io"`) {
			return fmt.Errorf("got %w", err)
		}
		if !apierrors.IsInternalError(err) {
			return await.Never{Err: fmt.Errorf("controllers do not retry after %w", err)}
		}
		return nil
	})
	for name, other := range map[string]struct {
		namespace string
		pod       *corev1.Pod
	}{
		"a pod that is not annotated, in an opted-in namespace": {optedIn, w.pod()},
		"an annotated pod of another namespace":                 {plain, w.pod(w.annotated)},
		"an annotated pod of kube-system":                       {metav1.NamespaceSystem, w.pod(w.annotated)},
	} {
		if err := tryDry(t, other.namespace, other.pod); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
