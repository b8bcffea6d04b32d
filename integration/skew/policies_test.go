//go:build unix

package skew_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/tools"
)

// objects returns the objects of a version's chart with default values. They come from a golden file, which tests of package
// chart compare with Helm's output.
func objects(t *testing.T, n int) []runtime.Object {
	t.Helper()
	root, err := tools.Checkout()
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := os.ReadFile(filepath.Join([]string{previous.Source, root}[n], "integration", "chart", "testdata", "defaults.golden.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	all, err := chart.Decode(rendered)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// installPolicies installs the admission policies of both versions' charts, side by side. A pod must comply with both.
func installPolicies(t *testing.T) {
	t.Helper()
	admission := credence.Client.AdmissionregistrationV1()
	policies, bindings := admission.ValidatingAdmissionPolicies(), admission.ValidatingAdmissionPolicyBindings()
	install := func(policy *admissionregistrationv1.ValidatingAdmissionPolicy, binding *admissionregistrationv1.ValidatingAdmissionPolicyBinding) {
		t.Helper()
		if _, err := policies.Create(t.Context(), policy, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := bindings.Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range versions {
		all, installed := objects(t, n), 0
		for _, policy := range chart.Of[*admissionregistrationv1.ValidatingAdmissionPolicy](all) {
			for _, binding := range chart.Of[*admissionregistrationv1.ValidatingAdmissionPolicyBinding](all) {
				if binding.Spec.PolicyName == policy.Name {
					name := versions[n].name + "-" + policy.Name
					binding.Name, binding.Spec.PolicyName, policy.Name = name, name, name
					install(policy, binding)
					installed++
				}
			}
		}
		if installed < 3 {
			t.Fatalf("the chart of the %s version has %d bound policies, want at least 3", versions[n].name, installed)
		}
	}
	// The API server learns of policies in their order, so this one takes effect last.
	const last = "last"
	install(&admissionregistrationv1.ValidatingAdmissionPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: last},
		Spec: admissionregistrationv1.ValidatingAdmissionPolicySpec{
			MatchConstraints: &admissionregistrationv1.MatchResources{ResourceRules: []admissionregistrationv1.NamedRuleWithOperations{{
				RuleWithOperations: admissionregistrationv1.RuleWithOperations{
					Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
					Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}},
				},
			}}},
			MatchConditions: []admissionregistrationv1.MatchCondition{{Name: last, Expression: "object.metadata.name == '" + last + "'"}},
			Validations:     []admissionregistrationv1.Validation{{Expression: "false"}},
		},
	}, &admissionregistrationv1.ValidatingAdmissionPolicyBinding{
		ObjectMeta: metav1.ObjectMeta{Name: last},
		Spec: admissionregistrationv1.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: last, ValidationActions: []admissionregistrationv1.ValidationAction{admissionregistrationv1.Deny},
		},
	})
	await.Until(t, "all policies are in effect", func() error {
		if _, err := credence.Client.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: last},
		}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err == nil {
			return errors.New("the last one is not")
		}
		return nil
	})
}
