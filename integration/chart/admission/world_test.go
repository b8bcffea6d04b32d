//go:build unix

package admission

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// world makes pods and namespaces with keys of one prefix.
type world struct{ prefix string }

// made counts the objects that were given a name.
var made int

// name returns a name that no other object has.
func name(what string) string {
	made++
	return fmt.Sprintf("%s-%d", what, made)
}

// namespace makes a namespace, and returns when pods can be made there.
func (w *world) namespace(t *testing.T, optedIn bool) string {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name("ns")}}
	if optedIn {
		ns.Labels = map[string]string{w.prefix + "/inject": "enabled"}
	}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := poll(t.Context(), func() error {
		_, err := client.CoreV1().ServiceAccounts(ns.Name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return ns.Name
}

// pod makes a pod as a user would write it, with changes.
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

// sidecar adds what the webhook would, as far as policies look at it.
func sidecar(image string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, corev1.Container{
			Name: "credence-sidecar", Image: image, Command: []string{"/credence-sidecar"}, RestartPolicy: new(corev1.ContainerRestartPolicyAlways),
		})
	}
}

const sidecarImage = "ghcr.io/credence-iam/credence-sidecar:0.1.0"

// complete makes a pod what the webhook makes of it.
func (w *world) complete(pod *corev1.Pod) {
	w.completeWith(sidecarImage)(pod)
}

// create makes a pod that is admitted.
func create(t *testing.T, namespace string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	stored, err := client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// refusedBy says why err is not the refusal of that policy, or nothing.
func refusedBy(policy string, err error) error {
	if err == nil {
		return fmt.Errorf("it was admitted, want a refusal by policy %s", policy)
	}
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), fmt.Sprintf("ValidatingAdmissionPolicy '%s'", policy)) || !strings.Contains(err.Error(), "credence: ") {
		return fmt.Errorf("answered %w, want a refusal by policy %s", err, policy)
	}
	return nil
}

// awaitPolicies waits until the API server's watches have brought it both policies.
func (w *world) awaitPolicies(t *testing.T) {
	t.Helper()
	namespace := w.namespace(t, true)
	target := create(t, namespace, w.pod())
	if err := poll(t.Context(), func() error {
		dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
		if _, err := client.CoreV1().Pods(namespace).Create(t.Context(), w.pod(w.annotated), dry); refusedBy("credence-injected", err) != nil {
			return refusedBy("credence-injected", err)
		}
		changed := target.DeepCopy()
		label(w.prefix+"/injected", "true")(changed)
		_, err := client.CoreV1().Pods(namespace).Update(t.Context(), changed, metav1.UpdateOptions{DryRun: []string{metav1.DryRunAll}})
		return refusedBy("credence-fixed-keys", err)
	}); err != nil {
		t.Fatal(err)
	}
}

// completeWith does the same, with another image.
func (w *world) completeWith(image string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		w.annotated(pod)
		annotate(w.prefix+"/service-account", "default")(pod)
		label(w.prefix+"/injected", "true")(pod)
		sidecar(image)(pod)
	}
}
