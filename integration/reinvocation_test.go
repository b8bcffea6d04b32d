//go:build unix

package integration

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync/atomic"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/integration/stack"
)

// Another webhook adds a container and an init container, called before ours or after it: configurations are called in
// the order of their names. Either way, all containers have the environment, there is one sidecar, and the other webhook's
// containers are as it made them.
func TestAnotherWebhook(t *testing.T) {
	t.Parallel()
	ca := certstest.NewCA(t)
	for _, tc := range []struct {
		name  string // of the configuration; ours is called credence
		order []string
	}{
		{"a-mesh", []string{stack.SidecarName, "mesh-init", "own-init"}},
		{"z-mesh", []string{"mesh-init", stack.SidecarName, "own-init"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var calls, sawSidecar atomic.Int64
			mesh := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				var review admissionv1.AdmissionReview
				var pod corev1.Pod
				err := json.NewDecoder(r.Body).Decode(&review)
				if err == nil {
					err = json.Unmarshal(review.Request.Object.Raw, &pod)
				}
				if err != nil {
					http.Error(w, err.Error(), http.StatusBadRequest)
					return
				}
				calls.Add(1)
				if slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == stack.SidecarName }) {
					sawSidecar.Add(1)
				}
				review.Response = &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: true}
				if !slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == "mesh" }) {
					review.Response.PatchType = new(admissionv1.PatchTypeJSONPatch)
					review.Response.Patch = []byte(`[{"op":"add","path":"/spec/containers/0","value":{"name":"mesh","image":"mesh:1","env":[{"name":"A","value":"b"}]}},` +
						`{"op":"add","path":"/spec/initContainers/0","value":{"name":"mesh-init","image":"mesh:1"}}]`)
				}
				review.Request = nil
				_ = json.NewEncoder(w).Encode(review)
			}))
			mesh.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Leaf("127.0.0.1").TLS()}, MinVersion: tls.VersionTLS13}
			mesh.StartTLS()
			t.Cleanup(mesh.Close)
			ns := scratch(t, ".*")
			url, again, none := mesh.URL, admissionregistrationv1.IfNeededReinvocationPolicy, admissionregistrationv1.SideEffectClassNone
			if _, err := credence.Client.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(t.Context(), &admissionregistrationv1.MutatingWebhookConfiguration{
				ObjectMeta: metav1.ObjectMeta{Name: tc.name},
				Webhooks: []admissionregistrationv1.MutatingWebhook{{
					Name: "mesh.example.com", AdmissionReviewVersions: []string{"v1"}, SideEffects: &none, ReinvocationPolicy: &again,
					ClientConfig:      admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: ca.PEM},
					NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: ns}},
					Rules: []admissionregistrationv1.RuleWithOperations{{
						Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
						Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
					}},
				}},
			}, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			pod := stack.Pod("app", map[string]string{roleKey: "cart"})
			pod.Spec.InitContainers = []corev1.Container{{Name: "own-init", Image: "init:1"}}
			await(t, func() error { // the API server's watch of webhooks
				if _, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
					return err
				}
				if calls.Load() == 0 {
					return errors.New("the other webhook is not called")
				}
				return nil
			})
			calls.Store(0)
			sawSidecar.Store(0)
			stored, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := injected(stored); err != nil {
				t.Error(err)
			}
			var order []string
			for _, c := range stored.Spec.InitContainers {
				order = append(order, c.Name)
			}
			if !slices.Equal(order, tc.order) {
				t.Errorf("init containers are %q, want %q", order, tc.order)
			}
			mesh1 := stored.Spec.Containers[0]
			if mesh1.Name != "mesh" || mesh1.Env[0].Name != "A" || mesh1.Env[0].Value != "b" {
				t.Errorf("the other webhook's container is %+v", mesh1)
			}
			// Else the order would not have been tried.
			if first := calls.Load() > sawSidecar.Load(); first != (tc.name == "a-mesh") {
				t.Errorf("it was called %d times, %d of them with our sidecar there", calls.Load(), sawSidecar.Load())
			}
		})
	}
}
