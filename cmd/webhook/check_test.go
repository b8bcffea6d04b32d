package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
)

// TestCheck runs the command against an API server that gives each of these responses in turn, and the last one again. A
// test of package integration runs it against a real API server and a real webhook.
func TestCheck(t *testing.T) {
	failing := func(cause string) string {
		return `Internal error occurred: failed calling webhook "check.credence-iam.github.io": failed to call webhook: Post "https://credence-webhook.credence.svc:443/mutate?timeout=5s": ` + cause
	}
	const (
		injected    = "injected"
		plain       = "plain"
		notNative   = "not native"
		notCalled   = "the API server does not call the webhook"
		unknownRoot = "tls: failed to verify certificate: x509: certificate signed by unknown authority"
	)
	for name, tt := range map[string]struct {
		responses []string // injected, plain, not native, or the message of a failure
		args      []string
		want      []string // on standard output
		fails     string   // on standard error
	}{
		"at once":             {[]string{injected}, nil, []string{"the webhook injects pods"}, ""},
		"after a while":       {[]string{failing(unknownRoot), plain, injected}, nil, []string{"cainjector", notCalled, "the webhook injects pods"}, ""},
		"no root":             {[]string{failing(unknownRoot)}, []string{"--timeout=5s"}, nil, "after 5s: " + failing(unknownRoot) + "; the API server lacks the webhook's current root: check that cert-manager's cainjector runs and has set caBundle of MutatingWebhookConfiguration credence-check,"},
		"not called":          {[]string{plain}, []string{"--timeout=5s"}, nil, notCalled},
		"refused":             {[]string{failing("dial tcp 10.96.0.1:443: connect: connection refused")}, []string{"--timeout=5s"}, nil, "check the pods of Deployment credence-webhook"},
		"unreachable":         {[]string{failing("context deadline exceeded")}, []string{"--timeout=5s"}, nil, "webhook.hostNetwork"},
		"handshake":           {[]string{failing("net/http: TLS handshake timeout")}, []string{"--timeout=5s"}, nil, "webhook.hostNetwork"},
		"unknown cause":       {[]string{failing("EOF")}, []string{"--timeout=5s"}, nil, "after 5s: " + failing("EOF")},
		"another certificate": {[]string{failing("x509: certificate has expired or is not yet valid")}, []string{"--timeout=5s"}, nil, "clocks"},
		"no right":            {[]string{`podtemplates is forbidden: User "x" cannot create resource "podtemplates"`}, []string{"--timeout=5s"}, nil, "grant the ServiceAccount"},
		"old API server":      {[]string{notNative}, []string{"--timeout=5s"}, nil, "does not support native sidecars"},
		"other error":         {[]string{"etcd is slow"}, []string{"--timeout=5s"}, nil, "etcd is slow"},
		"another prefix":      {[]string{injected}, []string{"--annotation-prefix=aws.example.com"}, []string{"the webhook injects pods"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int64
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				var template corev1.PodTemplate
				err := json.NewDecoder(r.Body).Decode(&template)
				if err != nil || r.Method != http.MethodPost || r.URL.Path != "/api/v1/namespaces/credence/podtemplates" || r.URL.Query().Get("dryRun") != "All" {
					t.Errorf("the request is %s %s, %v", r.Method, r.URL, err)
				}
				role := policy.DefaultPrefix + "/role"
				if name == "another prefix" {
					role = "aws.example.com/role"
				}
				if template.Template.Annotations[role] == "" || template.Labels["app.kubernetes.io/component"] != "check" {
					t.Errorf("the PodTemplate has labels %v, and its pods annotations %v", template.Labels, template.Template.Annotations)
				}
				response := tt.responses[min(int(requests.Add(1)), len(tt.responses))-1]
				sidecar := corev1.Container{Name: "credence-sidecar", RestartPolicy: new(corev1.ContainerRestartPolicyAlways)}
				switch response {
				case plain:
				case notNative:
					sidecar.RestartPolicy = nil
					fallthrough
				case injected:
					template.Template.Spec.InitContainers = []corev1.Container{sidecar}
				default:
					w.WriteHeader(http.StatusInternalServerError)
					_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: http.StatusInternalServerError, Message: response})
					return
				}
				_ = json.NewEncoder(w).Encode(template)
			}))
			defer server.Close()
			p := startCheck(t, server.URL, tt.args...)
			if tt.fails != "" {
				p.MustFail(t, 1, tt.fails)
				if name == "unknown cause" && strings.Contains(p.Stderr.String(), "; ") {
					t.Errorf("the output has a fix for another cause: %s", p.Stderr)
				}
			} else if err := p.Wait(); err != nil {
				t.Errorf("%v: %s", err, p.Stderr)
			}
			if lines := strings.Split(p.Stdout.String(), "\n"); len(slices.Compact(slices.Clone(lines))) != len(lines) {
				t.Errorf("the output repeats lines: %q", lines)
			}
			for _, want := range tt.want {
				if !strings.Contains(p.Stdout.String(), want) {
					t.Errorf("the output is %q, want %q in it", p.Stdout, want)
				}
			}
		})
	}
}

// startCheck starts the command with an API server at that URL.
func startCheck(t *testing.T, url string, args ...string) *processtest.Process {
	t.Helper()
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c"}}],"clusters":[{"name":"c","cluster":{"server":"` + url + `"}}]}`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return processtest.Start(t, processtest.Command{Args: append([]string{"check", "--namespace=credence", "--kubeconfig=" + kubeconfig}, args...)})
}

func TestBadCheckFlags(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ arg, want string }{
		{"", "--namespace is required"},
		{"--timeout=0s", "--timeout: 0s is not positive"},
		{"--annotation-prefix=A/b", "--annotation-prefix: "},
		{"word", "unexpected argument"},
	} {
		args := []string{"check"}
		if tt.arg != "" {
			args = append(args, "--namespace=x", tt.arg)
		}
		processtest.Start(t, processtest.Command{Args: args}).MustFail(t, 2, tt.want)
	}
}
