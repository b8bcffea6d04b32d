//go:build unix

package admission

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
)

// recreated shows that a pod with the name of a deleted one is checked like any other, and that a terminating pod keeps
// its keys.
func (w *world) recreated(t *testing.T) {
	namespace := w.namespace(t, true)
	pods := client.CoreV1().Pods(namespace)
	pod := create(t, namespace, w.pod(w.complete, onNode, func(pod *corev1.Pod) { pod.Finalizers = []string{"example.com/hold"} }))
	if err := pods.Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
		t.Fatal(err)
	}
	terminating, err := pods.Get(t.Context(), pod.Name, metav1.GetOptions{})
	if err != nil || terminating.DeletionTimestamp == nil {
		t.Fatalf("the pod does not terminate (%v)", err)
	}
	for name, change := range map[string]attempt{
		"an update":                 update(annotate(w.prefix+"/role", "admin")),
		"a patch":                   patch(client, map[string]any{"annotations": map[string]any{w.prefix + "/role": "admin"}}),
		"a patch by its node":       patch(node, map[string]any{"annotations": map[string]any{w.prefix + "/role": "admin"}}, "status"),
		"together with its release": patch(client, map[string]any{"finalizers": nil, "annotations": map[string]any{w.prefix + "/role": "admin"}}),
	} {
		if err := refusedBy("credence-fixed-keys", change(t.Context(), terminating)); err != nil {
			t.Errorf("%s of a terminating pod: %v", name, err)
		}
	}
	w.unchanged(t, terminating)
	if err := patch(client, map[string]any{"finalizers": nil})(t.Context(), terminating); err != nil {
		t.Fatal(err)
	}
	kubetest.AwaitDeleted(t, client, namespace, pod.Name)
	named := func(p *corev1.Pod) { p.Name = pod.Name }
	for name, again := range map[string]*corev1.Pod{
		"as a user writes it": w.pod(w.annotated, named),
		"as the API server stored the first one, without its sidecar": func() *corev1.Pod {
			stale := pod.DeepCopy()
			stale.ResourceVersion, stale.Spec.InitContainers = "", nil
			return stale
		}(),
	} {
		if err := refusedBy("credence-injected", try(t, namespace, again)); err != nil {
			t.Errorf("recreated %s: %v", name, err)
		}
	}
	create(t, namespace, w.pod(w.complete, named))
}

// relabelled shows that pods created before their namespace was opted in cannot become injected pods, and that the
// policy for new pods follows each change of the label. A label with a similar value opts nothing in.
func (w *world) relabelled(t *testing.T) {
	namespace := w.namespace(t, false)
	early := create(t, namespace, w.pod(w.annotated, onNode))
	for _, value := range []string{`"enabled"`, `"disabled"`, `"enabled"`, `"Enabled"`} {
		w.setOptIn(t, namespace, value)
		await.Until(t, "the policy follows the label "+value, func() error { // the API server watches namespaces
			err := tryDry(t, namespace, w.pod(w.annotated))
			if value == `"enabled"` {
				return refusedBy("credence-injected", err)
			}
			return err
		})
		isInjected := patch(client, map[string]any{"labels": map[string]any{w.prefix + "/injected": "true"}})
		if err := refusedBy("credence-fixed-keys", isInjected(t.Context(), early)); err != nil {
			t.Errorf("an early pod gets the broker's label, with its namespace labelled %s: %v", value, err)
		}
		w.unchanged(t, early)
	}
}

// ephemeralContainers shows that a pod neither gets nor loses a sidecar through ephemeral containers.
func (w *world) ephemeralContainers(t *testing.T) {
	pod := create(t, w.namespace(t, true), w.pod(w.complete))
	for _, spec := range []string{
		`{"ephemeralContainers":[{"name":"credence-sidecar","image":"pause:3"}]}`,
		`{"initContainers":[{"name":"credence-sidecar","image":"pause:3"}]}`,
	} {
		err := strategic(client, `{"spec":`+spec+`}`, "ephemeralcontainers")(t.Context(), pod)
		stored, getErr := client.CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})
		if getErr != nil || len(stored.Spec.EphemeralContainers) > 0 || stored.Spec.InitContainers[0].Image != sidecarImage {
			t.Errorf("%s: the pod has %+v (%v, %v)", spec, stored.Spec, err, getErr)
		}
	}
}
