//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// TestPodsOfAnotherNodeReachTheBroker runs injected pods on a new node: they reach the brokers on other nodes, and get the
// node's zone.
func TestPodsOfAnotherNodeReachTheBroker(t *testing.T) {
	t.Parallel()
	// The taint keeps pods of other tests away, because the node is removed.
	taint := corev1.Taint{Key: "example.com/far", Effect: corev1.TaintEffectNoSchedule}
	node, err := d.Cluster.AddNode(t.Context(), taint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		node.Stop()
		if err := d.Client.CoreV1().Nodes().Delete(context.WithoutCancel(t.Context()), node.Name(), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	const zone = stack.Region + "b"
	label := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, corev1.LabelTopologyZone, zone)
	if _, err := d.Client.CoreV1().Nodes().Patch(t.Context(), node.Name(), types.MergePatchType, label, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	ns := d.Namespace(t)
	far := func(pod *corev1.Pod) *corev1.Pod {
		pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node.Name()}
		pod.Spec.Tolerations = []corev1.Toleration{{Key: taint.Key, Operator: corev1.TolerationOpExists}}
		return pod
	}
	kubetest.Create(t, d.Client, ns, far(deployment.Once(d.App("far", annotated(), "whoami"))))
	zoned := far(deployment.Once(d.App("zoned", annotated(), "zone")))
	zoned.Spec.Containers[0].Image = plainImage
	kubetest.Create(t, d.Client, ns, zoned)
	ended := kubetest.AwaitEnd(t, d.Client, ns, "far")
	kubetest.AwaitEnd(t, d.Client, ns, "zoned")
	if output := strings.TrimSpace(kubetest.Logs(t, d.Client, ns, "zoned", "app")); output != zone {
		t.Errorf("instance metadata has zone %q, want %q", output, zone)
	}
	if ended.Spec.NodeName != node.Name() {
		t.Errorf("the pod ran on %s", ended.Spec.NodeName)
	}
	if output := kubetest.Logs(t, d.Client, ns, "far", "app"); !strings.Contains(output, ":assumed-role/"+bucket+"/") {
		t.Errorf("the application is %q", output)
	}
	brokers, err := d.Pods(t.Context(), "broker")
	if err != nil || len(brokers) == 0 {
		t.Fatalf("brokers: %v, %v", brokers, err)
	}
	for _, broker := range brokers {
		if broker.Spec.NodeName == node.Name() {
			t.Errorf("broker %s is on the same node", broker.Name)
		}
	}
}

// TestNamespaceLabelledASecondBefore shows that a namespace has the broker's roots when its first pod needs them, even if
// it was opted in a moment before.
func TestNamespaceLabelledASecondBefore(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t, func(labels, _ map[string]string) { delete(labels, injectLabel) })
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:"enabled"}}}`, injectLabel)
	if _, err := d.Client.CoreV1().Namespaces().Patch(t.Context(), ns, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	// Until the API server's own watch delivers the label, it calls no webhook and applies no policy.
	await.Until(t, "the pod is injected", func() error {
		pod, err := kubetest.Dry(t, d.Client, ns, deployment.Once(d.App("first", annotated(), "whoami")))
		if err == nil && len(pod.Spec.InitContainers) == 0 {
			err = errors.New("it has no sidecar")
		}
		return err
	})
	kubetest.Create(t, d.Client, ns, deployment.Once(d.App("first", annotated(), "whoami")))
	kubetest.AwaitEnd(t, d.Client, ns, "first")
}
