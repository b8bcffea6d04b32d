package inject_test

import (
	"encoding/json"
	"testing"

	"github.com/credence-iam/credence/webhook/inject"
)

// FuzzInject: for any bytes, a refusal has no patch. A patch applies, adds only what injection may add, and makes a second
// one unnecessary.
func FuzzInject(f *testing.F) {
	for _, file := range golden(f) {
		f.Add(readYAML(f, file))
	}
	f.Add([]byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[null]}}`))
	f.Add([]byte(`null`))
	i := newInjector(f, func(c *inject.Config) {
		c.Settings.ImagePullSecrets, c.Settings.PodAnnotations = []string{"ours", "registry"}, map[string]string{"sidecar.example/ports": "9443"}
	})
	f.Fuzz(func(t *testing.T, raw []byte) {
		result, err := i.Inject(raw, namespace)
		if err != nil {
			if result.Patch != nil {
				t.Errorf("refusal %q has a patch", err)
			}
			return
		}
		// The API server writes each key once, but a fuzzer may repeat keys. A decoder and a patch may then use different
		// ones.
		canonical, err := json.Marshal(decode(t, raw))
		if err != nil {
			t.Fatal(err)
		}
		if result, err = i.Inject(canonical, namespace); err != nil {
			return
		}
		patched := apply(t, canonical, result.Patch)
		if err := embedded("", decode(t, canonical), decode(t, patched)); err != nil {
			t.Errorf("%v: %s", err, canonical)
		}
		if again, err := i.Inject(patched, namespace); err != nil || again.Patch != nil {
			t.Errorf("second injection adds %v (%v)", again.Patch, err)
		}
	})
}
