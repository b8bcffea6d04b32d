//go:build unix

package chart_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/managedfields"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/kube-openapi/pkg/validation/spec"

	"github.com/credence-iam/credence/integration/chart"
)

// kubernetesVersions are the oldest and the newest version that the chart supports. Each is a version of the module
// k8s.io/kubernetes, which has the API's description.
var kubernetesVersions = []string{"v1.30.14", "v1.37.2"}

// TestKubernetesVersions shows that the API of the oldest and the newest Kubernetes has all fields of the objects, with
// these types. The types of Decode are those of the newest version only.
func TestKubernetesVersions(t *testing.T) {
	if testing.Short() {
		t.Skip("not run: -short was given, and this may download the sources of Kubernetes")
	}
	t.Parallel()
	// The newest version is that of the API in our programs, so an upgrade of that module is not forgotten here.
	modules, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if newest := strings.Replace(kubernetesVersions[1], "v1.", "v0.", 1); !strings.Contains(string(modules), "\tk8s.io/api "+newest+"\n") {
		t.Errorf("go.mod does not require k8s.io/api %s", newest)
	}
	_, err = chart.Render(t.Context(), chart.Config{Helm: helm, KubeVersion: "v1.29.15"})
	if err == nil || !strings.HasPrefix(kubernetesVersions[0], "v1.30.") {
		t.Errorf("%v does not begin with the oldest version that the chart accepts: %v", kubernetesVersions, err)
	}
	for _, version := range kubernetesVersions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			api := kubernetesAPI(t, version)
			// The check itself must find faults.
			for name, object := range map[string]string{
				"an unknown field": `{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"},"spec":{"clusterIp":"None"}}`,
				"another type":     `{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"a"},"spec":{"replicas":"2"}}`,
				"a repeated port":  `{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"},"spec":{"ports":[{"port":1,"protocol":"TCP"},{"port":1,"protocol":"TCP"}]}}`,
				"an unknown kind":  `{"apiVersion":"v1","kind":"Sidecar","metadata":{"name":"a"}}`,
			} {
				var o unstructured.Unstructured
				if err := json.Unmarshal([]byte(object), &o.Object); err != nil {
					t.Fatal(err)
				}
				if err := fits(api, &o); err == nil {
					t.Errorf("an object with %s passes", name)
				}
			}
			for name, values := range cases(t) {
				checked := 0
				text, err := chart.Render(t.Context(), chart.Config{Helm: helm, KubeVersion: version, ValueFiles: []string{values}})
				if err != nil {
					t.Fatal(err)
				}
				decoder := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096)
				for {
					var o unstructured.Unstructured
					err := decoder.Decode(&o.Object)
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					switch group := o.GroupVersionKind().Group; group {
					case "cert-manager.io", "monitoring.coreos.com": // not part of Kubernetes
						continue
					}
					checked++
					if err := fits(api, &o); err != nil {
						t.Errorf("%s: %s %s: %v", name, o.GetKind(), o.GetName(), err)
					}
				}
				if checked < 20 {
					t.Errorf("%s: checked %d objects, want at least 20", name, checked)
				}
			}
		})
	}
}

// fits returns an error if the API has no such kind, or if a field has another type or does not exist. It is the check of
// server-side apply.
func fits(api managedfields.TypeConverter, o *unstructured.Unstructured) error {
	_, err := api.ObjectToTyped(o)
	return err
}

// kubernetesAPI returns the API of a version of Kubernetes. Its description is in the module of that version.
func kubernetesAPI(t *testing.T, version string) managedfields.TypeConverter {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", "k8s.io/kubernetes@"+version)
	cmd.Dir = t.TempDir() // outside of our module, which does not require that one
	out, err := cmd.Output()
	var module struct{ Dir, Error string }
	if jsonErr := json.Unmarshal(out, &module); err != nil || jsonErr != nil {
		t.Fatalf("downloading k8s.io/kubernetes@%s: %v %v %s", version, err, jsonErr, module.Error)
	}
	text, err := os.ReadFile(filepath.Join(module.Dir, "api", "openapi-spec", "swagger.json"))
	if err != nil {
		t.Fatal(err)
	}
	// The converter knows the references of OpenAPI 3 only.
	text = bytes.ReplaceAll(text, []byte(`"#/definitions/`), []byte(`"#/components/schemas/`))
	var document struct {
		Definitions map[string]*spec.Schema
	}
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	if len(document.Definitions) < 500 {
		t.Fatalf("the description of %s has %d types", version, len(document.Definitions))
	}
	api, err := managedfields.NewTypeConverter(document.Definitions, false)
	if err != nil {
		t.Fatal(err)
	}
	return api
}
