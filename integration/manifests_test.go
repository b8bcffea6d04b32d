//go:build unix

package integration

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// manifests is a file of many documents, as users keep it in Git.
const manifests = `# All of the shop.
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {k: v}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: deployment}
spec:
  replicas: 2
  selector: {matchLabels: {app: deployment}}
  template:
    metadata:
      labels: {app: deployment}
      annotations: {iam.amazonaws.com/role: cart, iam.amazonaws.com/region: eu-central-1}
    spec:
      initContainers:
        - {name: migrate, image: "app:1", args: [migrate]}
      containers:
        - name: app
          image: app:1 # ours
          env: [{name: A, value: b}]
          resources: {limits: {cpu: "1", memory: 1Gi}}
        - name: proxy
          image: proxy:1
      volumes:
        - {name: settings, configMap: {name: settings}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: job}
spec:
  backoffLimit: 1
  template:
    metadata:
      annotations: {iam.amazonaws.com/role: cart, iam.amazonaws.com/start-timeout: "0"}
    spec:
      restartPolicy: Never
      serviceAccountName: default
      terminationGracePeriodSeconds: 7200
      containers: [{name: app, image: "app:1"}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: cronjob}
spec:
  schedule: "@daily"
  jobTemplate:
    spec:
      template:
        metadata:
          annotations: {iam.amazonaws.com/role: cart, iam.amazonaws.com/skip-containers: helper}
        spec:
          restartPolicy: OnFailure
          containers:
            - {name: app, image: "app:1"}
            - {name: helper, image: "helper:1"}
---
apiVersion: v1
kind: Pod
metadata: {name: pod, annotations: {iam.amazonaws.com/role: cart}}
spec: {containers: [{name: app, image: "app:1"}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: other}
spec:
  selector: {matchLabels: {app: other}}
  template:
    metadata: {labels: {app: other}}
    spec: {containers: [{name: app, image: "app:1"}]}
`

// templates are the paths of the pods and pod templates in manifests, by object.
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
	program := filepath.Join(t.TempDir(), "credence")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../cmd/credence").CombinedOutput(); err != nil {
		t.Fatalf("building credence: %v\n%s", err, out)
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
		made, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), &pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
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
