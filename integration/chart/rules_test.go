//go:build unix

package chart_test

import (
	"reflect"
	"testing"

	"github.com/credence-iam/credence/broker/rulesfile"
)

// TestRules shows that both programs get the chart's rules as a valid file.
func TestRules(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		all := objects(t, name)
		files := configMaps(all, "credence-rules")
		if len(files) == 0 {
			if name == "everything" {
				t.Error("there is no ConfigMap with the rules")
			}
			continue
		}
		file, err := rulesfile.Parse([]byte(files[0].Data["rules.yaml"]))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		// The case sets all fields, so a field that the schema does not have shows.
		for _, v := range []reflect.Value{reflect.ValueOf(file), reflect.ValueOf(file.Namespaces[0])} {
			for i := range v.NumField() {
				if v.Field(i).IsZero() {
					t.Errorf("%s: %s is not set", name, v.Type().Field(i).Name)
				}
			}
		}
		for _, component := range []string{"broker", "webhook"} {
			mustMount(t, name, deployment(t, all, component).Spec.Template.Spec, files[0].Name, "/etc/credence/rules", "--rules-file=/etc/credence/rules/rules.yaml")
		}
	}
}
