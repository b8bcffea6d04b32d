//go:build unix

package admission

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// documented returns the pod keys in the table of docs/annotations.md, which another test compares with the code.
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

// monsters tests pods with thousands of annotations or labels, which any user who may create pods can create. The policies
// check each update of such a pod, also by its kubelet. The API server needs quadratic time to iterate over a map, so for
// large maps the policies check only the keys that have a meaning: the documented ones and those of the webhook.
func (w *world) monsters(t *testing.T) {
	namespace := w.namespace(t, true)
	many := func(set func(key, value string) func(*corev1.Pod)) func(*corev1.Pod) {
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
		pod := create(t, namespace, w.pod(w.complete, many(set), onNode))
		keys := append(documented(t), "service-account", "warnings")
		if name == "labels" {
			keys = keys[:1]
		}
		for _, key := range keys {
			if err := refusedBy("credence-fixed-keys", merge(w.prefix+"/"+key)(t.Context(), pod)); err != nil {
				t.Errorf("5,001 %s: key %s: %v", name, key, err)
			}
		}
		for what, change := range map[string]attempt{
			"another label": patch(client, map[string]any{"labels": map[string]any{w.prefix + "/injected": "no"}}),
			"no role":       patch(client, map[string]any{"annotations": map[string]any{w.prefix + "/role": nil}}),
			"no label":      patch(client, map[string]any{"labels": map[string]any{w.prefix + "/injected": nil}}),
		} {
			if err := refusedBy("credence-fixed-keys", change(t.Context(), pod)); err != nil {
				t.Errorf("5,001 %s: %s: %v", name, what, err)
			}
		}
		for what, change := range map[string]attempt{
			"an update by the node": patch(node, map[string]any{}, "status"),
			"an annotation":         merge("example.com/x"),
		} {
			if err := change(t.Context(), pod); err != nil {
				t.Errorf("5,001 %s: %s: %v", name, what, err)
			}
		}
		w.unchanged(t, pod)
	}
	for _, key := range documented(t) {
		if err := refusedBy("credence-injected", try(t, namespace, w.pod(annotate(w.prefix+"/"+key, "x"), many(annotate)))); err != nil {
			t.Errorf("5,001 annotations, and %s, without a sidecar: %v", key, err)
		}
	}
	create(t, namespace, w.pod(many(annotate), annotate(w.prefix+"/service-account", "default"), annotate(w.prefix+"/warnings", "x")))
}
