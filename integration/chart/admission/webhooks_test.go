//go:build unix

package admission

import (
	"fmt"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/webhooktest"
)

// laterWebhooks shows that the policies check an injected pod after another mutating webhook has changed it. injected has
// the table of all such pods. The other webhook applies the patch in the pod's annotation.
func (w *world) laterWebhooks(t *testing.T) {
	const instruction = "test.example.com/patch"
	namespace := w.namespace(t, true)
	webhooktest.Start(t, client, webhooktest.Config{
		Name: "z-other", Namespace: namespace, Reinvocation: admissionregistrationv1.NeverReinvocationPolicy,
		Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create, admissionregistrationv1.Update},
		Patch:      func(pod *corev1.Pod) string { return pod.Annotations[instruction] },
	})
	patched := func(patch string) error {
		return try(t, namespace, w.pod(w.complete, annotate(instruction, patch)))
	}
	role, injected := pointer(w.prefix+"/role"), pointer(w.prefix+"/injected")
	await.Until(t, "a pod without its sidecar is refused", func() error { // the API server's watch delivers the webhook
		return refusedBy("credence-injected", patched(`[{"op":"remove","path":"/spec/initContainers/0"}]`))
	})
	if err := refusedBy("credence-injected", patched(fmt.Sprintf(`[{"op":"remove","path":"/metadata/labels/%s"}]`, injected))); err != nil {
		t.Errorf("the label removed: %v", err)
	}
	for name, patch := range map[string]string{
		"an image of a mirror":  `[{"op":"replace","path":"/spec/initContainers/0/image","value":"mirror.example/x/credence-sidecar:0.1.0"}]`,
		"a container before it": `[{"op":"add","path":"/spec/initContainers/0","value":{"name":"i","image":"i:1"}}]`,
	} {
		if err := patched(patch); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	pod := create(t, namespace, w.pod(w.complete))
	change := fmt.Sprintf(`[{"op":"replace","path":"/metadata/annotations/%s","value":"admin"}]`, role)
	if err := refusedBy("credence-fixed-keys", patch(client, map[string]any{"annotations": map[string]any{instruction: change}})(t.Context(), pod)); err != nil {
		t.Errorf("another role at an update: %v", err)
	}
	w.unchanged(t, pod)
}
