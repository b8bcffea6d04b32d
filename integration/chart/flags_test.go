//go:build unix

package chart_test

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

// TestSharedFlagsAreEqual shows that the broker and the webhook get equal values of their shared flags, so that they decide
// alike. The tests of the programs show that each accepts its flags.
func TestSharedFlagsAreEqual(t *testing.T) {
	t.Parallel()
	for name := range cases(t) {
		all := objects(t, name)
		flags := map[string]map[string]string{}
		for _, component := range []string{"broker", "webhook"} {
			flags[component] = map[string]string{}
			for _, arg := range deployment(t, all, component).Spec.Template.Spec.Containers[0].Args {
				flag, value, ok := strings.Cut(arg, "=")
				if _, twice := flags[component][flag]; twice || !ok {
					t.Errorf("%s: the %s gets %s without a value or twice", name, component, flag)
				}
				flags[component][flag] = value
			}
		}
		shared := 0
		for _, flag := range slices.Sorted(maps.Keys(flags["webhook"])) {
			if value, ok := flags["broker"][flag]; ok {
				shared++
				if value != flags["webhook"][flag] {
					t.Errorf("%s: the broker gets %s=%s, the webhook %s", name, flag, value, flags["webhook"][flag])
				}
			}
		}
		if shared < 5 {
			t.Errorf("%s: only %d flags are shared", name, shared)
		}
		for _, flag := range []string{"--annotation-prefix", "--audience", "--cluster-name", "--trust-config-map"} {
			if flags["broker"][flag] == "" || flags["webhook"][flag] == "" {
				t.Errorf("%s: not both programs get %s", name, flag)
			}
		}
		if flags["broker"]["--rules-file"] != flags["webhook"]["--rules-file"] || (flags["broker"]["--rules-file"] != "") != (name == "everything") {
			t.Errorf("%s: the broker gets the rules file %q, the webhook %q", name, flags["broker"]["--rules-file"], flags["webhook"]["--rules-file"])
		}
		if _, ok := flags["broker"]["--base-arn"]; ok && flags["webhook"]["--base-arn"] == "" {
			t.Errorf("%s: the webhook does not get the broker's base ARN", name)
		}
	}
}
