// Package programtest gives the tests of the programs the arguments of the Helm chart, and an HTTP proxy.
//
// It reads golden files that the chart's test compares with the rendered chart. So if a program removes a flag or changes
// its format, that program's test fails. It runs neither Helm nor a program.
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

// rendered matches the golden files, from the folder of a program.
const rendered = "../../integration/chart/testdata/*.golden.yaml"

// ChartArguments returns the arguments that the chart passes to a component, by golden file. There is one file for each
// kind of installation. It replaces references to POD_NAMESPACE, as the kubelet does.
func ChartArguments(t *testing.T, component string) map[string][]string {
	t.Helper()
	files, err := filepath.Glob(rendered)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no file matches %s", rendered)
	}
	all := map[string][]string{}
	for _, file := range files {
		text, err := os.ReadFile(file) //nolint:gosec // It is one of the files above.
		if err != nil {
			t.Fatal(err)
		}
		for document := range bytes.SplitSeq(text, []byte("\n---\n")) {
			var d appsv1.Deployment
			if err := yaml.Unmarshal(document, &d); err != nil || d.Kind != "Deployment" || d.Name != "credence-"+component {
				continue // of another type, which may not parse as this one
			}
			container := d.Spec.Template.Spec.Containers[0]
			if len(container.Command) != 1 || container.Command[0] != "/credence-"+component {
				t.Errorf("%s: the command of the %s is %q, but its image has /credence-%s", file, component, container.Command, component)
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
