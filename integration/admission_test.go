//go:build unix

package integration

import (
	"encoding/json"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/stack"
)

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

func TestAnnotatedPodGetsExactlyOneSidecarFirst(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	pod := stack.Pod("shop", map[string]string{roleKey: "cart"})
	pod.Spec.InitContainers = []corev1.Container{{Name: "migrate", Image: "migrate:1"}}
	stored, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range stored.Spec.InitContainers {
		names = append(names, c.Name)
	}
	if want := []string{stack.SidecarName, "migrate"}; !slices.Equal(names, want) {
		t.Fatalf("init containers are %q, want %q", names, want)
	}
	sidecar := stored.Spec.InitContainers[0]
	if sidecar.RestartPolicy == nil || *sidecar.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Errorf("the sidecar's restart policy is %v: it is no native sidecar", sidecar.RestartPolicy)
	}
	// The API server's own ServiceAccount admission ran after us and must not have given the sidecar
	// the pod's API token.
	for _, m := range sidecar.VolumeMounts {
		if strings.HasPrefix(m.Name, "kube-api-access") {
			t.Errorf("the sidecar mounts the API token from volume %s", m.Name)
		}
	}
	if len(sidecar.VolumeMounts) != 1 {
		t.Errorf("the sidecar has mounts %v, want its own alone", sidecar.VolumeMounts)
	}
	for _, c := range []corev1.Container{stored.Spec.InitContainers[1], stored.Spec.Containers[0]} {
		if !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "AWS_CONTAINER_CREDENTIALS_FULL_URI" }) {
			t.Errorf("container %s has no AWS_CONTAINER_CREDENTIALS_FULL_URI", c.Name)
		}
	}
}

func TestOtherPodsAreLeftByteForByteAlone(t *testing.T) {
	t.Parallel()
	optedIn := namespace(t, ".*")
	plain := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: optedIn + "-plain"}}
	if err := credence.MakeNamespace(t.Context(), plain); err != nil {
		t.Fatal(err)
	}
	// What the API server itself makes of a pod, where no webhook is called.
	untouched := stored(t, plain.Name, stack.Pod("app", nil))
	if got := stored(t, optedIn, stack.Pod("app", nil)); got != untouched {
		t.Errorf("a pod without annotations was changed:\n%s", cmp.Diff(untouched, got))
	}
	annotated := stack.Pod("annotated", map[string]string{roleKey: "cart"})
	if got := stored(t, plain.Name, annotated); got != strings.ReplaceAll(untouched, `"name":"NAME"`, `"annotations":{"`+roleKey+`":"cart"},"name":"NAME"`) {
		t.Errorf("an annotated pod of a namespace that is not opted in was changed:\n%s", cmp.Diff(untouched, got))
	}
}

// stored makes the pod and returns what the API server stored, without what differs between any two
// pods.
func stored(t *testing.T, namespace string, pod *corev1.Pod) string {
	t.Helper()
	created, err := credence.Client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := credence.Client.CoreV1().RESTClient().Get().Namespace(namespace).Resource("pods").Name(created.Name).Do(t.Context()).Raw()
	if err != nil {
		t.Fatal(err)
	}
	var object map[string]any
	if err := json.Unmarshal(raw, &object); err != nil {
		t.Fatal(err)
	}
	metadata := object["metadata"].(map[string]any)
	for _, key := range []string{"uid", "resourceVersion", "creationTimestamp", "managedFields", "namespace", "generation"} {
		delete(metadata, key)
	}
	metadata["name"] = "NAME"
	delete(object, "status")
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	// The API token's volume has a random name.
	for _, v := range created.Spec.Volumes {
		if strings.HasPrefix(v.Name, "kube-api-access-") {
			text = []byte(strings.ReplaceAll(string(text), v.Name, "kube-api-access"))
		}
	}
	return string(text)
}

func TestMisspeltAnnotationIsRefusedWithTheRightOne(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	_, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), stack.Pod("app", map[string]string{"iam.amazonaws.com/roel": "cart"}), metav1.CreateOptions{})
	if err == nil || !strings.Contains(err.Error(), `"iam.amazonaws.com/roel" is unknown; did you mean "iam.amazonaws.com/role"`) {
		t.Errorf("answered %v", err)
	}
}

func TestNamespaceWithoutPermittedGetsNothing(t *testing.T) {
	t.Parallel()
	ns := strings.ToLower(t.Name())
	if err := credence.Namespace(t.Context(), ns, nil); err != nil {
		t.Fatal(err)
	}
	_, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), stack.Pod("app", map[string]string{roleKey: "cart"}), metav1.CreateOptions{})
	if err == nil || !strings.Contains(err.Error(), `annotate it with "iam.amazonaws.com/permitted"`) || !strings.Contains(err.Error(), arn("cart")) {
		t.Errorf("answered %v", err)
	}
}

func TestPermittedCannotBeEscaped(t *testing.T) {
	t.Parallel()
	// Wrapped before it is compiled, this would match every role.
	ns := namespace(t, arn("a")+")|(?:.*")
	_, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), stack.Pod("app", map[string]string{roleKey: "b"}), metav1.CreateOptions{})
	if err == nil || !strings.Contains(err.Error(), "is not a regular expression") {
		t.Errorf("answered %v", err)
	}
	// An alternative is anchored on both sides.
	other := ns + "-or"
	if err := credence.Namespace(t.Context(), other, map[string]string{permittedKey: arn("a") + "|" + arn("b")}); err != nil {
		t.Fatal(err)
	}
	for role, permitted := range map[string]bool{"a": true, "b": true, "ab": false, "bc": false} {
		_, err := credence.Client.CoreV1().Pods(other).Create(t.Context(), stack.Pod("app-"+role, map[string]string{roleKey: role}), metav1.CreateOptions{})
		if (err == nil) != permitted {
			t.Errorf("role %s: answered %v", role, err)
		}
	}
}

// The webhook's log is read by operators; it must say what was decided, and nothing of the pod's
// environment.
func TestWebhookLogsNoEnvironment(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	pod := stack.Pod("app", map[string]string{roleKey: "cart"})
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "PASSWORD", Value: "in-the-environment"}}
	if _, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(credence.WebhookLog())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), ns) {
		t.Errorf("the webhook's log does not mention the pod of namespace %s", ns)
	}
	if strings.Contains(string(log), "in-the-environment") {
		t.Error("the webhook's log holds a value of the pod's environment")
	}
}
