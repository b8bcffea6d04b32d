//go:build unix

package chart_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"

	"github.com/credence-iam/credence/integration/stack"
)

// TestWebhookConfiguration compares the chart's configuration with that of package stack, which has each field a second
// time, and so with the behavior of all tests on a control plane. A wrong field lets pods start without a sidecar, or
// blocks other pods.
func TestWebhookConfiguration(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		prefix   string
		excluded []string
	}{
		"defaults":   {"iam.amazonaws.com", []string{"cert-manager", "credence", "kube-system"}},
		"everything": {"aws.example.com", []string{"certs", "credence"}},
	} {
		want := stack.Webhook()
		want.ClientConfig.Service = &admissionregistrationv1.ServiceReference{Namespace: "credence", Name: "credence-webhook", Path: new("/mutate"), Port: new(int32(443))}
		want.NamespaceSelector.MatchLabels = map[string]string{tc.prefix + "/inject": "enabled"}
		want.NamespaceSelector.MatchExpressions[0].Values = tc.excluded
		want.MatchConditions[0].Expression = strings.ReplaceAll(want.MatchConditions[0].Expression, "iam.amazonaws.com", tc.prefix)
		got := webhookConfiguration(t, objects(t, name)).Webhooks[0]
		got.ClientConfig.CABundle = nil
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
		}
	}
	want := map[string]string{
		"credence-injected": "[Deny]", "credence-fixed-keys": "[Deny]",
		"credence-not-opted-in": "[Warn Audit]", "credence-not-opted-in-templates": "[Warn Audit]", "credence-opt-in-label": "[Warn Audit]",
	}
	if diff := cmp.Diff(want, actions); diff != "" {
		t.Errorf("the actions of the bindings (- want, + got):\n%s", diff)
	}
	for name, action := range want {
		if isClosed, ok := closed[name]; !ok || isClosed != (action == "[Deny]") {
			t.Errorf("policy %s with the actions %s fails closed: %v", name, action, isClosed)
		}
	}
}
