//go:build unix

package admission

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/integration/await"
)

// heard collects the warnings that a client gets.
type heard struct {
	mu       sync.Mutex
	warnings []string // guarded by mu
}

// HandleWarningHeader implements rest.WarningHandler.
func (h *heard) HandleWarningHeader(code int, _, text string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if code == 299 && text != "" {
		h.warnings = append(h.warnings, text)
	}
}

// from returns the warnings of one policy since the last call, and discards all others.
func (h *heard) from(policy string) (found []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, text := range h.warnings {
		if strings.Contains(text, fmt.Sprintf("'%s'", policy)) {
			found = append(found, text)
		}
	}
	h.warnings = nil
	return found
}

func listening(t *testing.T) (kubernetes.Interface, *heard) {
	t.Helper()
	h := &heard{}
	config := rest.CopyConfig(control.Config())
	config.WarningHandler = h
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c, h
}

// warned shows that an annotated pod of a namespace that is not opted in causes a warning, because it starts without
// credentials. So does an object that creates such pods. Other objects cause none.
func (w *world) warned(t *testing.T) {
	client, h := listening(t)
	optIn := w.prefix + "/inject"
	labelled := func(value string) string {
		namespace := w.namespace(t, false)
		changed := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{optIn: value}}}
		if _, err := client.CoreV1().Namespaces().Update(t.Context(), changed, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		return namespace
	}
	plain, optedIn, misspelt, disabled := w.namespace(t, false), w.namespace(t, true), labelled("enable"), labelled("disabled")
	h.from("")
	// workload creates the object of a kind that creates such pods.
	workload := func(kind, group string) func(namespace string, pod *corev1.Pod) error {
		return func(namespace string, pod *corev1.Pod) error {
			pod.Labels = map[string]string{"a": "b"}
			spec := map[string]any{"template": map[string]any{"metadata": pod.ObjectMeta, "spec": pod.Spec}, "selector": map[string]any{"matchLabels": pod.Labels}}
			if kind == "jobs" {
				pod.Spec.RestartPolicy = corev1.RestartPolicyNever
				spec = map[string]any{"template": map[string]any{"metadata": pod.ObjectMeta, "spec": pod.Spec}}
			}
			return client.Discovery().RESTClient().Post().AbsPath("/apis", group, "v1", "namespaces", namespace, kind).Param("dryRun", metav1.DryRunAll).
				Body(encode(t, map[string]any{"metadata": map[string]any{"name": name("w")}, "spec": spec})).SetHeader("Content-Type", "application/json").Do(t.Context()).Error()
		}
	}
	kinds := map[string]struct {
		policy string
		create func(namespace string, pod *corev1.Pod) error
	}{
		"pod": {"credence-not-opted-in", func(namespace string, pod *corev1.Pod) error {
			_, err := client.CoreV1().Pods(namespace).Create(t.Context(), pod, dry)
			return err
		}},
		"deployment":   {"credence-not-opted-in-templates", workload("deployments", "apps")},
		"stateful set": {"credence-not-opted-in-templates", workload("statefulsets", "apps")},
		"daemon set":   {"credence-not-opted-in-templates", workload("daemonsets", "apps")},
		"job":          {"credence-not-opted-in-templates", workload("jobs", "batch")},
	}
	const advice = "is not opted in (no label %s=enabled): "
	await.Until(t, "the policy is in force", func() error {
		if err := kinds["deployment"].create(plain, w.pod(w.annotated)); err != nil {
			return err
		}
		if len(h.from("credence-not-opted-in-templates")) == 0 {
			return errors.New("there is no warning")
		}
		return nil
	})
	for kind, k := range kinds {
		for where, tt := range map[string]struct {
			namespace string
			pod       *corev1.Pod
			warned    bool
		}{
			"no label":                {plain, w.pod(w.annotated), true},
			"another label":           {misspelt, w.pod(w.annotated), true},
			"disabled":                {disabled, w.pod(w.annotated), true},
			"by another key":          {plain, w.pod(annotate(w.prefix+"/session-name", "x")), true},
			"not annotated":           {plain, w.pod(annotate("example.com/role", "x")), false},
			"no annotations":          {plain, w.pod(), false},
			"opted in":                {optedIn, w.pod(w.complete), false},
			"opted in, no role":       {optedIn, w.pod(), false},
			"annotations of webhooks": {plain, w.pod(annotate(w.prefix+"/service-account", "x"), annotate(w.prefix+"/warnings", "x")), false},
		} {
			if err := k.create(tt.namespace, tt.pod); err != nil {
				t.Errorf("%s, %s: %v", kind, where, err)
			}
			got := h.from(k.policy)
			if len(got) == 1 != tt.warned || tt.warned && !strings.Contains(got[0], fmt.Sprintf(advice, optIn)) {
				t.Errorf("%s, %s: got the warnings %q", kind, where, got)
			}
		}
	}
	for value, want := range map[string]string{
		"enabled": "", "disabled": "",
		"enable": `did you mean "enabled"?`, "Enabled": `did you mean "enabled"?`, "true": `did you mean "enabled"?`, "yes": `did you mean "enabled"?`, "": `did you mean "enabled"?`,
		"no": `use "enabled" to opt it in`,
	} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name("ns"), Labels: map[string]string{optIn: value}}}
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, dry); err != nil {
			t.Errorf("namespace labelled %q: %v", value, err)
		}
		got := h.from("credence-opt-in-label")
		if len(got) != min(len(want), 1) || want != "" && (!strings.Contains(got[0], want) || !strings.Contains(got[0], fmt.Sprintf(`is "%s"`, value))) {
			t.Errorf("namespace labelled %q: got the warnings %q, want %q", value, got, want)
		}
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name("ns")}}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, dry); err != nil || len(h.from("credence-opt-in-label")) > 0 {
		t.Errorf("a namespace without the label causes a warning (%v)", err)
	}
}

func encode(t *testing.T, value any) []byte {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
