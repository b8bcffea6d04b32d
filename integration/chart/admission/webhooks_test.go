//go:build unix

package admission

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/certs/certstest"
)

// laterWebhooks: what another mutating webhook makes of an injected pod is judged as it leaves admission. Its patch is
// what the pod is annotated with.
func (w *world) laterWebhooks(t *testing.T) {
	const instruction = "test.example.com/patch"
	other := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var review admissionv1.AdmissionReview
		var pod corev1.Pod
		err := json.NewDecoder(r.Body).Decode(&review)
		if err == nil {
			err = json.Unmarshal(review.Request.Object.Raw, &pod)
		}
		if err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		review.Response = &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: true}
		if patch := pod.Annotations[instruction]; patch != "" {
			review.Response.PatchType, review.Response.Patch = new(admissionv1.PatchTypeJSONPatch), []byte(patch)
		}
		review.Request = nil
		_ = json.NewEncoder(rw).Encode(review)
	}))
	ca := certstest.NewCA(t)
	other.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Leaf("127.0.0.1").TLS()}, MinVersion: tls.VersionTLS13}
	other.StartTLS()
	t.Cleanup(other.Close)

	namespace := w.namespace(t, true)
	url, never, none := other.URL, admissionregistrationv1.NeverReinvocationPolicy, admissionregistrationv1.SideEffectClassNone
	configuration := &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "z-other"},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{
			Name: "other.example.com", AdmissionReviewVersions: []string{"v1"}, SideEffects: &none, ReinvocationPolicy: &never,
			ClientConfig:      admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: ca.PEM},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: namespace}},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create, admissionregistrationv1.Update},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods", "pods/status"}},
			}},
		}},
	}
	all := client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	if _, err := all.Create(t.Context(), configuration, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := all.Delete(context.WithoutCancel(t.Context()), configuration.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	make := func(patch string) error {
		_, err := client.CoreV1().Pods(namespace).Create(t.Context(), w.pod(w.complete, annotate(instruction, patch)), metav1.CreateOptions{})
		return err
	}
	role, injected := pointer(w.prefix+"/role"), pointer(w.prefix+"/injected")
	// As soon as the API server's watch has brought the webhook.
	if err := poll(t.Context(), func() error {
		return refusedBy("credence-injected", make(`[{"op":"remove","path":"/spec/initContainers/0"}]`))
	}); err != nil {
		t.Fatalf("the sidecar removed: %v", err)
	}
	for name, patch := range map[string]string{
		"the label removed":     fmt.Sprintf(`[{"op":"remove","path":"/metadata/labels/%s"}]`, injected),
		"the label changed":     fmt.Sprintf(`[{"op":"replace","path":"/metadata/labels/%s","value":"false"}]`, injected),
		"another image":         `[{"op":"replace","path":"/spec/initContainers/0/image","value":"pause:3"}]`,
		"another command":       `[{"op":"replace","path":"/spec/initContainers/0/command","value":["/bin/true"]}]`,
		"arguments":             `[{"op":"add","path":"/spec/initContainers/0/args","value":["probe"]}]`,
		"another name":          `[{"op":"replace","path":"/spec/initContainers/0/name","value":"other"}]`,
		"no sidecar any longer": `[{"op":"remove","path":"/spec/initContainers/0/restartPolicy"}]`,
		"all replaced":          `[{"op":"replace","path":"/spec/initContainers","value":[{"name":"i","image":"i:1"}]}]`,
	} {
		if err := refusedBy("credence-injected", make(patch)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, patch := range map[string]string{
		"an image of a mirror":  `[{"op":"replace","path":"/spec/initContainers/0/image","value":"mirror.example/x/credence-sidecar:0.1.0"}]`,
		"its container before":  `[{"op":"add","path":"/spec/initContainers/0","value":{"name":"i","image":"i:1"}}]`,
		"resources and a mount": `[{"op":"add","path":"/spec/initContainers/0/resources","value":{"limits":{"cpu":"1"}}}]`,
	} {
		if err := make(patch); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A webhook may mutate updates, too.
	pod := create(t, namespace, w.pod(w.complete))
	change := fmt.Sprintf(`[{"op":"replace","path":"/metadata/annotations/%s","value":"admin"}]`, role)
	if err := refusedBy("credence-fixed-keys", patch(client, map[string]any{"annotations": map[string]any{instruction: change}})(t.Context(), pod)); err != nil {
		t.Errorf("the role changed at an update: %v", err)
	}
	w.unchanged(t, pod)
}
