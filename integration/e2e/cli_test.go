//go:build linux

package e2e

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/kubetest"
)

// TestCommandOfAViewer: a user who may only read gets from "credence inject", without settings, the pod that the webhook
// makes, with the cluster domain of the webhook's log. The webhook also accepts another domain. "credence version" shows
// the images that run.
func TestCommandOfAViewer(t *testing.T) {
	program := command(t)
	bindings := d.Client.RbacV1().ClusterRoleBindings()
	if _, err := bindings.Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "viewer"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "view"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "viewer"}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	run := func(stdin string, args ...string) (string, string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		cmd := d.Cluster.Command(t.Context(), program, append(args, "--kubeconfig="+d.Cluster.Kubeconfig(), "--as=viewer")...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
		err := d.Cluster.Host().Launch(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			t.Fatalf("%q: %v: %s", args, err, stderr.String())
		}
		return stdout.String(), stderr.String()
	}
	ns := d.Namespace(t)
	pod := d.App("app", annotated())
	pod.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	pod.Namespace = ns
	manifest, err := yaml.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	want, err := kubetest.Dry(t, d.Client, ns, pod)
	if err != nil {
		t.Fatal(err)
	}
	for _, domain := range []string{"", "other.example"} {
		args := []string{"inject"}
		if domain != "" {
			args = append(args, "--cluster-domain="+domain)
		}
		out, messages := run(string(manifest), args...)
		if !strings.Contains(messages, "using the settings of webhook credence/credence-webhook") || strings.Contains(messages, "note:") {
			t.Errorf("%q says:\n%s", args, messages)
		}
		var made corev1.Pod
		if err := yaml.UnmarshalStrict([]byte(out), &made); err != nil {
			t.Fatal(err)
		}
		got, err := kubetest.Dry(t, d.Client, ns, &made)
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		if domain != "" {
			if name := kubetest.Variable(got.Spec.InitContainers[0], "CREDENCE_BROKER_DNS_NAME"); !strings.HasSuffix(name, domain+".") {
				t.Errorf("the webhook does not accept domain %s and has %s", domain, name)
			}
			continue
		}
		if diff := cmp.Diff(stable(want), stable(got)); diff != "" {
			t.Errorf("the pod of the injected manifest differs from what the webhook makes (-webhook +credence inject):\n%s", diff)
		}
	}

	out, _ := run("", "version", "-o", "json")
	var report struct {
		Programs []struct {
			Part, Digest string
			Pods         int
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"webhook", "broker"} {
		pods, err := d.Pods(t.Context(), part)
		if err != nil {
			t.Fatal(err)
		}
		running := 0
		for _, p := range report.Programs {
			if p.Part == part && strings.HasPrefix(p.Digest, "sha256:") {
				running += p.Pods
			}
		}
		if running == 0 || running > len(pods) {
			t.Errorf("%d pods of part %s are shown, there are %d:\n%s", running, part, len(pods), out)
		}
	}
	if text, err := exec.CommandContext(t.Context(), program, "version", "--client").Output(); err != nil || !strings.HasPrefix(string(text), "PART") {
		t.Errorf("without a cluster: %v: %s", err, text)
	}
}

// stable returns the parts of a pod that do not differ between two creations: not the API server's own token.
func stable(pod *corev1.Pod) *corev1.Pod {
	spec := pod.Spec.DeepCopy()
	own := func(name string) bool { return strings.HasPrefix(name, "kube-api-access-") }
	spec.Volumes = slices.DeleteFunc(spec.Volumes, func(v corev1.Volume) bool { return own(v.Name) })
	for _, list := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for n := range list {
			list[n].VolumeMounts = slices.DeleteFunc(list[n].VolumeMounts, func(m corev1.VolumeMount) bool { return own(m.Name) })
		}
	}
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations}, Spec: *spec}
}
