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

// TestGolden compares the objects of each kind of installation, and the notes that Helm prints, with golden files, so that
// a change of the chart shows its effect. Kubernetes and cert-manager have all fields of the objects.
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
			notes, err := chart.Notes(t.Context(), chart.Config{Helm: helm, ValueFiles: []string{values}})
			if err != nil {
				t.Fatal(err)
			}
			golden(t, strings.TrimSuffix(values, valuesEnding)+notesEnding, []byte(notes))
		})
	}
	for _, ending := range []string{goldenEnding, notesEnding} {
		goldens, err := filepath.Glob("testdata/*" + ending)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range goldens {
			if _, ok := cases(t)[strings.TrimSuffix(filepath.Base(file), ending)]; !ok {
				t.Errorf("%s has no file of values", file)
			}
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

// elsewhere has the values that another case than "everything" sets, because they hide the effect of other values.
var elsewhere = map[string]string{
	"broker.podDisruptionBudget.enabled": "platform",
	"webhook.serviceAccount.create":      "platform",
	"metrics.podMonitor.enabled":         "platform",
}

// TestEverythingIsSet shows that the case "everything" sets each value to something else than its default. So a value that
// no template uses shows in a review of the golden file.
func TestEverythingIsSet(t *testing.T) {
	t.Parallel()
	defaults, set := leaves(t, "../../charts/credence/values.yaml"), leaves(t, cases(t)["everything"])
	for key, value := range defaults {
		got, ok := set[key]
		if other := elsewhere[key]; other != "" {
			got, ok = leaves(t, cases(t)[other])[key]
		}
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
	return slices.Contains([]string{"annotations", "labels", "alertLabels", "alerts", "resources", "podAnnotations", "podLabels", "nodeSelector", "affinity", "rules",
		"commonLabels", "deploymentAnnotations", "configurationAnnotations", "podSecurityContext", "dnsConfig"}, last)
}
