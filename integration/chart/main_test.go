//go:build unix

package chart_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/tools"
)

var update = flag.Bool("update", false, "update the golden files and the table of values")

var helm string

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() && !tools.Built(tools.Helm) {
		fmt.Println("SKIP: -short, and helm would have to be built first (go run ./integration/tools/install helm)")
		return
	}
	var err error
	if helm, err = tools.Path(context.Background(), tools.Helm, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const valuesEnding, goldenEnding, notesEnding = ".values.yaml", ".golden.yaml", ".notes.txt"

// cases returns the files of values in testdata, by their names without ending.
func cases(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("testdata/*" + valuesEnding)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 5 {
		t.Fatalf("testdata has values for %d installations, want at least 5", len(files))
	}
	byName := map[string]string{}
	for _, file := range files {
		byName[strings.TrimSuffix(filepath.Base(file), valuesEnding)] = file
	}
	return byName
}

// render renders the chart with the values of a case.
func render(t *testing.T, name string) []byte {
	t.Helper()
	rendered, err := chart.Render(t.Context(), chart.Config{Helm: helm, ValueFiles: []string{cases(t)[name]}})
	if err != nil {
		t.Fatal(err)
	}
	return rendered
}

// objects renders the chart with the values of a case, and decodes the result.
func objects(t *testing.T, name string) []runtime.Object {
	t.Helper()
	all, err := chart.Decode(render(t, name))
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("the chart renders nothing")
	}
	return all
}

// deployments returns the Deployments of the broker and the webhook.
func deployments(t *testing.T, all []runtime.Object) []*appsv1.Deployment {
	t.Helper()
	found := deploymentsOf(all)
	if len(found) != 2 {
		t.Fatalf("there are %d Deployments, want those of broker and webhook", len(found))
	}
	return found
}

func deploymentsOf(all []runtime.Object) []*appsv1.Deployment {
	return chart.Of[*appsv1.Deployment](all)
}

// deployment returns the Deployment of a component.
func deployment(t *testing.T, all []runtime.Object, component string) *appsv1.Deployment {
	t.Helper()
	found := deployments(t, all)
	at := slices.IndexFunc(found, func(d *appsv1.Deployment) bool { return d.Name == "credence-"+component })
	if at < 0 {
		t.Fatalf("there is no Deployment credence-%s", component)
	}
	return found[at]
}

// configMaps returns the ConfigMaps with that name.
func configMaps(all []runtime.Object, name string) []*corev1.ConfigMap {
	return slices.DeleteFunc(chart.Of[*corev1.ConfigMap](all), func(c *corev1.ConfigMap) bool { return c.Name != name })
}

// jsonNames returns the JSON names of a struct's fields, except those in but.
func jsonNames(typ reflect.Type, but ...string) (names []string) {
	for field := range typ.Fields() {
		if name := field.Tag.Get("json"); !slices.Contains(but, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
