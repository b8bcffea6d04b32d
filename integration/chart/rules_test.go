//go:build unix

package chart_test

import (
	"encoding/json"
	"maps"
	"os"
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/integration/chart"
)

// TestRules: the chart's rules reach both programs as a file that they take, and are told from where.
func TestRules(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		all := objects(t, name)
		files := slices.DeleteFunc(chart.Of[*corev1.ConfigMap](all), func(c *corev1.ConfigMap) bool { return c.Name != "credence-rules" })
		if len(files) == 0 {
			if name == "everything" {
				t.Error("there is no ConfigMap for the rules that are set")
			}
			continue
		}
		file, err := rulesfile.Parse([]byte(files[0].Data["rules.yaml"]))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		// Every field is set there, so that one which the schema does not know shows.
		for _, v := range []reflect.Value{reflect.ValueOf(file), reflect.ValueOf(file.Namespaces[0])} {
			for i := range v.NumField() {
				if v.Field(i).IsZero() {
					t.Errorf("%s: %s is not set", name, v.Type().Field(i).Name)
				}
			}
		}
		for _, component := range []string{"broker", "webhook"} {
			pod := deployment(t, all, component).Spec.Template.Spec
			at := slices.IndexFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/etc/credence/rules" })
			if at < 0 || pod.Containers[0].VolumeMounts[at].SubPath != "" || !pod.Containers[0].VolumeMounts[at].ReadOnly {
				t.Errorf("%s: the %s does not mount the rules as a folder, which is what kubelets keep up to date", name, component)
				continue
			}
			volume := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == pod.Containers[0].VolumeMounts[at].Name })
			if volume < 0 || pod.Volumes[volume].ConfigMap == nil || pod.Volumes[volume].ConfigMap.Name != files[0].Name {
				t.Errorf("%s: the %s mounts something else as rules", name, component)
			}
			if !slices.Contains(pod.Containers[0].Args, "--rules-file=/etc/credence/rules/rules.yaml") {
				t.Errorf("%s: the %s is not told where the rules are", name, component)
			}
		}
	}
}

// TestRulesSchema: the schema knows the fields that the programs know, and no others.
func TestRulesSchema(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	var schema struct {
		Definitions map[string]struct {
			AdditionalProperties any            `json:"additionalProperties"`
			Properties           map[string]any `json:"properties"`
		} `json:"definitions"`
	}
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	for definition, typ := range map[string]reflect.Type{"rules": reflect.TypeFor[policy.File](), "namespaceRules": reflect.TypeFor[policy.NamespaceRules]()} {
		var want []string
		for field := range typ.Fields() {
			want = append(want, field.Tag.Get("json"))
		}
		slices.Sort(want)
		if diff := cmp.Diff(want, slices.Sorted(maps.Keys(schema.Definitions[definition].Properties))); diff != "" {
			t.Errorf("%s (- the programs, + the schema):\n%s", definition, diff)
		}
		if schema.Definitions[definition].AdditionalProperties != false {
			t.Errorf("%s takes fields that it does not know", definition)
		}
	}
}
