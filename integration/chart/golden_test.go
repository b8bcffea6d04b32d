//go:build unix

package chart_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/chart"
)

// TestGolden compares the objects of each kind of installation with a golden file, so that a change of the chart shows its
// effect. Kubernetes and cert-manager have all their fields.
func TestGolden(t *testing.T) {
	t.Parallel()
	for name, values := range cases(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := render(t, name)
			if _, err := chart.Decode(got); err != nil {
				t.Error(err)
			}
			golden(t, strings.TrimSuffix(values, valuesEnding)+goldenEnding, got)
		})
	}
	goldens, err := filepath.Glob("testdata/*" + goldenEnding)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range goldens {
		if _, ok := cases(t)[strings.TrimSuffix(filepath.Base(file), goldenEnding)]; !ok {
			t.Errorf("%s has no file of values", file)
		}
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(string(got), "\n")); diff != "" {
		t.Errorf("%s (- want, + got; -update accepts it):\n%s", file, diff)
	}
}

// TestNotes shows that the notes name what was installed.
func TestNotes(t *testing.T) {
	t.Parallel()
	for name, want := range map[string][]string{
		"defaults":   {"namespace credence.", "No aws.region is set", "iam.amazonaws.com/inject=enabled", "describe certificate"},
		"secrets":    {"iam.amazonaws.com/permitted="},
		"everything": {"aws.example.com/inject=enabled", "aws.example.com/role: NAME"},
	} {
		notes, err := chart.Notes(t.Context(), chart.Config{Helm: helm, ValueFiles: []string{cases(t)[name]}})
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range want {
			if !strings.Contains(notes, text) {
				t.Errorf("%s: the notes do not have %q:\n%s", name, text, notes)
			}
		}
		if name == "secrets" && strings.Contains(notes, "cert-manager") {
			t.Errorf("the notes name cert-manager, which is not used:\n%s", notes)
		}
		if lines := strings.Count(notes, "\n"); lines > 30 {
			t.Errorf("%s: the notes have %d lines, want at most 30", name, lines)
		}
	}
}

// TestEverythingIsSet shows that the case "everything" sets each value to something else than its default. So a value that
// no template uses shows in a review of the golden file.
func TestEverythingIsSet(t *testing.T) {
	t.Parallel()
	defaults, set := leaves(t, "../../charts/credence/values.yaml"), leaves(t, cases(t)["everything"])
	for key, value := range defaults {
		got, ok := set[key]
		if !ok {
			t.Errorf("%s is not set", key)
		} else if cmp.Equal(got, value) {
			t.Errorf("%s has its default, %v", key, value)
		}
	}
}

// leaves returns the values of a file by their dotted keys. An empty map is a value, and so is a map whose keys the chart
// does not define.
func leaves(t *testing.T, file string) map[string]any {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var tree map[string]any
	if err := yaml.UnmarshalStrict(text, &tree); err != nil {
		t.Fatal(err)
	}
	if len(tree) == 0 {
		t.Fatalf("%s has no values", file)
	}
	all := map[string]any{}
	var walk func(prefix string, tree map[string]any)
	walk = func(prefix string, tree map[string]any) {
		for key, value := range tree {
			key = strings.TrimPrefix(prefix+"."+key, ".")
			if below, ok := value.(map[string]any); ok && len(below) > 0 && !free(key) {
				walk(key, below)
			} else {
				all[key] = value
			}
		}
	}
	walk("", tree)
	return all
}

// free reports whether the chart does not define the keys of that value: types of Kubernetes, and the rules file.
func free(key string) bool {
	last := key[strings.LastIndexByte(key, '.')+1:]
	return slices.Contains([]string{"annotations", "labels", "resources", "podAnnotations", "podLabels", "nodeSelector", "affinity", "rules"}, last)
}
