//go:build linux

package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// The keys that users write, and messages of the sidecar's log.
const (
	injectLabel     = "iam.amazonaws.com/inject"
	permittedKey    = "iam.amazonaws.com/permitted"
	roleKey         = "iam.amazonaws.com/role"
	durationKey     = "iam.amazonaws.com/duration"
	startTimeoutKey = "iam.amazonaws.com/start-timeout"

	messageReceived    = "Received credentials"
	messageUnavailable = "Could not get credentials"
	messageNotInjected = "start without credentials"
)

// unrestricted lets all pods into a namespace.
func unrestricted(labels, _ map[string]string) { delete(labels, "pod-security.kubernetes.io/enforce") }

// paused returns a pod whose application does nothing.
func paused(name string, annotations map[string]string) *corev1.Pod {
	pod := d.App(name, annotations)
	pod.Spec.Containers[0].Image = pauseImage
	return pod
}

// command builds the credence command and returns its path.
func command(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "credence")
	if err := images.CompileFor(t.Context(), "github.com/credence-iam/credence/cmd/credence", runtime.GOOS, runtime.GOARCH, program); err != nil {
		t.Fatal(err)
	}
	return program
}

// annotated returns the annotation of the role that may use the bucket.
func annotated() map[string]string { return map[string]string{roleKey: bucket} }

func get(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return d.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

// assumed is the start of the ARN that STS gives a session of the role.
func assumed(role string) string {
	return "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/"
}

// caller adds a container to the pod that calls the broker as the pod's sidecar does, many times a second.
func caller(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	key, err := policy.Pod{Request: keys.Request(pod.Annotations)}.RoutingKey()
	if err != nil {
		t.Fatal(err)
	}
	return d.AddCaller(pod, "caller", callerImage, string(key))
}

// calm checks that no call of the callers of these pods and no container has failed, and that the callers still call.
func calm(t *testing.T, namespace string, pods ...string) {
	t.Helper()
	d.CheckCallers(t, namespace, []string{"caller"}, pods...)
}

// scale sets the number of replicas of a component, and waits until that many pods are ready and no others exist.
func scale(t *testing.T, component string, replicas int) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // cleanups call it too
	patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas)
	if _, err := d.Client.AppsV1().Deployments(deployment.Namespace).Patch(ctx, "credence-"+component, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := await.Poll(ctx, func() error {
		pods, err := d.Pods(ctx, component)
		good := 0
		for _, pod := range pods {
			if pod.DeletionTimestamp == nil && kubetest.Ready(&pod) == nil {
				good++
			}
		}
		if err == nil && (good != replicas || len(pods) != good) {
			err = fmt.Errorf("%d of %d pods are ready", good, len(pods))
		}
		return err
	}); err != nil {
		t.Fatalf("scaling the %s to %d: %v", component, replicas, err)
	}
}

// stop removes all replicas of a component until the returned function is called or the test ends.
func stop(t *testing.T, component string) (start func()) {
	t.Helper()
	const usual = 2
	start = func() { t.Helper(); scale(t, component, usual) }
	t.Cleanup(start)
	scale(t, component, 0)
	return start
}

// keys returns the number of access keys that awsclient's watch has seen.
func keys(t *testing.T, namespace, name string) int {
	t.Helper()
	return len(strings.Fields(kubetest.Logs(t, d.Client, namespace, name, "app")))
}
