//go:build unix

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// explained is the part of the JSON of "credence explain" that this test reads.
type explained struct {
	Subject, Conclusion string
	Findings            []struct{ Step, State, Text string }
}

// TestExplain: the command reads a real API server with the rights of its user, and says why controllers cannot create
// pods. There are no nodes here, so the brokers are not called.
func TestExplain(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "credence")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../cmd/credence").CombinedOutput(); err != nil {
		t.Fatalf("building credence: %v\n%s", err, out)
	}
	where := installed(t)
	explain := func(namespace string, args ...string) (x explained) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), program, append([]string{
			"explain", "--kubeconfig=" + control.Kubeconfig(), "-n", namespace, "--credence-namespace=" + where, "-o", "json"}, args...)...)
		out, err := cmd.Output()
		if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() != 1) {
			t.Fatalf("%v: %v", args, err)
		} else if ok && len(out) == 0 {
			t.Fatalf("%v: %s", args, exit.Stderr)
		}
		if err := json.Unmarshal(out, &x); err != nil {
			t.Fatalf("%v: %v in %s", args, err, out)
		}
		return x
	}
	state := func(x explained, step string) string {
		for _, f := range x.Findings {
			if f.Step == step {
				return f.State + ": " + f.Text
			}
		}
		return "none"
	}

	ns := namespace(t, ".*:role/other")
	deploy(t, ns)
	await.Until(t, "the Deployment reports that its pod is refused", func() error {
		x := explain(ns, "deployment/cart")
		if got := state(x, "permission"); !strings.HasPrefix(got, `failed: namespace "`+ns+`" does not permit role `+stack.RoleARN("cart")) || !strings.HasPrefix(x.Conclusion, "The cause: ") {
			return fmt.Errorf("permission is %s; %+v", got, x)
		}
		return nil
	})
	// The namespace is fixed, but the message about the last pod stays until the controller tries again.
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		object, err := credence.Client.CoreV1().Namespaces().Get(t.Context(), ns, metav1.GetOptions{})
		if err != nil {
			return err
		}
		object.Annotations[permittedKey] = ".*:role/cart"
		_, err = credence.Client.CoreV1().Namespaces().Update(t.Context(), object, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := state(explain(ns, "deployment/cart"), "permission"); !strings.HasPrefix(got, "ok: "+stack.RoleARN("cart")+" is permitted by annotation "+permittedKey) {
		t.Errorf("permission is %s", got)
	}

	// A pod that is older than the label of its namespace.
	late := namespaceWith(t, nil, map[string]string{permittedKey: ".*"})
	kubetest.Create(t, credence.Client, late, stack.Pod("app", role("cart")))
	if got := state(explain(late, "app"), "namespace label"); !strings.HasPrefix(got, "failed: namespace "+late+" is not opted in") {
		t.Errorf("label is %s", got)
	}
	// A manifest is explained before it is applied.
	file := filepath.Join(t.TempDir(), "pod.yaml")
	text, err := json.Marshal(stack.Pod("app", map[string]string{"iam.amazonaws.com/rloe": "cart"}))
	if err != nil {
		t.Fatal(err)
	}
	text = []byte(strings.Replace(string(text), "{", `{"apiVersion":"v1","kind":"Pod",`, 1))
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := state(explain(ns, "-f", file), "pod annotations"); !strings.Contains(got, `did you mean "`+roleKey+`"?`) {
		t.Errorf("the manifest: %s", got)
	}
}

// deploy makes a Deployment whose pod requests role cart.
func deploy(t *testing.T, namespace string) {
	t.Helper()
	labels := map[string]string{"app": "cart"}
	pod := stack.Pod("cart", role("cart"))
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "cart"}, Spec: appsv1.DeploymentSpec{
		Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: pod.Annotations}, Spec: pod.Spec},
	}}
	if _, err := credence.Client.AppsV1().Deployments(namespace).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// installed makes a namespace with what the chart installs and the command reads, and returns the namespace. The programs
// themselves run beside the cluster.
func installed(t *testing.T) string {
	t.Helper()
	name := kubetest.Namespace(t, credence.Client, nil, nil)
	for _, component := range []string{"webhook", "broker"} {
		labels := map[string]string{"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": component}
		d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "credence-" + component, Labels: labels}, Spec: appsv1.DeploymentSpec{
			Replicas: new(int32(0)), Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
				Name: component, Image: "credence-" + component + ":test", Args: credence.InjectFlags(),
			}}}},
		}}
		if _, err := credence.Client.AppsV1().Deployments(name).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	settings := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "credence-sidecar-settings"}, Data: map[string]string{"settings.yaml": "port: 9779"}}
	if _, err := credence.Client.CoreV1().ConfigMaps(name).Create(t.Context(), settings, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return name
}
