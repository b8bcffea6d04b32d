package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/versions"
)

// injected returns a running pod with a sidecar.
func injected(namespace, name, image string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"iam.example.org/injected": "true"}},
		Spec:       corev1.PodSpec{InitContainers: []corev1.Container{{Name: "credence-sidecar", Image: image}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, InitContainerStatuses: []corev1.ContainerStatus{
			{Name: "credence-sidecar", ImageID: "registry.example/credence-sidecar@sha256:0123456789abcdef"},
		}},
	}
}

// running returns installed's server with two brokers and three sidecars, one of which is old.
func running(t *testing.T, old string) *apitest.Server {
	t.Helper()
	server := installed(t, webhookArgs...)
	labels := map[string]string{"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "broker"}
	spec := corev1.PodSpec{Containers: []corev1.Container{{Name: "broker", Image: "registry.example/credence-broker@sha256:fedcba9876543210"}}}
	server.Put(
		&appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-broker", Labels: map[string]string{"app.kubernetes.io/version": "1.2.3"}},
			Spec:       appsv1.DeploymentSpec{Template: corev1.PodTemplateSpec{Spec: spec}, Selector: &metav1.LabelSelector{MatchLabels: labels}},
		},
		injected("shop", "a", "registry.example/credence-sidecar:1.2.3"),
		injected("shop", "b", "registry.example/credence-sidecar:1.2.3"),
		injected("bank", "c", "registry.example/credence-sidecar:"+old),
	)
	pending := injected("shop", "pending", "registry.example/credence-sidecar:1.2.3")
	pending.Status.Phase = corev1.PodPending
	server.Put(pending)
	for n := range 2 {
		server.Put(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: fmt.Sprintf("credence-broker-%d", n), Labels: labels},
			Spec:       spec,
			Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{
				{Name: "broker", ImageID: "registry.example/credence-broker@sha256:fedcba9876543210"},
			}},
		})
	}
	return server
}

func TestVersion(t *testing.T) {
	server := running(t, "1.1.0")
	code, out, messages := call(t, "", "credence", "version", "--kubeconfig="+server.Kubeconfig(t))
	want := `PART        VERSION  PODS  IMAGE
client      CLIENT   -     -
Kubernetes  v1.37.2  -     -
webhook     v1.2.3   1     registry.example/credence-webhook:1.2.3
broker      v1.2.3   2     registry.example/credence-broker@sha256:fedcba9876543210
sidecar     v1.2.3   2     registry.example/credence-sidecar:1.2.3 (sha256:0123456789a…)
sidecar     v1.1.0   1     registry.example/credence-sidecar:1.1.0 (sha256:0123456789a…)
`
	want = strings.Replace(want, fmt.Sprintf("%-7s", "CLIENT"), fmt.Sprintf("%-7s", program.Version()), 1)
	if diff := cmp.Diff(want, out); diff != "" || code != 0 || messages != "" {
		t.Errorf("exit code %d, messages %s, output (-want +got):\n%s", code, messages, diff)
	}

	code, out, _ = call(t, "", "credence", "version", "-o", "json", "--kubeconfig="+server.Kubeconfig(t))
	var report versions.Report
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v: %s", code, err, out)
	}
	if p := report.Programs[3]; len(report.Programs) != 4 || p.Version != "v1.1.0" || p.Pods != 1 || p.Namespaces["bank"] != 1 || p.Digest != "sha256:0123456789abcdef" || report.Kubernetes != "v1.37.2" {
		t.Errorf("JSON is %s", out)
	}
}

// TestVersionSkew: parts that are two minor versions apart are a finding, with the pods to replace.
func TestVersionSkew(t *testing.T) {
	kubeconfig := "--kubeconfig=" + running(t, "1.0.9").Kubeconfig(t)
	code, out, _ := call(t, "", "credence", "version", kubeconfig)
	for _, want := range []string{
		`! sidecar  the sidecar of 1 pods has version v1.0.9, and Credence in the cluster v1.2.3; they work together if they are one minor version apart`,
		"\n\nversions of context \"test\"\n",
		`$ kubectl ` + kubeconfig + ` -n bank get pods -l iam.example.org/injected=true -o 'custom-columns=`,
	} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	if code != exitFailed || strings.Contains(out, "-n shop") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

// TestVersionOfDigests: an image with a digest alone has the version of the webhook that injects it, and otherwise none.
func TestVersionOfDigests(t *testing.T) {
	server := running(t, "1.2.3")
	current, other := "registry.example/credence-sidecar@sha256:0123456789abcdef", "registry.example/credence-sidecar@sha256:eeee"
	args := slices.Clone(webhookArgs)
	args[slices.Index(args, "--sidecar-image=registry.example/credence-sidecar:1.2.3")] = "--sidecar-image=" + current
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-webhook"}}
	if !server.Load(d) {
		t.Fatal("there is no webhook")
	}
	d.Spec.Template.Spec.Containers[0].Args = args
	server.Put(d, injected("bank", "d", current), injected("bank", "e", other))
	_, out, _ := call(t, "", "credence", "version", "--kubeconfig="+server.Kubeconfig(t))
	for _, want := range []string{"sidecar     v1.2.3   1     " + current, "sidecar     unknown  1     " + other} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
}

// TestVersionWithoutCluster: the client's version is shown in any case.
func TestVersionWithoutCluster(t *testing.T) {
	server := running(t, "1.2.3")
	kubeconfig := "--kubeconfig=" + server.Kubeconfig(t)
	for _, flag := range []string{"--server=http://127.0.0.1:1", "--context=mars"} {
		code, out, messages := call(t, "", "credence", "version", kubeconfig, flag)
		if code != exitFailed || !strings.Contains(out, "client") || strings.Contains(out, "Kubernetes") || !strings.HasPrefix(messages, "credence version: ") {
			t.Errorf("%s: exit code %d: %s%s", flag, code, out, messages)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, messages bytes.Buffer
	if code := run(ctx, []string{"credence", "version", kubeconfig}, nil, &out, &messages); code != exitFailed || !strings.Contains(messages.String(), context.Canceled.Error()) {
		t.Errorf("after an interrupt: exit code %d: %s", code, messages.String())
	}
}

// TestVersionWithoutRights: what the user may read is shown, and the rest is unknown, with the missing right.
func TestVersionWithoutRights(t *testing.T) {
	server := running(t, "1.0.9")
	server.Intercept(func(r apitest.Request) *metav1.Status {
		if r.Resource == "pods" && r.Namespace == "" {
			return apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, `pods is forbidden: User "u" cannot list resource "pods" in API group "" at the cluster scope`)
		}
		return nil
	})
	code, out, _ := call(t, "", "credence", "version", "-n", "shop", "--kubeconfig="+server.Kubeconfig(t))
	if want := `? sidecar  only those of namespace shop are counted: pods is forbidden: User "u" cannot list resource "pods" in API group "" at the cluster scope`; code != 0 || !strings.Contains(out, want) || strings.Contains(out, "v1.0.9") || !strings.Contains(out, "sidecar     v1.2.3   2") {
		t.Errorf("exit code %d, output lacks %q:\n%s", code, want, out)
	}
	server.Intercept(func(r apitest.Request) *metav1.Status {
		if r.Resource == "deployments" {
			return apitest.Failure(http.StatusForbidden, metav1.StatusReasonForbidden, "deployments is forbidden")
		}
		return nil
	})
	if code, out, _ := call(t, "", "credence", "version", "--kubeconfig="+server.Kubeconfig(t)); code != 0 || !strings.Contains(out, "? installation") || !strings.Contains(out, "deployments is forbidden") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}

// TestTwoInstallations: of two webhooks, the one counts that the API server calls. Anybody can make a Deployment.
func TestTwoInstallations(t *testing.T) {
	server := running(t, "1.1.0")
	forged := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "security", Name: "credence-webhook"}}
	if !server.Load(forged) {
		t.Fatal("there is no webhook")
	}
	forged = forged.DeepCopy()
	forged.Namespace, forged.UID, forged.ResourceVersion = "evil", "", ""
	server.Put(forged)
	kubeconfig := "--kubeconfig=" + server.Kubeconfig(t)
	if _, out, _ := call(t, "", "credence", "version", kubeconfig); !strings.Contains(out, "namespaces evil, security have a webhook of Credence; choose one with --credence-namespace") {
		t.Errorf("two webhooks, and none of them configured:\n%s", out)
	}
	server.Put(&admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "credence"}, Webhooks: []admissionv1.MutatingWebhook{
		{ClientConfig: admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: "security", Name: "credence-webhook"}}},
	}})
	if code, out, _ := call(t, "", "credence", "version", kubeconfig); code != 0 || !strings.Contains(out, "broker      v1.2.3   2") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
}
