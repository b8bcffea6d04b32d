//go:build unix

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// cli builds the credence command, and returns a function that runs it on this cluster as a user with the role "view",
// which may only read.
func cli(t *testing.T) func(stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "credence")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", program, "../cmd/credence").CombinedOutput(); err != nil {
		t.Fatalf("building credence: %v\n%s", err, out)
	}
	viewer := "viewer-" + strings.ToLower(t.Name())
	bindings := credence.Client.RbacV1().ClusterRoleBindings()
	if _, err := bindings.Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: viewer},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "view"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: viewer}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	run := func(stdin string, args ...string) (string, string, int) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		cmd := exec.CommandContext(t.Context(), program, append(args, "--kubeconfig="+control.Kubeconfig(), "--as="+viewer, "--credence-namespace="+stack.SystemNamespace)...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
		err := cmd.Run()
		if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
			t.Fatal(err)
		}
		return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
	}
	await.Until(t, "the role view and its binding are in force", func() error {
		if _, stderr, code := run("", "version"); code == 1 || strings.Contains(stderr, "forbidden") {
			return errors.New(stderr)
		}
		return nil
	})
	return run
}

// deployWebhook creates the webhook's Deployment without pods, with the arguments of the webhook that runs beside the
// cluster.
func deployWebhook(t *testing.T) {
	t.Helper()
	labels := map[string]string{"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "webhook"}
	none := int32(0)
	if _, err := credence.Client.AppsV1().Deployments(stack.SystemNamespace).Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "credence-webhook", Labels: labels},
		Spec: appsv1.DeploymentSpec{
			Replicas: &none, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "webhook", Image: "credence-webhook:0.1.0", Args: credence.InjectFlags()}}},
			},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// variables returns the environment of each container, without fields that the API server sets by default.
func variables(pod *corev1.Pod) map[string][]string {
	all := map[string][]string{}
	for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		for _, v := range c.Env {
			all[c.Name] = append(all[c.Name], v.Name+"="+v.Value)
		}
	}
	return all
}

// TestCommandReadsTheCluster: with rights to read alone, "credence inject" without settings gives what the webhook accepts
// unchanged. "credence version" counts all sidecars, although a page of the list has fewer.
func TestCommandReadsTheCluster(t *testing.T) {
	t.Parallel()
	deployWebhook(t)
	run := cli(t)
	ns := namespace(t, ".*:role/"+bucket)
	manifest := func(role string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: %s, annotations: {%s: %s}}\nspec: {containers: [{name: app, image: app}]}\n", ns, roleKey, role)
	}
	out, messages, code := run(manifest(bucket), "inject")
	if code != 0 || !strings.Contains(messages, "using the settings of webhook credence/credence-webhook of context") {
		t.Fatalf("exit code %d: %s", code, messages)
	}
	var pod corev1.Pod
	if err := yaml.UnmarshalStrict([]byte(out), &pod); err != nil {
		t.Fatal(err)
	}
	stored, err := kubetest.Dry(t, credence.Client, ns, &pod)
	if err != nil {
		t.Fatal(err)
	}
	if err := injected(stored); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(variables(&pod), variables(stored)); diff != "" {
		t.Errorf("the webhook changes the result (-command +stored):\n%s", diff)
	}
	if out, messages, code := run(manifest("other"), "inject"); code != 1 || out != "" || !strings.Contains(messages, "does not permit role") {
		t.Errorf("a role that the namespace does not permit: exit code %d, output %q: %s", code, out, messages)
	}

	const many = 503 // a page has 500
	crowd := namespaceWith(t, nil, nil)
	var group errgroup.Group
	group.SetLimit(20)
	for n := range many {
		group.Go(func() error {
			pods := credence.Client.CoreV1().Pods(crowd)
			pod, err := pods.Create(t.Context(), &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("p%d", n), Labels: map[string]string{"iam.amazonaws.com/injected": "true"}},
				Spec: corev1.PodSpec{
					Containers:     []corev1.Container{{Name: "app", Image: "app"}},
					InitContainers: []corev1.Container{{Name: stack.SidecarName, Image: "credence-sidecar:0.1.0"}},
				},
			}, metav1.CreateOptions{})
			if err == nil {
				pod.Status.Phase = corev1.PodRunning
				_, err = pods.UpdateStatus(t.Context(), pod, metav1.UpdateOptions{})
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	out, messages, _ = run("", "version", "-o", "json")
	var report struct {
		Kubernetes string
		Programs   []struct {
			Part, Version string
			Namespaces    map[string]int
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v: %s%s", err, out, messages)
	}
	for _, p := range report.Programs {
		if p.Part == "sidecar" && p.Version == "v0.1.0" && p.Namespaces[crowd] == many && report.Kubernetes != "" {
			return
		}
	}
	t.Errorf("want %d sidecars of v0.1.0 in namespace %s: %s", many, crowd, out)
}
