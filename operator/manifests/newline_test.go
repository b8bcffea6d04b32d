package manifests_test

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	kubeyaml "k8s.io/apimachinery/pkg/util/yaml"
)

// unterminated has pods without a last newline that end in a block scalar, in all of its forms.
func unterminated() (texts []string) {
	befores := []string{"", "\ufeff", "a: b\n---\n", "# first\n"}
	for _, header := range []string{"|", "|-", "|+", ">", ">-", ">+", "|2", "| # said"} {
		for i, last := range []string{"echo hi", "echo hi\n\n          more", "echo hi\n", "echo hi\n\n", "echo hi\n          ", "echo hi\n...", "echo hi\n---", "echo hi\n# last"} {
			text := befores[i%len(befores)] + "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  annotations:\n    iam.amazonaws.com/role: r\n" +
				"spec:\n  containers:\n    - name: app\n      args:\n        - " + header + "\n          " + last
			texts = append(texts, text, strings.ReplaceAll(text, "\n", "\r\n"))
		}
	}
	return texts
}

// TestUnterminated: a file without its last newline keeps its lines. For kubectl its value is the same, except for the
// additions.
func TestUnterminated(t *testing.T) {
	for _, text := range unterminated() {
		out, said := must(t, text)
		if strings.Contains(said, "rewritten") {
			t.Errorf("%q is rewritten", text)
		}
		before, after := argument(t, text), argument(t, out)
		if before != after {
			t.Errorf("%q has the argument %q, and afterwards %q", text, before, after)
		}
		rest := out
		for line := range strings.SplitSeq(text, "\n") {
			_, behind, found := strings.Cut(rest, strings.TrimSuffix(line, "\r"))
			if !found {
				t.Fatalf("line %q of %q is lost in\n%s", line, text, out)
			}
			rest = behind
		}
		if strings.Contains(text, "\r") && strings.Count(out, "\r\n") != strings.Count(out, "\n") {
			t.Errorf("%q: line breaks differ:\n%q", text, out)
		}
	}
	// Each call of patch starts a process.
	for _, text := range unterminated()[:8] {
		out, _ := must(t, text)
		diff, _, err := run(t, text, withDiff)
		if err != nil {
			t.Fatal(err)
		}
		if got := patch(t, text, diff); got != out {
			t.Errorf("the difference has another result (-written +patched):\n%s", cmp.Diff(out, got))
		}
	}
}

// argument returns the first argument of the first container of the pod in text, as kubectl reads it.
func argument(t *testing.T, text string) string {
	t.Helper()
	decoder := kubeyaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096)
	for {
		var pod struct {
			Spec struct {
				Containers []struct {
					Args []string `json:"args"`
				} `json:"containers"`
			} `json:"spec"`
		}
		if err := decoder.Decode(&pod); errors.Is(err, io.EOF) {
			t.Fatalf("no pod in %q", text)
		} else if err != nil {
			t.Fatalf("%v in %q", err, text)
		}
		if len(pod.Spec.Containers) > 0 {
			return pod.Spec.Containers[0].Args[0]
		}
	}
}
