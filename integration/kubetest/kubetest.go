//go:build unix

// Package kubetest makes namespaces and pods for the tests of a cluster.
//
// A failed step fails the test. A namespace and all objects in it end with their test. The package neither starts the
// cluster nor installs Credence: packages cluster, stack and deployment do that.
package kubetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/credence-iam/credence/integration/await"
)

// Namespace creates a namespace that is named after the test, and deletes it when the test ends. It returns the
// namespace's name when pods can be created in it.
func Namespace(t *testing.T, client kubernetes.Interface, labels, annotations map[string]string) string {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(strings.TrimPrefix(t.Name(), "Test")))
	ns, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		GenerateName: name[:min(len(name), 50)] + "-", Labels: labels, Annotations: annotations,
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Nodes need the memory of its pods, and some tests wait for something in all namespaces.
		if err := client.CoreV1().Namespaces().Delete(context.WithoutCancel(t.Context()), ns.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	AwaitServiceAccount(t, client, ns.Name)
	return ns.Name
}

// AwaitServiceAccount waits for the ServiceAccount that the pods of a new namespace need.
func AwaitServiceAccount(t *testing.T, client kubernetes.Interface, namespace string) {
	t.Helper()
	await.Until(t, "namespace "+namespace+" has its ServiceAccount", func() error {
		_, err := client.CoreV1().ServiceAccounts(namespace).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
}

// Create creates a pod and returns it as stored.
func Create(t *testing.T, client kubernetes.Interface, namespace string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	stored, err := client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// Dry creates a pod in a dry run: admission treats it like any other, but it is not stored.
func Dry(t *testing.T, client kubernetes.Interface, namespace string, pod *corev1.Pod) (*corev1.Pod, error) {
	t.Helper()
	return client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
}

// AwaitDeleted waits until the API server has deleted the pod.
func AwaitDeleted(t *testing.T, client kubernetes.Interface, namespace, name string) {
	t.Helper()
	await.Until(t, "pod "+namespace+"/"+name+" is deleted", func() error {
		_, err := client.CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("it exists"))
	})
}

// AwaitReady waits until the pod is ready, and returns it.
func AwaitReady(t *testing.T, client kubernetes.Interface, namespace, name string) (pod *corev1.Pod) {
	t.Helper()
	await.Until(t, "pod "+namespace+"/"+name+" is ready", func() (err error) {
		if pod, err = client.CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			return err
		}
		return Ready(pod)
	})
	return pod
}

// AwaitEnd waits until the pod has succeeded, and returns it.
func AwaitEnd(t *testing.T, client kubernetes.Interface, namespace, name string) (pod *corev1.Pod) {
	t.Helper()
	await.Until(t, "pod "+namespace+"/"+name+" succeeds", func() (err error) {
		if pod, err = client.CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			return err
		}
		if pod.Status.Phase == corev1.PodFailed {
			return await.Never{Err: fmt.Errorf("it failed: %s\n%s", States(pod), Logs(t, client, namespace, name, pod.Spec.Containers[0].Name))}
		}
		if pod.Status.Phase != corev1.PodSucceeded {
			err = errors.New(States(pod))
		}
		return err
	})
	return pod
}

// Ready returns nil if the pod is ready. A failed pod never becomes ready.
func Ready(pod *corev1.Pod) error {
	if pod.Status.Phase == corev1.PodFailed {
		return await.Never{Err: fmt.Errorf("pod %s has failed: %s", pod.Name, States(pod))}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return fmt.Errorf("pod %s is not ready: %s", pod.Name, States(pod))
}

// States describes the pod's containers.
func States(pod *corev1.Pod) string {
	var text strings.Builder
	fmt.Fprintf(&text, "phase %s %s", pod.Status.Phase, pod.Status.Message)
	for _, c := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		fmt.Fprintf(&text, "; %s:", c.Name)
		switch s := c.State; {
		case s.Running != nil:
			fmt.Fprintf(&text, " running")
		case s.Waiting != nil:
			fmt.Fprintf(&text, " waiting: %s %s", s.Waiting.Reason, s.Waiting.Message)
		case s.Terminated != nil:
			fmt.Fprintf(&text, " ended with %d %s %s", s.Terminated.ExitCode, s.Terminated.Reason, s.Terminated.Message)
		}
		fmt.Fprintf(&text, ", %d restarts", c.RestartCount)
	}
	return text.String()
}

// Status returns the status of a container.
func Status(t *testing.T, pod *corev1.Pod, container string) corev1.ContainerStatus {
	t.Helper()
	for _, s := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		if s.Name == container {
			return s
		}
	}
	t.Fatalf("pod %s has no status of container %s", pod.Name, container)
	return corev1.ContainerStatus{}
}

// Logs returns the output of a container. If it has none, or the kubelet does not return it, Logs returns "".
func Logs(t *testing.T, client kubernetes.Interface, namespace, name, container string) string {
	t.Helper()
	text, err := client.CoreV1().Pods(namespace).GetLogs(name, &corev1.PodLogOptions{Container: container}).DoRaw(t.Context())
	if err != nil {
		return ""
	}
	return string(text)
}

// Container returns a container of a pod, which may be an init container.
func Container(t *testing.T, pod *corev1.Pod, name string) corev1.Container {
	t.Helper()
	all := slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers)
	i := slices.IndexFunc(all, func(c corev1.Container) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("pod %s has no container %s", pod.Name, name)
	}
	return all[i]
}

// Variable returns the value of a container's environment variable.
func Variable(c corev1.Container, name string) string {
	for _, v := range c.Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}
