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

// laterWebhooks shows that the policies check an injected pod after another mutating webhook has changed it. That webhook
// applies the patch in the pod's annotation.
func (w *world) laterWebhooks(t *testing.T) {
	const instruction = "test.example.com/patch"
	namespace := w.namespace(t, true)
	webhooktest.Start(t, client, webhooktest.Config{
		Name: "z-other", Namespace: namespace, Reinvocation: admissionregistrationv1.NeverReinvocationPolicy,
		Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create, admissionregistrationv1.Update},
		Patch:      func(pod *corev1.Pod) string { return pod.Annotations[instruction] },
	})
	patched := func(patch string) error {
		_, err := try(t, namespace, w.pod(w.complete, annotate(instruction, patch)))
		return err
	}
	role, injected := pointer(w.prefix+"/role"), pointer(w.prefix+"/injected")
	await.Until(t, "a pod without its sidecar is refused", func() error { // the API server's watch delivers the webhook
		return refusedBy("credence-injected", patched(`[{"op":"remove","path":"/spec/initContainers/0"}]`))
	})
	for name, patch := range map[string]string{
		"the label removed": fmt.Sprintf(`[{"op":"remove","path":"/metadata/labels/%s"}]`, injected),
		"the label changed": fmt.Sprintf(`[{"op":"replace","path":"/metadata/labels/%s","value":"false"}]`, injected),
		"another image":     `[{"op":"replace","path":"/spec/initContainers/0/image","value":"pause:3"}]`,
		"another command":   `[{"op":"replace","path":"/spec/initContainers/0/command","value":["/bin/true"]}]`,
		"arguments":         `[{"op":"add","path":"/spec/initContainers/0/args","value":["probe"]}]`,
		"another name":      `[{"op":"replace","path":"/spec/initContainers/0/name","value":"other"}]`,
		"no restart policy": `[{"op":"remove","path":"/spec/initContainers/0/restartPolicy"}]`,
		"other containers":  `[{"op":"replace","path":"/spec/initContainers","value":[{"name":"i","image":"i:1"}]}]`,
	} {
		if err := refusedBy("credence-injected", patched(patch)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, patch := range map[string]string{
		"an image of a mirror":  `[{"op":"replace","path":"/spec/initContainers/0/image","value":"mirror.example/x/credence-sidecar:0.1.0"}]`,
		"a container before it": `[{"op":"add","path":"/spec/initContainers/0","value":{"name":"i","image":"i:1"}}]`,
		"resources":             `[{"op":"add","path":"/spec/initContainers/0/resources","value":{"limits":{"cpu":"1"}}}]`,
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
