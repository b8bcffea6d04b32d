// Package programtest tells the tests of the programs how the Helm chart runs them.
//
// It reads what the chart's own test holds equal to what the chart renders, so that a flag which a program
// loses, or takes no longer in this form, fails that program's test. It runs neither Helm nor a program.
package programtest

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"
)

// rendered are the files, seen from the folder of a program.
const rendered = "../../integration/chart/testdata/*.golden.yaml"

// ChartArguments returns the arguments that the chart passes to a component, by the file that they stand in: one
// for each kind of installation. References to POD_NAMESPACE are replaced as a kubelet would.
func ChartArguments(t *testing.T, component string) map[string][]string {
	t.Helper()
	files, err := filepath.Glob(rendered)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no file is called %s", rendered)
	}
	all := map[string][]string{}
	for _, file := range files {
		text, err := os.ReadFile(file) //nolint:gosec // one of the files above
		if err != nil {
			t.Fatal(err)
		}
		for document := range bytes.SplitSeq(text, []byte("\n---\n")) {
			var d appsv1.Deployment
			if err := yaml.Unmarshal(document, &d); err != nil || d.Kind != "Deployment" || d.Name != "credence-"+component {
				continue // of another type, whose fields may not fit this one
			}
			container := d.Spec.Template.Spec.Containers[0]
			if len(container.Command) != 1 || container.Command[0] != "/credence-"+component {
				t.Errorf("%s: the %s's command is %q, its image has /credence-%s", file, component, container.Command, component)
			}
			for _, arg := range container.Args {
				all[file] = append(all[file], strings.ReplaceAll(arg, "$(POD_NAMESPACE)", "credence"))
			}
		}
		if len(all[file]) == 0 {
			t.Errorf("%s passes no arguments to the %s", file, component)
		}
	}
	return all
}
