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

// TestGolden: a change of the chart shows what it changes, in each kind of installation, and all of it is what
// Kubernetes and cert-manager know, to the last field.
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
			t.Errorf("%s has no values beside it: nothing is compared with it", file)
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
		t.Errorf("%s (- want, + got; -update takes it as right):\n%s", file, diff)
	}
}

// TestNotes: what the user is told names what was installed.
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
				t.Errorf("%s: the notes do not say %q:\n%s", name, text, notes)
			}
		}
		if name == "secrets" && strings.Contains(notes, "cert-manager") {
			t.Errorf("the notes send to cert-manager, which is not used:\n%s", notes)
		}
		if lines := strings.Count(notes, "\n"); lines > 30 {
			t.Errorf("%s: the notes have %d lines: nobody reads them", name, lines)
		}
	}
}

// TestEverythingIsSet: the case that sets every value does, and gives none its default, so that a value which
// no template uses, or uses wrongly, shows.
func TestEverythingIsSet(t *testing.T) {
	t.Parallel()
	defaults, set := leaves(t, "../../charts/credence/values.yaml"), leaves(t, cases(t)["everything"])
	for key, value := range defaults {
		got, ok := set[key]
		if !ok {
			t.Errorf("it does not set %s", key)
		} else if cmp.Equal(got, value) {
			t.Errorf("it sets %s to its default, %v", key, value)
		}
	}
}

// leaves returns the values of a file by their dotted keys. A map without entries is a value too, and so is
// what a user writes freely.
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

// free reports whether the value of that key is Kubernetes' own, or the rules file, with keys that are not the
// chart's.
func free(key string) bool {
	last := key[strings.LastIndexByte(key, '.')+1:]
	return slices.Contains([]string{"annotations", "labels", "resources", "podAnnotations", "podLabels", "nodeSelector", "affinity", "rules"}, last)
}
