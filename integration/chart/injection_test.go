//go:build unix

package chart_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/stack"
)

// TestInjectionIsAskedFor: what decides which pods the webhook is called for, and what happens without it, is
// written here a second time. Each field that is wrong lets pods through uninjected, or holds up others'.
func TestInjectionIsAskedFor(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		prefix   string
		excluded []string
	}{
		"defaults":   {"iam.amazonaws.com", []string{"cert-manager", "credence", "kube-system"}},
		"everything": {"aws.example.com", []string{"certs", "credence"}},
	} {
		got := webhookConfiguration(t, objects(t, name)).Webhooks[0]
		got.ClientConfig.CABundle = nil
		scope := admissionregistrationv1.NamespacedScope
		want := admissionregistrationv1.MutatingWebhook{
			Name:                    "inject.credence-iam.github.io",
			AdmissionReviewVersions: []string{"v1"},
			ClientConfig: admissionregistrationv1.WebhookClientConfig{Service: &admissionregistrationv1.ServiceReference{
				Namespace: "credence", Name: "credence-webhook", Path: new("/mutate"), Port: new(int32(443)),
			}},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}, Scope: &scope},
			}},
			NamespaceSelector: &metav1.LabelSelector{
				MatchLabels:      map[string]string{tc.prefix + "/inject": "enabled"},
				MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "kubernetes.io/metadata.name", Operator: metav1.LabelSelectorOpNotIn, Values: tc.excluded}},
			},
			MatchConditions: []admissionregistrationv1.MatchCondition{{
				Name:       "annotated",
				Expression: `has(object.metadata.annotations) && (object.metadata.annotations.size() > 5000 || object.metadata.annotations.exists(key, key.startsWith("` + tc.prefix + `/")))`,
			}},
			FailurePolicy:      new(admissionregistrationv1.Fail),
			ReinvocationPolicy: new(admissionregistrationv1.IfNeededReinvocationPolicy),
			SideEffects:        new(admissionregistrationv1.SideEffectClassNone),
			TimeoutSeconds:     new(int32(5)),
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (- want, + got):\n%s", name, diff)
		}
	}
}

// TestStackAsksForTheSame: what the tests of a running Credence see of admission is what an installation does.
func TestStackAsksForTheSame(t *testing.T) {
	t.Parallel()
	installed := webhookConfiguration(t, objects(t, "defaults")).Webhooks[0]
	installed.ClientConfig = admissionregistrationv1.WebhookClientConfig{}
	if diff := cmp.Diff(installed, stack.Webhook()); diff != "" {
		t.Errorf("integration/stack registers another webhook (- chart, + stack):\n%s", diff)
	}
}
