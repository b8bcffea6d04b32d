//go:build unix

package admission

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
)

// world creates pods and namespaces with keys of one prefix.
type world struct{ prefix string }

// objectCount counts the objects with a generated name.
var objectCount int

// name returns a name that no other object has.
func name(what string) string {
	objectCount++
	return fmt.Sprintf("%s-%d", what, objectCount)
}

// namespace creates a namespace and returns its name.
func (w *world) namespace(t *testing.T, optedIn bool) string {
	t.Helper()
	labels := map[string]string{}
	if optedIn {
		labels[w.prefix+"/inject"] = "enabled"
	}
	return kubetest.Namespace(t, client, labels, nil)
}

// pod returns a pod as a user writes it, with changes.
func (w *world) pod(changes ...func(*corev1.Pod)) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name("pod")},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app:1"}}},
	}
	for _, change := range changes {
		change(pod)
	}
	return pod
}

func annotate(key, value string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { metav1.SetMetaDataAnnotation(&pod.ObjectMeta, key, value) }
}

func label(key, value string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { metav1.SetMetaDataLabel(&pod.ObjectMeta, key, value) }
}

func (w *world) annotated(pod *corev1.Pod) { annotate(w.prefix+"/role", "cart")(pod) }

// sidecar adds those fields of the sidecar that the policies check.
func sidecar(image string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, corev1.Container{
			Name: "credence-sidecar", Image: image, Command: []string{"/credence-sidecar"}, RestartPolicy: new(corev1.ContainerRestartPolicyAlways),
		})
	}
}

const sidecarImage = "ghcr.io/credence-iam/credence-sidecar:0.1.0"

// complete injects a pod as the webhook does.
func (w *world) complete(pod *corev1.Pod) { w.completeWith(sidecarImage)(pod) }

// completeWith is complete with another sidecar image.
func (w *world) completeWith(image string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		w.annotated(pod)
		annotate(w.prefix+"/service-account", "default")(pod)
		label(w.prefix+"/injected", "true")(pod)
		sidecar(image)(pod)
	}
}

// create creates a pod and returns it as stored.
func create(t *testing.T, namespace string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	return kubetest.Create(t, client, namespace, pod)
}

// try creates a pod that may be refused.
func try(t *testing.T, namespace string, pod *corev1.Pod) error {
	t.Helper()
	_, err := client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	return err
}

// tryDry creates the pod in a dry run.
func tryDry(t *testing.T, namespace string, pod *corev1.Pod) error {
	t.Helper()
	_, err := kubetest.Dry(t, client, namespace, pod)
	return err
}

var dry = metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}

// setOptIn sets the opt-in label of a namespace to a JSON value.
func (w *world) setOptIn(t *testing.T, namespace, value string) {
	t.Helper()
	text := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, w.prefix+"/inject", value)
	if _, err := client.CoreV1().Namespaces().Patch(t.Context(), namespace, types.MergePatchType, text, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// refusedBy returns nil if err is the refusal of that policy.
func refusedBy(policy string, err error) error {
	if err == nil {
		return fmt.Errorf("admitted, want a refusal by policy %s", policy)
	}
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), fmt.Sprintf("ValidatingAdmissionPolicy '%s'", policy)) || !strings.Contains(err.Error(), "credence: ") {
		return fmt.Errorf("got %w, want a refusal by policy %s", err, policy)
	}
	return nil
}

// awaitPolicies waits until the API server's watches have delivered both policies.
func (w *world) awaitPolicies(t *testing.T) {
	t.Helper()
	namespace := w.namespace(t, true)
	target := create(t, namespace, w.pod())
	await.Until(t, "both policies are in force", func() error {
		if err := refusedBy("credence-injected", tryDry(t, namespace, w.pod(w.annotated))); err != nil {
			return err
		}
		changed := target.DeepCopy()
		label(w.prefix+"/injected", "true")(changed)
		_, err := client.CoreV1().Pods(namespace).Update(t.Context(), changed, metav1.UpdateOptions{DryRun: []string{metav1.DryRunAll}})
		return refusedBy("credence-fixed-keys", err)
	})
}
