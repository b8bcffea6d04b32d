//go:build unix

package integration

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/kubetest"
)

// templates are the paths of the pods and pod templates in testdata/manifests.yaml, by object.
var templates = map[string][]string{
	"deployments.apps/deployment": {"spec", "template"},
	"deployments.apps/other":      {"spec", "template"},
	"jobs.batch/job":              {"spec", "template"},
	"cronjobs.batch/cronjob":      {"spec", "jobTemplate", "spec", "template"},
	"pods/pod":                    {},
}

// TestInjectedManifests shows that the API server accepts the output of "credence inject". Its pods are stored equal to
// those of the original manifests, although the webhook adds nothing to the former and everything to the latter.
func TestInjectedManifests(t *testing.T) {
	t.Parallel()
	file, err := os.ReadFile("testdata/manifests.yaml")
	if err != nil {
		t.Fatal(err)
	}
	manifests := string(file)
	program := filepath.Join(t.TempDir(), "credence")
	if err := images.CompileFor(t.Context(), "../cmd/credence", runtime.GOOS, runtime.GOARCH, program); err != nil {
		t.Fatal(err)
	}
	var injectedManifests, messages bytes.Buffer
	cmd := exec.CommandContext(t.Context(), program, append([]string{"inject"}, credence.InjectFlags()...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(manifests), &injectedManifests, &messages
	if err := cmd.Run(); err != nil {
		t.Fatalf("credence inject: %v\n%s", err, messages.String())
	}
	pods := make(map[string]map[string]*corev1.Pod) // by variant and object
	for name, text := range map[string]string{"injected": injectedManifests.String(), "original": manifests} {
		ns := namespace(t, ".*")
		if out, err := kubectl(t, text, "apply", "--server-side", "--validate=strict", "--namespace="+ns, "-f", "-"); err != nil {
			t.Fatalf("applying the %s manifests: %v\n%s", name, err, out)
		}
		pods[name] = make(map[string]*corev1.Pod)
		for object, path := range templates {
			pods[name][object] = podOf(t, ns, object, path)
		}
	}
	for object := range templates {
		made, want := pods["injected"][object], pods["original"][object]
		if diff := cmp.Diff(want, made); diff != "" {
			t.Errorf("%s: the pod of the injected manifest differs from what the webhook makes (- webhook, + credence inject):\n%s", object, diff)
		}
		if n, want := sidecars(made), map[bool]int{true: 0, false: 1}[object == "deployments.apps/other"]; n != want {
			t.Errorf("%s: its pod has %d sidecars, want %d", object, n, want)
		}
	}
}

// podOf creates the pod of a stored object in a dry run, as its controller would. The result lacks what differs between
// any two pods.
func podOf(t *testing.T, ns, object string, path []string) *corev1.Pod {
	t.Helper()
	out, err := kubectl(t, "", "get", object, "--namespace="+ns, "-o", "json")
	if err != nil {
		t.Fatalf("%s: %v\n%s", object, err, out)
	}
	var stored unstructured.Unstructured
	if err := json.Unmarshal([]byte(out), &stored.Object); err != nil {
		t.Fatal(err)
	}
	template, found, err := unstructured.NestedMap(stored.Object, path...)
	if err != nil || !found {
		t.Fatalf("%s has no pod template: %v", object, err)
	}
	text, err := json.Marshal(template)
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(text, &pod); err != nil {
		t.Fatal(err)
	}
	if len(path) > 0 {
		pod.GenerateName = "created-"
		made, err := kubetest.Dry(t, credence.Client, ns, &pod)
		if err != nil {
			t.Fatalf("a pod of %s: %v", object, err)
		}
		pod = *made
	}
	// The API server mounts its own token before it calls webhooks, under a random name, unless one is mounted already. So
	// the token's position depends on the order.
	token := func(name string) bool { return strings.HasPrefix(name, "kube-api-access-") }
	pod.Spec.Volumes = slices.DeleteFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return token(v.Name) })
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for n := range list {
			list[n].VolumeMounts = slices.DeleteFunc(list[n].VolumeMounts, func(m corev1.VolumeMount) bool { return token(m.Name) })
		}
	}
	for _, key := range []string{"batch.kubernetes.io/controller-uid", "controller-uid"} {
		delete(pod.Labels, key) // differs for each Job
	}
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations}, Spec: pod.Spec}
}
