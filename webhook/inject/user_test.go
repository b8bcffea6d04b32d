package inject_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"testing"

	"github.com/credence-iam/credence/webhook/inject"
)

// TestSidecarUser: the sidecar runs as the common user of all containers, else as the user of the settings.
func TestSidecarUser(t *testing.T) {
	container := func(name string, user any) map[string]any {
		c := map[string]any{"name": name, "image": "i"}
		if user != nil {
			c["securityContext"] = map[string]any{"runAsUser": user}
		}
		return c
	}
	for name, tt := range map[string]struct {
		pod        any
		containers []any // users of a container and an init container
		settings   int64 // 0: the default
		want       any
	}{
		"no user":                 {nil, []any{nil, nil}, 0, "65532"},
		"one of two":              {nil, []any{1000, nil}, 0, "65532"},
		"the pod":                 {1000, []any{nil, nil}, 0, "1000"},
		"each container":          {nil, []any{1000, 1000}, 0, "1000"},
		"the pod, one the same":   {1000, []any{1000, nil}, 0, "1000"},
		"the pod, one another":    {1000, []any{nil, 2000}, 0, "65532"},
		"all differ from the pod": {1000, []any{2000, 2000}, 0, "2000"},
		"root":                    {0, []any{nil, nil}, 0, "65532"},
		"the pod's is root":       {0, []any{1000, 1000}, 0, "1000"},
		"one is root":             {1000, []any{nil, 0}, 0, "65532"},
		"the other is root":       {1000, []any{0, nil}, 0, "65532"},
		"not a user ID":           {1 << 31, []any{nil, nil}, 0, "65532"},
		"the platform":            {1000, []any{nil, nil}, inject.PlatformUser, nil},
		"the settings":            {nil, []any{nil, nil}, 70000, "70000"},
		"pod before settings":     {1000, []any{nil, nil}, 70000, "1000"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := map[string]any{
				"containers":     []any{container("c", tt.containers[0])},
				"initContainers": []any{container("i", tt.containers[1])},
			}
			if tt.pod != nil {
				spec["securityContext"] = map[string]any{"runAsUser": tt.pod}
			}
			raw, err := json.Marshal(map[string]any{
				"metadata": map[string]any{"annotations": map[string]any{"iam.amazonaws.com/role": "reader"}}, "spec": spec,
			})
			if err != nil {
				t.Fatal(err)
			}
			i := newInjector(t, func(c *inject.Config) {
				if tt.settings != 0 {
					c.Settings.RunAsUser = tt.settings
				}
			})
			result, err := i.Inject(raw, namespace)
			if err != nil {
				t.Fatal(err)
			}
			once := apply(t, raw, result.Patch)
			context := at(named(t, decode(t, once), "initContainers", "credence-sidecar"), "securityContext")
			got, set := context.(map[string]any)["runAsUser"]
			if set {
				got = fmt.Sprint(got)
			}
			if got != tt.want {
				t.Errorf("sidecar runs as %v, want %v", got, tt.want)
			}
			// A second call does not change the user of the sidecar, even if the containers have another.
			again, err := i.Inject(once, namespace)
			if err != nil || again.Patch != nil {
				t.Errorf("second injection adds %v (%v)", again.Patch, err)
			}
			if !reflect.DeepEqual(decode(t, once), decode(t, apply(t, once, again.Patch))) {
				t.Error("second injection changes the pod")
			}
		})
	}
}
