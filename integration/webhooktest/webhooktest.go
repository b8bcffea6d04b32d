//go:build unix

// Package webhooktest adds another mutating webhook to a cluster, to test ours beside it.
//
// It patches as its test says and checks nothing. It serves on the loopback address, so the API server must run on the
// same machine.
package webhooktest

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/credence-iam/credence/certs/certstest"
)

// Config configures [Start].
type Config struct {
	// Name is the name of the webhook's configuration. The API server calls webhooks in the order of these names.
	Name string
	// Namespace is the namespace whose pods the webhook mutates.
	Namespace string
	// Operations are the calls that the webhook gets, for pods and their status.
	Operations []admissionregistrationv1.OperationType
	// Reinvocation says whether the API server calls the webhook again if a later webhook changes the pod.
	Reinvocation admissionregistrationv1.ReinvocationPolicyType
	// Patch returns the JSON Patch for a pod, or "" to leave it unchanged. Several goroutines may call it.
	Patch func(pod *corev1.Pod) string
}

// Start adds the webhook until the test ends. The API server calls it once its watch has delivered the configuration.
func Start(t *testing.T, client kubernetes.Interface, cfg Config) {
	t.Helper()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
		review.Response = &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: true}
		if patch := cfg.Patch(&pod); patch != "" {
			review.Response.PatchType, review.Response.Patch = new(admissionv1.PatchTypeJSONPatch), []byte(patch)
		}
		review.Request = nil
		_ = json.NewEncoder(w).Encode(review)
	}))
	ca := certstest.NewCA(t)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Leaf("127.0.0.1").TLS()}, MinVersion: tls.VersionTLS13}
	server.StartTLS()
	t.Cleanup(server.Close)
	configurations := client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	if _, err := configurations.Create(t.Context(), &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: cfg.Name},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{
			Name: "other.example.com", AdmissionReviewVersions: []string{"v1"},
			SideEffects: new(admissionregistrationv1.SideEffectClassNone), ReinvocationPolicy: &cfg.Reinvocation,
			ClientConfig:      admissionregistrationv1.WebhookClientConfig{URL: &server.URL, CABundle: ca.PEM},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: cfg.Namespace}},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: cfg.Operations,
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods", "pods/status"}},
			}},
		}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := configurations.Delete(context.WithoutCancel(t.Context()), cfg.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}
