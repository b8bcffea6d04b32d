//go:build linux

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// A pod cannot be given another role after admission has judged it: not by another key, not in a namespace that
// was opted out for the moment, and not by a node. A real kubelet goes on updating it.
func TestRoleIsFixedAtAdmission(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	create(t, ns, app("app", annotated(), "watch", "1h"))
	pod := awaitReady(t, ns, "app") // which the kubelet's own updates of its status have told
	pods := d.Client.CoreV1().Pods(ns)
	refused := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "cannot be changed on an existing pod") {
			t.Errorf("%s: answered %v", what, err)
		}
	}
	annotate := func(key, value string) []byte {
		return fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, key, value)
	}
	_, err := pods.Patch(t.Context(), "app", types.MergePatchType, annotate(roleKey, "admin"), metav1.PatchOptions{})
	refused("another role", err)
	_, err = pods.Patch(t.Context(), "app", types.MergePatchType, annotate("iam.amazonaws.com/external-id", "x"), metav1.PatchOptions{})
	refused("another key", err)
	_, err = pods.Patch(t.Context(), "app", types.MergePatchType, annotate(roleKey, "admin"), metav1.PatchOptions{}, "status")
	refused("through the status", err)

	config, err := world.User("system:node:"+pod.Spec.NodeName, "system:nodes")
	if err != nil {
		t.Fatal(err)
	}
	node, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = node.CoreV1().Pods(ns).Patch(t.Context(), "app", types.StrategicMergePatchType, annotate(roleKey, "admin"), metav1.PatchOptions{}, "status")
	refused("a node's identity", err)
	if _, err := node.CoreV1().Pods(ns).Patch(t.Context(), "app", types.StrategicMergePatchType,
		[]byte(`{"status":{"message":"said by its node"}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Errorf("a node's update of the status alone: %v", err)
	}

	label := func(value string) {
		t.Helper()
		patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%s}}}`, injectLabel, value)
		if _, err := d.Client.CoreV1().Namespaces().Patch(t.Context(), ns, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	label("null")
	_, err = pods.Patch(t.Context(), "app", types.MergePatchType, annotate(roleKey, "admin"), metav1.PatchOptions{})
	refused("the namespace opted out first", err)
	label(`"enabled"`)

	if _, err := pods.Patch(t.Context(), "app", types.MergePatchType, annotate("example.com/note", "x"), metav1.PatchOptions{}); err != nil {
		t.Errorf("an annotation of somebody else: %v", err)
	}
	if after, err := get(t.Context(), ns, "app"); err != nil || after.Annotations[roleKey] != bucket {
		t.Errorf("in the end the pod has role %q (%v)", after.Annotations[roleKey], err)
	}
}

// What users see of a refusal: kubectl prints it, and a controller's pods tell it in an Event.
func TestRefusalIsSeen(t *testing.T) {
	t.Parallel()
	ns := namespace(t, func(ns *corev1.Namespace) {
		ns.Annotations[permittedKey] = "arn:aws:iam::123456789012:role/" + bucket
	})
	manifest := fmt.Sprintf(`apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: greedy, namespace: %s}
spec:
  selector: {matchLabels: {app: greedy}}
  template:
    metadata: {labels: {app: greedy}, annotations: {%s: admin}}
    spec: {containers: [{name: app, image: app}]}
`, ns, roleKey)
	if _, err := d.Run(t.Context(), manifest, d.Kubectl, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "kubectl describe tells it", func(ctx context.Context) error {
		out, err := d.Run(ctx, "", d.Kubectl, "describe", "replicaset", "greedy", "-n", ns)
		if err == nil && !strings.Contains(out, "does not permit role") {
			err = fmt.Errorf("it tells:\n%s", out)
		}
		return err
	})
}
