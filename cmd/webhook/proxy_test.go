package main

import (
	"os"
	"strings"
	"testing"

	"github.com/credence-iam/credence/certs/certstest"
)

// TestWebhookUsesNoProxy: the webhook calls the API server without the proxies of its environment.
func TestWebhookUsesNoProxy(t *testing.T) {
	names := []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"}
	for _, name := range names {
		t.Setenv(name, "http://proxy.example.com:3128")
	}
	cert, key := certstest.NewCA(t).Leaf("credence-webhook.credence.svc").WriteTo(t.TempDir())
	o, err := parse([]string{"--broker=b:1", "--sidecar-image=i", "--tls-cert=" + cert, "--tls-key=" + key, "--kubeconfig=/nonexistent"})
	if err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "--kubeconfig") {
		t.Fatalf("run without a cluster: %v, want an error with --kubeconfig", err)
	}
	for _, name := range names {
		if value, set := os.LookupEnv(name); set {
			t.Errorf("%s is still %q", name, value)
		}
	}
}
