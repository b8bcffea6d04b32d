//go:build unix

// Package kubetest makes namespaces and pods for the tests of a cluster.
//
// A failed step fails the test. A namespace and all objects in it end with their test. The package neither starts the
// cluster nor installs Credence: packages cluster, stack and deployment do that.
package kubetest

import (
	"context"
	"errors"
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
	await.Until(t, "the namespace has its ServiceAccount", func() error {
		_, err := client.CoreV1().ServiceAccounts(ns.Name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return ns.Name
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

// Variable returns the value of a container's environment variable.
func Variable(c corev1.Container, name string) string {
	for _, v := range c.Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}
