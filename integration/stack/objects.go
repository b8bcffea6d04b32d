//go:build unix

package stack

import (
	"context"
	"errors"
	"fmt"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	trustConfigMap = "credence-trust"
	configuration  = "credence"
	optedIn        = "iam.amazonaws.com/inject" // the label of namespaces
)

var (
	watch = []string{"get", "list", "watch"}
	// clusterRules are the rights of each program in the whole cluster.
	clusterRules = map[string][]rbacv1.PolicyRule{
		brokerName: {
			{APIGroups: []string{""}, Resources: []string{"pods", "namespaces", "serviceaccounts"}, Verbs: watch},
			{NonResourceURLs: []string{"/openid/v1/jwks", "/.well-known/openid-configuration"}, Verbs: []string{"get"}},
			{APIGroups: []string{eventsv1.GroupName}, Resources: []string{"events"}, Verbs: []string{"create"}},
			{APIGroups: []string{authenticationv1.GroupName}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}}, // for tests with token reviews
			{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{trustConfigMap}, Verbs: []string{"list", "watch", "create", "patch"}},
			{APIGroups: []string{rbacv1.GroupName}, Resources: []string{"clusterroles"}, ResourceNames: []string{brokerName}, Verbs: []string{"get"}},
		},
		webhookName: {
			{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: watch},
		},
	}
	// brokerRules are the broker's rights in Credence's namespace: to see the other brokers, and to elect the one that
	// publishes trust.
	brokerRules = []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{trustConfigMap}, Verbs: []string{"get"}},
		{APIGroups: []string{discoveryv1.GroupName}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{coordinationv1.GroupName}, Resources: []string{"leases"}, Verbs: []string{"create"}}, // RBAC cannot limit it by name
		{APIGroups: []string{coordinationv1.GroupName}, Resources: []string{"leases"}, ResourceNames: []string{brokerName}, Verbs: []string{"get", "update"}},
	}
)

// install makes Credence's namespace, and service accounts with only the rights that they use.
func (s *Stack) install(ctx context.Context) error {
	core, rbac, create := s.Client.CoreV1(), s.Client.RbacV1(), metav1.CreateOptions{}
	named := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Name: name} }
	subject := func(name string) []rbacv1.Subject {
		return []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: SystemNamespace, Name: name}}
	}
	_, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: named(SystemNamespace)}, create)
	errs := []error{err}
	for name, rules := range clusterRules {
		_, err := core.ServiceAccounts(SystemNamespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: named(name)}, create)
		errs = append(errs, err)
		_, err = rbac.ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: named(name), Rules: rules}, create)
		errs = append(errs, err)
		_, err = rbac.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
			ObjectMeta: named(name), Subjects: subject(name), RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
		}, create)
		errs = append(errs, err)
	}
	_, err = rbac.Roles(SystemNamespace).Create(ctx, &rbacv1.Role{ObjectMeta: named(brokerName), Rules: brokerRules}, create)
	errs = append(errs, err)
	_, err = rbac.RoleBindings(SystemNamespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: named(brokerName), Subjects: subject(brokerName), RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: brokerName},
	}, create)
	if err := errors.Join(append(errs, err)...); err != nil {
		return fmt.Errorf("installing: %w", err)
	}
	return nil
}

// Webhook returns the webhook's registration without its address. A test compares it with the chart's.
func Webhook() admissionregistrationv1.MutatingWebhook {
	failurePolicy, reinvocation, sideEffects := admissionregistrationv1.Fail, admissionregistrationv1.IfNeededReinvocationPolicy, admissionregistrationv1.SideEffectClassNone
	scope, timeout := admissionregistrationv1.NamespacedScope, int32(5)
	return admissionregistrationv1.MutatingWebhook{
		Name:                    "inject.credence-iam.github.io",
		AdmissionReviewVersions: []string{"v1"},
		FailurePolicy:           &failurePolicy,
		ReinvocationPolicy:      &reinvocation,
		SideEffects:             &sideEffects,
		TimeoutSeconds:          &timeout,
		Rules: []admissionregistrationv1.RuleWithOperations{{
			Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
			Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}, Scope: &scope},
		}},
		NamespaceSelector: &metav1.LabelSelector{
			MatchLabels: map[string]string{optedIn: "enabled"},
			MatchExpressions: []metav1.LabelSelectorRequirement{{
				Key: corev1.LabelMetadataName, Operator: metav1.LabelSelectorOpNotIn, Values: []string{"cert-manager", SystemNamespace, metav1.NamespaceSystem},
			}},
		},
		MatchConditions: []admissionregistrationv1.MatchCondition{{
			Name:       "annotated",
			Expression: `has(object.metadata.annotations) && (object.metadata.annotations.size() > 5000 || object.metadata.annotations.exists(key, key.startsWith("iam.amazonaws.com/")))`,
		}},
	}
}

// registerWebhook registers the webhook with the API server, and returns when the API server calls it.
func (s *Stack) registerWebhook(ctx context.Context) error {
	url, webhook := "https://"+s.webhook.address+"/mutate", Webhook()
	webhook.ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: s.ca.PEM}
	if _, err := s.Client.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(ctx, &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: configuration}, Webhooks: []admissionregistrationv1.MutatingWebhook{webhook},
	}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("registering the webhook: %w", err)
	}
	const namespace = "credence-injection-check"
	if err := s.Namespace(ctx, namespace, nil); err != nil {
		return err
	}
	// The webhook refuses a misspelt key. As a dry run, the pod is never stored.
	pod := Pod("check", map[string]string{"iam.amazonaws.com/roel": "x"})
	if err := poll(ctx, func() bool {
		_, err := s.Client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err != nil
	}); err != nil {
		return fmt.Errorf("waiting until the API server calls the webhook: %w", err)
	}
	return s.Client.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{})
}

// setWebhookRoots replaces the roots with which the API server verifies the webhook.
func (s *Stack) setWebhookRoots(ctx context.Context, roots []byte) error {
	configs := s.Client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	config, err := configs.Get(ctx, configuration, metav1.GetOptions{})
	if err == nil {
		config.Webhooks[0].ClientConfig.CABundle = roots
		_, err = configs.Update(ctx, config, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("updating the webhook's registration: %w", err)
	}
	return nil
}

// Pod returns a small pod with these annotations, as a user would write it.
func Pod(name string, annotations map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app:1"}}},
	}
}
