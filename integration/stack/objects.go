//go:build unix

package stack

import (
	"context"
	"fmt"
	"net"
	"strconv"

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
)

// install makes our namespace and service accounts, with the rights that they use and no more.
func (s *Stack) install(ctx context.Context) error {
	core, rbac := s.Client.CoreV1(), s.Client.RbacV1()
	if _, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: SystemNamespace}}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("installing: %w", err)
	}
	read := []string{"get", "list", "watch"}
	rules := map[string][]rbacv1.PolicyRule{
		brokerName: {
			{APIGroups: []string{""}, Resources: []string{"pods", "namespaces", "serviceaccounts"}, Verbs: read},
			{NonResourceURLs: []string{"/openid/v1/jwks", "/.well-known/openid-configuration"}, Verbs: []string{"get"}},
			{APIGroups: []string{eventsv1.GroupName}, Resources: []string{"events"}, Verbs: []string{"create"}},
			{APIGroups: []string{authenticationv1.GroupName}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}}, // where a test has tokens reviewed
			{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{trustConfigMap}, Verbs: []string{"list", "watch", "create", "patch"}},
			{APIGroups: []string{rbacv1.GroupName}, Resources: []string{"clusterroles"}, ResourceNames: []string{brokerName}, Verbs: []string{"get"}},
		},
		webhookName: {
			{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: read},
		},
	}
	for name, rules := range rules {
		account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if _, err := core.ServiceAccounts(SystemNamespace).Create(ctx, account, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("installing: %w", err)
		}
		role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
		if _, err := rbac.ClusterRoles().Create(ctx, role, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("installing: %w", err)
		}
		binding := &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
			Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: SystemNamespace, Name: name}},
		}
		if _, err := rbac.ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("installing: %w", err)
		}
	}
	return s.installLead(ctx)
}

// installLead gives the broker what it needs in our own namespace: to know the other brokers, and to be the one that
// publishes trust.
func (s *Stack) installLead(ctx context.Context) error {
	role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: brokerName}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{trustConfigMap}, Verbs: []string{"get"}},
		{APIGroups: []string{discoveryv1.GroupName}, Resources: []string{"endpointslices"}, Verbs: []string{"list", "watch"}},
		{APIGroups: []string{coordinationv1.GroupName}, Resources: []string{"leases"}, Verbs: []string{"create"}}, // never limited by name
		{APIGroups: []string{coordinationv1.GroupName}, Resources: []string{"leases"}, ResourceNames: []string{brokerName}, Verbs: []string{"get", "update"}},
	}}
	if _, err := s.Client.RbacV1().Roles(SystemNamespace).Create(ctx, role, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("installing: %w", err)
	}
	binding := &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: brokerName},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: brokerName},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: SystemNamespace, Name: brokerName}},
	}
	if _, err := s.Client.RbacV1().RoleBindings(SystemNamespace).Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("installing: %w", err)
	}
	return nil
}

// Webhook returns what the API server is told of the webhook, but for where it is. A test holds it to the chart's.
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

// registerWebhook makes the API server call the webhook, and returns when it does.
func (s *Stack) registerWebhook(ctx context.Context) error {
	url := "https://" + net.JoinHostPort(loopback, strconv.Itoa(s.hookPort)) + "/mutate"
	webhook := Webhook()
	webhook.ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: s.ca.PEM}
	config := &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: configuration}, Webhooks: []admissionregistrationv1.MutatingWebhook{webhook},
	}
	if _, err := s.Client.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(ctx, config, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("registering the webhook: %w", err)
	}
	return s.awaitInjection(ctx)
}

// awaitInjection waits until the API server's own watch has brought it the configuration.
func (s *Stack) awaitInjection(ctx context.Context) error {
	const namespace = "credence-injection-check"
	if err := s.Namespace(ctx, namespace, nil); err != nil {
		return err
	}
	// A misspelt key, in a dry run: refused as soon as the webhook is called, and never stored.
	pod := Pod("check", map[string]string{"iam.amazonaws.com/roel": "x"})
	err := poll(ctx, func() (bool, error) {
		_, err := s.Client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err != nil, nil
	})
	if err != nil {
		return fmt.Errorf("waiting for the webhook to be called: %w", err)
	}
	if err := s.Client.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("cleaning up the injection check: %w", err)
	}
	return nil
}

// trustWebhook replaces the roots by which the API server knows the webhook.
func (s *Stack) trustWebhook(ctx context.Context, roots []byte) error {
	configs := s.Client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	config, err := configs.Get(ctx, configuration, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("reading the webhook's registration: %w", err)
	}
	config.Webhooks[0].ClientConfig.CABundle = roots
	if _, err := configs.Update(ctx, config, metav1.UpdateOptions{}); err != nil {
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
