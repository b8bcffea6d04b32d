//go:build unix

package chart_test

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestWebhookConfiguration has each field of the chart's configuration a second time. A wrong field lets pods start without a
// sidecar, or blocks other pods.
func TestWebhookConfiguration(t *testing.T) {
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

// TestPoliciesFailClosed shows that a policy that refuses also refuses if its expressions fail, and that a policy that warns
// never refuses.
func TestPoliciesFailClosed(t *testing.T) {
	t.Parallel()
	actions, closed := map[string]string{}, map[string]bool{}
	for _, o := range objects(t, "defaults") {
		switch o := o.(type) {
		case *admissionregistrationv1.ValidatingAdmissionPolicy:
			closed[o.Name] = o.Spec.FailurePolicy == nil || *o.Spec.FailurePolicy == admissionregistrationv1.Fail
		case *admissionregistrationv1.ValidatingAdmissionPolicyBinding:
			actions[o.Spec.PolicyName] = fmt.Sprint(o.Spec.ValidationActions)
		case *admissionregistrationv1.MutatingWebhookConfiguration:
			for _, w := range o.Webhooks {
				if w.FailurePolicy != nil && *w.FailurePolicy != admissionregistrationv1.Fail {
					t.Errorf("webhook %s has failurePolicy %s", w.Name, *w.FailurePolicy)
				}
			}
		}
	}
	want := map[string]string{
		"credence-injected": "[Deny]", "credence-fixed-keys": "[Deny]",
		"credence-not-opted-in": "[Warn Audit]", "credence-not-opted-in-templates": "[Warn Audit]", "credence-opt-in-label": "[Warn Audit]",
	}
	if diff := cmp.Diff(want, actions); diff != "" {
		t.Errorf("what bindings do (-want +got):\n%s", diff)
	}
	for name, action := range want {
		if isClosed, ok := closed[name]; !ok || isClosed != (action == "[Deny]") {
			t.Errorf("policy %s, which does %s, fails closed: %v", name, action, isClosed)
		}
	}
}
