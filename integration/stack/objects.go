//go:build unix

package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
)

const (
	trustConfigMap = "credence-trust"
	optedIn        = "iam.amazonaws.com/inject" // the label of namespaces
)

// chartObjects returns the objects of the chart with default values. They come from a golden file, which tests of package
// chart compare with Helm's output, so that a stack needs no Helm.
func chartObjects() ([]runtime.Object, error) {
	folder, err := chart.Folder()
	if err != nil {
		return nil, err
	}
	rendered, err := os.ReadFile(filepath.Join(folder, "..", "..", "integration", "chart", "testdata", "defaults.golden.yaml"))
	if err != nil {
		return nil, fmt.Errorf("reading the chart's objects: %w", err)
	}
	return chart.Decode(rendered)
}

// ChartMemory returns the memory limits of the broker and the webhook in the chart, in bytes.
func ChartMemory() (broker, webhook int64, err error) {
	objects, err := chartObjects()
	if err != nil {
		return 0, 0, err
	}
	limits := make(map[string]int64)
	for _, d := range chart.Of[*appsv1.Deployment](objects) {
		limits[d.Name] = d.Spec.Template.Spec.Containers[0].Resources.Limits.Memory().Value()
	}
	if limits[brokerName] <= 0 || limits[webhookName] <= 0 {
		return 0, 0, errors.New("the chart has no memory limit for the broker or the webhook")
	}
	return limits[brokerName], limits[webhookName], nil
}

// install makes Credence's namespace, and the chart's service accounts with their rights.
func (s *Stack) install(ctx context.Context) error {
	objects, err := chartObjects()
	if err != nil {
		return err
	}
	core, rbac, create := s.Client.CoreV1(), s.Client.RbacV1(), metav1.CreateOptions{}
	_, err = core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: SystemNamespace}}, create)
	for _, object := range objects {
		if err != nil {
			break
		}
		switch o := object.(type) {
		case *corev1.ServiceAccount:
			_, err = core.ServiceAccounts(SystemNamespace).Create(ctx, o, create)
		case *rbacv1.ClusterRole:
			if o.Name == brokerName { // for tests with token reviews, which are not the chart's default
				o.Rules = append(o.Rules, rbacv1.PolicyRule{
					APIGroups: []string{authenticationv1.GroupName}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"},
				})
			}
			_, err = rbac.ClusterRoles().Create(ctx, o, create)
		case *rbacv1.ClusterRoleBinding:
			_, err = rbac.ClusterRoleBindings().Create(ctx, o, create)
		case *rbacv1.Role:
			_, err = rbac.Roles(SystemNamespace).Create(ctx, o, create)
		case *rbacv1.RoleBinding:
			_, err = rbac.RoleBindings(SystemNamespace).Create(ctx, o, create)
		case *admissionregistrationv1.MutatingWebhookConfiguration:
			s.registrations = append(s.registrations, o)
		}
	}
	if err == nil && len(s.registrations) == 0 {
		err = errors.New("the chart registers no webhook")
	}
	if err != nil {
		return fmt.Errorf("installing: %w", err)
	}
	return nil
}

// registerWebhook registers the webhook as the chart does, but at its address here. It returns when the API server calls it.
func (s *Stack) registerWebhook(ctx context.Context) error {
	url := "https://" + s.Webhook.Address + "/mutate"
	configs := s.Client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	for _, config := range s.registrations {
		for at := range config.Webhooks {
			config.Webhooks[at].ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: s.ca.PEM}
		}
		if _, err := configs.Create(ctx, config, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("registering the webhook: %w", err)
		}
	}
	const namespace = "credence-injection-check"
	if err := s.Namespace(ctx, namespace, nil); err != nil {
		return err
	}
	// The webhook refuses a misspelled key. As a dry run, the pod is never stored.
	pod := Pod("check", map[string]string{"iam.amazonaws.com/roel": "x"})
	if err := await.Poll(ctx, func() error {
		if _, err := s.Client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			return nil //nolint:nilerr // The webhook refuses.
		}
		return errors.New("the pod is not refused")
	}); err != nil {
		return fmt.Errorf("waiting until the API server calls the webhook: %w", err)
	}
	return s.Client.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{})
}

// setWebhookRoots replaces the roots with which the API server verifies the webhook.
func (s *Stack) setWebhookRoots(ctx context.Context, roots []byte) error {
	configs := s.Client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	for _, registered := range s.registrations {
		config, err := configs.Get(ctx, registered.Name, metav1.GetOptions{})
		if err == nil {
			for at := range config.Webhooks {
				config.Webhooks[at].ClientConfig.CABundle = roots
			}
			_, err = configs.Update(ctx, config, metav1.UpdateOptions{})
		}
		if err != nil {
			return fmt.Errorf("updating the webhook's registration: %w", err)
		}
	}
	return nil
}

// MinimumLasts returns an ststest.Config.SessionDuration with which a session that was requested for 15 minutes, the minimum
// of AWS, has the given duration. So tests can wait for renewals.
func MinimumLasts(actual time.Duration) func(requested time.Duration) time.Duration {
	return func(requested time.Duration) time.Duration {
		if requested == 15*time.Minute {
			return actual
		}
		return requested
	}
}

// Pod returns a small pod with these annotations, as a user would write it.
func Pod(name string, annotations map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app:1"}}},
	}
}
