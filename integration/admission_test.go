//go:build unix

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/webhooktest"
)

func TestAnnotatedPodGetsExactlyOneSidecarFirst(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	pod := stack.Pod("shop", role("cart"))
	pod.Spec.InitContainers = []corev1.Container{{Name: "migrate", Image: "migrate:1"}}
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "PASSWORD", Value: "in-the-environment"}}
	stored := kubetest.Create(t, credence.Client, ns, pod)
	if want := []string{stack.SidecarName, "migrate"}; !slices.Equal(initNames(stored), want) {
		t.Fatalf("the init containers are %q, want %q", initNames(stored), want)
	}
	if err := injected(stored); err != nil {
		t.Error(err)
	}
	sidecar := stored.Spec.InitContainers[0]
	if sidecar.RestartPolicy == nil || *sidecar.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Errorf("the sidecar's restart policy is %v: it is no native sidecar", sidecar.RestartPolicy)
	}
	// The ServiceAccount admission of the API server runs after the webhook. It must not mount the pod's API token in
	// the sidecar.
	if len(sidecar.VolumeMounts) != 1 || strings.HasPrefix(sidecar.VolumeMounts[0].Name, "kube-api-access") {
		t.Errorf("the sidecar has mounts %v, want its own only", sidecar.VolumeMounts)
	}
	// Cluster admins read the webhook's log. It names the decision, but no value of the pod's environment.
	log, err := os.ReadFile(credence.Webhook.Log())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), ns) || strings.Contains(string(log), "in-the-environment") {
		t.Error("the webhook's log does not name the pod's namespace, or has a value of the pod's environment")
	}
}

func TestOtherPodsAreUnchanged(t *testing.T) {
	t.Parallel()
	optedIn, plain := namespace(t, ".*"), namespaceWith(t, nil, nil)
	untouched := stored(t, plain, stack.Pod("app", nil)) // no webhook is called here
	if got := stored(t, optedIn, stack.Pod("app", nil)); got != untouched {
		t.Errorf("a pod without annotations was changed:\n%s", cmp.Diff(untouched, got))
	}
	want := strings.ReplaceAll(untouched, `"name":"NAME"`, `"annotations":{"`+roleKey+`":"cart"},"name":"NAME"`)
	if got := stored(t, plain, stack.Pod("annotated", role("cart"))); got != want {
		t.Errorf("an annotated pod of a namespace that is not opted in was changed:\n%s", cmp.Diff(want, got))
	}
}

// stored creates the pod and returns it as the API server stores it, without what differs between any two pods.
func stored(t *testing.T, namespace string, pod *corev1.Pod) string {
	t.Helper()
	raw, err := credence.Client.CoreV1().RESTClient().Post().Namespace(namespace).Resource("pods").Body(pod).
		SetHeader("Accept", "application/json").Do(t.Context()).Raw()
	if err != nil {
		t.Fatal(err)
	}
	var created corev1.Pod
	var object struct {
		Metadata map[string]any `json:"metadata"`
		Spec     map[string]any `json:"spec"`
	}
	if err := errors.Join(json.Unmarshal(raw, &created), json.Unmarshal(raw, &object)); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"uid", "resourceVersion", "creationTimestamp", "managedFields", "namespace", "generation"} {
		delete(object.Metadata, key)
	}
	object.Metadata["name"] = "NAME"
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range created.Spec.Volumes { // the volume of the API token has a random name
		if strings.HasPrefix(v.Name, "kube-api-access-") {
			text = []byte(strings.ReplaceAll(string(text), v.Name, "kube-api-access"))
		}
	}
	return string(text)
}

// TestPodsAreRefusedAtCreation shows that users get the refusals of package policy, which has the table of all expressions.
func TestPodsAreRefusedAtCreation(t *testing.T) {
	t.Parallel()
	optedIn := map[string]string{injectLabel: "enabled"}
	for name, tc := range map[string]struct {
		permitted   map[string]string
		annotations map[string]string
		want        []string // parts of the message; nil: the pod is created
	}{
		"a misspelt key": {map[string]string{permittedKey: ".*"}, map[string]string{"iam.amazonaws.com/roel": "cart"},
			[]string{`"iam.amazonaws.com/roel" is unknown; did you mean "iam.amazonaws.com/role"`}},
		"nothing is permitted":      {nil, role("cart"), []string{`annotate it with "iam.amazonaws.com/permitted"`, arn("cart")}},
		"another role is permitted": {map[string]string{permittedKey: arn("a")}, role("ab"), []string{"does not permit"}},
		"an invalid expression":     {map[string]string{permittedKey: arn("a") + ")|(?:.*"}, role("b"), []string{"is not a regular expression"}},
		"the role is permitted":     {map[string]string{permittedKey: arn("a") + "|" + arn("b")}, role("b"), nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := credence.Client.CoreV1().Pods(namespaceWith(t, optedIn, tc.permitted)).Create(t.Context(), stack.Pod("app", tc.annotations), metav1.CreateOptions{})
			if (err == nil) != (tc.want == nil) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			for _, part := range tc.want {
				if err != nil && !strings.Contains(err.Error(), part) {
					t.Errorf("got %v, want %q in it", err, part)
				}
			}
		})
	}
}

// TestAnotherWebhook runs a webhook that adds a container and an init container, before ours and after it. In both cases
// all containers get the environment, there is one sidecar, and the other webhook's containers are unchanged.
func TestAnotherWebhook(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string // of the configuration; ours is named credence
		order []string
	}{
		{"a-mesh", []string{stack.SidecarName, "mesh-init", "own-init"}},
		{"z-mesh", []string{"mesh-init", stack.SidecarName, "own-init"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			ns := namespace(t, ".*")
			var calls, sawSidecar atomic.Int64
			webhooktest.Start(t, credence.Client, webhooktest.Config{
				Name: tc.name, Namespace: ns, Reinvocation: admissionregistrationv1.IfNeededReinvocationPolicy,
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Patch: func(pod *corev1.Pod) string {
					calls.Add(1)
					sawSidecar.Add(int64(sidecars(pod)))
					if slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == "mesh" }) {
						return ""
					}
					return `[{"op":"add","path":"/spec/containers/0","value":{"name":"mesh","image":"mesh:1","env":[{"name":"A","value":"b"}]}},` +
						`{"op":"add","path":"/spec/initContainers/0","value":{"name":"mesh-init","image":"mesh:1"}}]`
				},
			})
			pod := stack.Pod("app", role("cart"))
			pod.Spec.InitContainers = []corev1.Container{{Name: "own-init", Image: "init:1"}}
			await.Until(t, "the API server calls the other webhook", func() error {
				_, err := kubetest.Dry(t, credence.Client, ns, pod)
				if err == nil && calls.Load() == 0 {
					err = errors.New("no call")
				}
				return err
			})
			calls.Store(0)
			sawSidecar.Store(0)
			stored := kubetest.Create(t, credence.Client, ns, pod)
			if err := injected(stored); err != nil {
				t.Error(err)
			}
			if !slices.Equal(initNames(stored), tc.order) {
				t.Errorf("the init containers are %q, want %q", initNames(stored), tc.order)
			}
			if mesh := stored.Spec.Containers[0]; mesh.Name != "mesh" || mesh.Env[0] != (corev1.EnvVar{Name: "A", Value: "b"}) {
				t.Errorf("the other webhook's container is %+v", mesh)
			}
			// The order of the calls is what the two cases are about.
			if first := calls.Load() > sawSidecar.Load(); first != (tc.name == "a-mesh") {
				t.Errorf("the other webhook got %d calls, %d of them with our sidecar", calls.Load(), sawSidecar.Load())
			}
		})
	}
}

// TestSettingsFile shows that the API server accepts a pod that is injected with all settings of a file. The tests of the
// program show that it follows the file. This test restarts the webhook, so it does not run in parallel.
func TestSettingsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "settings.yaml")
	const settings = "memory: 64Mi\ncpu: {request: 50m, limit: 0}\nport: 9780\nrunAsUser: 1000\nimagePullSecrets: [registry]\npodAnnotations: {sidecar.example/ports: '9443'}\n"
	if err := os.WriteFile(file, []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	restartWebhook(t, "--sidecar-settings-file="+file, "--sidecar-log-level=warn")
	pod, err := kubetest.Dry(t, credence.Client, namespace(t, ".*"), stack.Pod("app", role("cart")))
	if err != nil {
		t.Fatal(err)
	}
	if err := injected(pod); err != nil {
		t.Error(err)
	}
	sidecar := pod.Spec.InitContainers[0]
	got := fmt.Sprint(resourcesOf(sidecar), " ", *sidecar.SecurityContext.RunAsUser, " ", pod.Spec.ImagePullSecrets, " ", pod.Annotations["sidecar.example/ports"],
		" ", kubetest.Variable(sidecar, "CREDENCE_LISTEN"), " ", kubetest.Variable(sidecar, "CREDENCE_LOG_LEVEL"),
		" ", kubetest.Variable(pod.Spec.Containers[0], "AWS_CONTAINER_CREDENTIALS_FULL_URI"))
	const want = "50m 0 64Mi 64Mi 1000 [{registry}] 9443 127.0.0.1:9780 warn http://127.0.0.1:9780/v1/credentials"
	if got != want {
		t.Errorf("the pod has %s, want %s", got, want)
	}
}
