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

	"github.com/credence-iam/credence/integration/deployment"
)

// A node that joins runs injected pods like any other: its pods reach brokers on other nodes, and are told its zone.
func TestPodsOfAnotherNodeReachTheBroker(t *testing.T) {
	t.Parallel()
	// Tainted, so that no pod of another test comes here and goes with the node.
	taint := corev1.Taint{Key: "example.com/far", Effect: corev1.TaintEffectNoSchedule}
	node, err := world.AddNode(t.Context(), taint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		node.Stop()
		// t.Context has ended here.
		if err := d.Client.CoreV1().Nodes().Delete(context.Background(), node.Name(), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	const zone = deployment.Region + "b"
	label := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, corev1.LabelTopologyZone, zone)
	if _, err := d.Client.CoreV1().Nodes().Patch(t.Context(), node.Name(), types.MergePatchType, label, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	ns := namespace(t)
	far := func(pod *corev1.Pod) *corev1.Pod {
		pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node.Name()}
		pod.Spec.Tolerations = []corev1.Toleration{{Key: taint.Key, Operator: corev1.TolerationOpExists}}
		return pod
	}
	create(t, ns, far(once(app("far", annotated(), "ls", bucket))))
	zoned := far(once(app("zoned", annotated(), "zone")))
	zoned.Spec.Containers[0].Image = plainImage
	create(t, ns, zoned)
	ended := awaitEnd(t, ns, "far")
	awaitEnd(t, ns, "zoned")
	if said := strings.TrimSpace(logs(t, ns, "zoned", "app")); said != zone {
		t.Errorf("instance metadata tells zone %q, want %q", said, zone)
	}
	if ended.Spec.NodeName != node.Name() {
		t.Errorf("it ran on %s", ended.Spec.NodeName)
	}
	if said := logs(t, ns, "far", "app"); !strings.Contains(said, "only-for-"+bucket) {
		t.Errorf("the application listed %q", said)
	}
	brokers, err := d.Client.CoreV1().Pods("credence").List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=broker"})
	if err != nil || len(brokers.Items) == 0 {
		t.Fatalf("brokers: %v, %v", brokers, err)
	}
	for _, broker := range brokers.Items {
		if broker.Spec.NodeName == node.Name() {
			t.Errorf("broker %s is on the same node", broker.Name)
		}
	}
}

// A namespace that was opted in a moment ago has the broker's roots when its first pod needs them.
func TestNamespaceLabelledASecondBefore(t *testing.T) {
	t.Parallel()
	ns := namespace(t, func(ns *corev1.Namespace) { delete(ns.Labels, injectLabel) })
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:"enabled"}}}`, injectLabel)
	if _, err := d.Client.CoreV1().Namespaces().Patch(t.Context(), ns, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	// The API server selects by the label from its next look at its own watch on. Until then it calls no webhook,
	// and no policy of the namespace holds.
	eventually(t, "the pod is injected", func(ctx context.Context) error {
		pod, err := d.Client.CoreV1().Pods(ns).Create(ctx, once(app("first", annotated(), "whoami")), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil && len(pod.Spec.InitContainers) == 0 {
			err = errors.New("it has no sidecar")
		}
		return err
	})
	create(t, ns, once(app("first", annotated(), "whoami")))
	awaitEnd(t, ns, "first")
}

// The roots that sidecars need are repaired when somebody edits or deletes them.
func TestTrustIsRepaired(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	maps := d.Client.CoreV1().ConfigMaps(ns)
	const name, key = "credence-trust", "roots.pem"
	var good string
	eventually(t, "the roots are published", func(ctx context.Context) error {
		m, err := maps.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if good = m.Data[key]; good == "" {
			return errors.New("there are none in it")
		}
		return nil
	})
	repaired := func(what string) {
		t.Helper()
		eventually(t, "the roots are repaired after "+what, func(ctx context.Context) error {
			m, err := maps.Get(ctx, name, metav1.GetOptions{})
			if err == nil && m.Data[key] != good {
				err = fmt.Errorf("they are %q", m.Data[key])
			}
			return err
		})
	}
	m, err := maps.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.Data[key] = "somebody else's"
	if _, err := maps.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	repaired("an edit")
	if err := maps.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	repaired("a deletion")
	create(t, ns, once(app("after", annotated(), "whoami")))
	awaitEnd(t, ns, "after")
}
