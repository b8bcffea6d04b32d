package inject_test

import (
	"encoding/json"
	"testing"

	"github.com/credence-iam/credence/webhook/inject"
)

// FuzzInject: whatever bytes arrive, a refusal comes without a patch; and a patch applies, adds only
// what it may, and is not needed twice.
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
				t.Errorf("the refusal %q came with a patch", err)
			}
			return
		}
		// The API server encodes each key once, which a fuzzer does not: of keys that come twice, a
		// decoder and a patch may mean different ones.
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
			t.Errorf("injecting again: %v, %v", again.Patch, err)
		}
	})
}
