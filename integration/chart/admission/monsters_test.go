//go:build unix

package admission

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// documented returns the keys of pods in the table of docs/annotations.md, which its own test holds to the code.
func documented(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("../../../docs/annotations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n## On a pod\n")
	table, _, _ = strings.Cut(table, "\n## ")
	var keys []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|").FindAllStringSubmatch(table, -1) {
		keys = append(keys, row[1])
	}
	if len(keys) < 13 {
		t.Fatalf("docs/annotations.md has keys %q, want at least 13", keys)
	}
	return keys
}

// monsters: whoever may make pods can make some with thousands of annotations or labels, and all that is done to them,
// each update by a kubelet included, is judged. The API server takes quadratic time to go through a map, so of so many
// it asks for the keys that mean something: those of the documentation, and those that the webhook writes.
func (w *world) monsters(t *testing.T) {
	namespace := w.namespace(t, true)
	galore := func(set func(key, value string) func(*corev1.Pod)) func(*corev1.Pod) {
		return func(pod *corev1.Pod) {
			for n := range 5001 {
				set(fmt.Sprintf("%04x", n), "")(pod)
			}
		}
	}
	merge := func(key string) attempt {
		return patch(client, map[string]any{"annotations": map[string]any{key: "changed"}})
	}
	for name, set := range map[string]func(key, value string) func(*corev1.Pod){"annotations": annotate, "labels": label} {
		pod := create(t, namespace, w.pod(w.complete, galore(set), onNode))
		keys := append(documented(t), "service-account", "warnings")
		if name == "labels" {
			keys = keys[:1]
		}
		for _, key := range keys {
			if err := refusedBy("credence-fixed-keys", merge(w.prefix+"/"+key)(t.Context(), pod)); err != nil {
				t.Errorf("5,001 %s: key %s: %v", name, key, err)
			}
		}
		for what, try := range map[string]attempt{
			"another label": patch(client, map[string]any{"labels": map[string]any{w.prefix + "/injected": "no"}}),
			"no role":       patch(client, map[string]any{"annotations": map[string]any{w.prefix + "/role": nil}}),
			"no label":      patch(client, map[string]any{"labels": map[string]any{w.prefix + "/injected": nil}}),
		} {
			if err := refusedBy("credence-fixed-keys", try(t.Context(), pod)); err != nil {
				t.Errorf("5,001 %s: %s: %v", name, what, err)
			}
		}
		for what, try := range map[string]attempt{
			"an update by the node": patch(node, map[string]any{}, "status"),
			"an annotation":         merge("example.com/x"),
		} {
			if err := try(t.Context(), pod); err != nil {
				t.Errorf("5,001 %s: %s: %v", name, what, err)
			}
		}
		w.unchanged(t, pod)
	}
	for _, key := range documented(t) {
		_, err := client.CoreV1().Pods(namespace).Create(t.Context(), w.pod(annotate(w.prefix+"/"+key, "x"), galore(annotate)), metav1.CreateOptions{})
		if err := refusedBy("credence-injected", err); err != nil {
			t.Errorf("5,001 annotations, and %s, without a sidecar: %v", key, err)
		}
	}
	create(t, namespace, w.pod(galore(annotate), annotate(w.prefix+"/service-account", "default"), annotate(w.prefix+"/warnings", "x")))
}
