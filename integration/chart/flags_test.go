//go:build unix

package chart_test

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

// TestBothAreToldTheSame: broker and webhook judge alike only by the same settings. That each takes what it is
// told, its own test says.
func TestBothAreToldTheSame(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		all := objects(t, name)
		told := map[string]map[string]string{}
		for _, component := range []string{"broker", "webhook"} {
			told[component] = map[string]string{}
			for _, arg := range deployment(t, all, component).Spec.Template.Spec.Containers[0].Args {
				flag, value, ok := strings.Cut(arg, "=")
				if _, twice := told[component][flag]; twice || !ok {
					t.Errorf("%s: the %s is passed %s without a value or twice", name, component, flag)
				}
				told[component][flag] = value
			}
		}
		shared := 0
		for _, flag := range slices.Sorted(maps.Keys(told["webhook"])) {
			if value, ok := told["broker"][flag]; ok {
				shared++
				if value != told["webhook"][flag] {
					t.Errorf("%s: the broker is told %s=%s, the webhook %s", name, flag, value, told["webhook"][flag])
				}
			}
		}
		if shared < 5 {
			t.Errorf("%s: only %d flags are passed to both", name, shared)
		}
		for _, flag := range []string{"--annotation-prefix", "--audience", "--cluster-name", "--trust-config-map"} {
			if told["broker"][flag] == "" || told["webhook"][flag] == "" {
				t.Errorf("%s: %s is not passed to both", name, flag)
			}
		}
		if told["broker"]["--rules-file"] != told["webhook"]["--rules-file"] || (told["broker"]["--rules-file"] != "") != (name == "everything") {
			t.Errorf("%s: the broker is told the rules file %q, the webhook %q", name, told["broker"]["--rules-file"], told["webhook"]["--rules-file"])
		}
		if _, ok := told["broker"]["--base-arn"]; ok && told["webhook"]["--base-arn"] == "" {
			t.Errorf("%s: the webhook is not told the base ARN that the broker has", name)
		}
	}
}
