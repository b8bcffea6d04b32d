//go:build unix

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/stack"
)

// TestSettingsAreFollowed has the webhook follow its settings of the sidecar, in a namespace whose LimitRange refuses a pod with the
// defaults and whose PodSecurity is strict. It runs the webhook with other flags, so not in parallel.
func TestSettingsAreFollowed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "settings.yaml")
	write := func(text string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(file+".new", []byte(text), 0o600), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	write("{}")
	credence.StopWebhook()
	t.Cleanup(func() {
		credence.StopWebhook()
		if err := credence.StartWebhook(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	})
	if err := credence.StartWebhook(t.Context(), "--sidecar-settings-file="+file, "--sidecar-log-level=warn"); err != nil {
		t.Fatal(err)
	}

	ns := strings.ToLower(t.Name())
	if err := credence.MakeNamespace(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: ns, Labels: map[string]string{injectLabel: "enabled", "pod-security.kubernetes.io/enforce": "restricted"}, Annotations: map[string]string{permittedKey: ".*"},
	}}); err != nil {
		t.Fatal(err)
	}
	discard(t, ns)
	least := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("50m"), corev1.ResourceMemory: resource.MustParse("64Mi")}
	if _, err := credence.Client.CoreV1().LimitRanges(ns).Create(t.Context(), &corev1.LimitRange{
		ObjectMeta: metav1.ObjectMeta{Name: "limits"}, Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{Type: corev1.LimitTypeContainer, Min: least}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	try := func() (*corev1.Pod, error) {
		pod := stack.Pod("app", map[string]string{roleKey: "cart"})
		pod.Spec.Containers[0].Resources = corev1.ResourceRequirements{Requests: least, Limits: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1"), corev1.ResourceMemory: resource.MustParse("64Mi")}}
		pod.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{
			RunAsNonRoot: new(true), AllowPrivilegeEscalation: new(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		}
		return credence.Client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	}
	metric := func(want string) error {
		text, err := credence.WebhookMetrics(t.Context())
		if err == nil && !strings.Contains(text, "\ncredence_webhook_sidecar_settings_file_ok "+want+"\n") {
			err = fmt.Errorf("credence_webhook_sidecar_settings_file_ok is not %s", want)
		}
		return err
	}

	soon(t, "the pod is refused for its sidecar's size", func() error {
		if _, err := try(); err == nil || !strings.Contains(err.Error(), "minimum memory usage per Container is 64Mi, but request is 16Mi") {
			return fmt.Errorf("answered %w", err)
		}
		return metric("1")
	})

	write("memory: 64Mi\ncpu: {request: 50m, limit: 0}\nport: 9780\nrunAsUser: 1000\nimagePullSecrets: [registry]\npodAnnotations: {sidecar.example/ports: '9443'}\n")
	taken := func() error {
		pod, err := try()
		if err != nil {
			return err
		}
		sidecar := pod.Spec.InitContainers[0]
		got := fmt.Sprint(resourcesOf(sidecar), " ", *sidecar.SecurityContext.RunAsUser, " ", pod.Spec.ImagePullSecrets, " ", pod.Annotations["sidecar.example/ports"])
		if want := "50m 0 64Mi 64Mi 1000 [{registry}] 9443"; got != want {
			return fmt.Errorf("the sidecar has %s, want %s", got, want)
		}
		for name, want := range map[string]string{"CREDENCE_LISTEN": "127.0.0.1:9780", "CREDENCE_LOG_LEVEL": "warn"} {
			if got := value(sidecar, name); got != want {
				return fmt.Errorf("%s is %q, want %q", name, got, want)
			}
		}
		if uri := value(pod.Spec.Containers[0], "AWS_CONTAINER_CREDENTIALS_FULL_URI"); !strings.HasPrefix(uri, "http://127.0.0.1:9780/") {
			return fmt.Errorf("SDKs are sent to %q", uri)
		}
		return injected(pod)
	}
	soon(t, "the pod is injected by the new settings", taken)

	write("memory: 64MB\n")
	soon(t, "the metrics tell that the file is wrong", func() error { return metric("0") })
	if err := taken(); err != nil {
		t.Errorf("after a wrong file: %v", err)
	}
	write("memory: 128Mi\ncpu: {request: 50m}\n")
	soon(t, "a good file is taken up", func() error {
		pod, err := try()
		if err == nil && resourcesOf(pod.Spec.InitContainers[0]) != "50m 100m 128Mi 128Mi" {
			err = fmt.Errorf("the sidecar has %s", resourcesOf(pod.Spec.InitContainers[0]))
		}
		return errors.Join(err, metric("1"))
	})
}

func value(c corev1.Container, name string) string {
	for _, v := range c.Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}
