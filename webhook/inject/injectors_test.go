package inject_test

import (
	"encoding/json"
	"reflect"
	"slices"
	"testing"
)

// TestOtherInjectors: the result is the same whether another injector, as in testdata, is called before or after this
// webhook. If it is called after, it puts its init containers before the sidecar, and may change the sidecar.
func TestOtherInjectors(t *testing.T) {
	i := newInjector(t)
	inject := func(t *testing.T, pod any) any {
		t.Helper()
		raw, err := json.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		result, err := i.Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		return decode(t, apply(t, raw, result.Patch))
	}
	for _, name := range []string{"istio-native", "istio-classic", "vault-agent", "linkerd", "dapr"} {
		t.Run(name, func(t *testing.T) {
			theirs := decode(t, readYAML(t, "testdata/"+name+".in.yaml"))
			before := inject(t, theirs)

			// Inject the user's part of the pod, then add the parts of the other injector.
			pod := decode(t, readYAML(t, "testdata/"+name+".in.yaml"))
			spec := at(pod, "spec").(map[string]any)
			isApp := func(c any) bool { return at(c, "name") == "app" }
			containers := spec["containers"].([]any)
			initial, _ := spec["initContainers"].([]any)
			volumes, _ := spec["volumes"].([]any)
			own := slices.IndexFunc(containers, isApp)
			spec["containers"] = []any{containers[own]}
			delete(spec, "initContainers")
			delete(spec, "volumes")
			pod = inject(t, pod)
			spec = at(pod, "spec").(map[string]any)
			injectedApp := spec["containers"].([]any)[0]
			containers = slices.Clone(containers)
			containers[own] = injectedApp
			spec["containers"] = containers
			spec["initContainers"] = append(slices.Clone(initial), spec["initContainers"].([]any)...)
			spec["volumes"] = append(slices.Clone(volumes), spec["volumes"].([]any)...)
			sidecar := at(pod, "spec", "initContainers", len(initial)).(map[string]any)
			// Some injectors mount volumes and set variables in every container.
			sidecar["volumeMounts"] = append(sidecar["volumeMounts"].([]any), map[string]any{"name": "theirs", "mountPath": "/theirs"})
			sidecar["env"] = append(sidecar["env"].([]any), map[string]any{"name": "THEIR_PORT", "value": "3500"})
			after := inject(t, pod)
			if again := inject(t, after); !reflect.DeepEqual(after, again) {
				t.Error("second injection changes the pod")
			}

			sidecar = at(after, "spec", "initContainers", len(initial)).(map[string]any)
			sidecar["volumeMounts"] = sidecar["volumeMounts"].([]any)[:1]
			sidecar["env"] = slices.DeleteFunc(sidecar["env"].([]any), func(v any) bool { return at(v, "name") == "THEIR_PORT" })
			byName(before)
			byName(after)
			if !reflect.DeepEqual(before, after) {
				t.Errorf("called before the webhook:\n%v\nafter it:\n%v", before, after)
			}
		})
	}
}

// TestWebIdentityAddedLater: EKS's webhook, called after this one, gives each container an identity that SDKs prefer to the
// annotated role. The second call refuses the pod, as the first would have. It keeps the sidecar, which has the identity,
// too.
func TestWebIdentityAddedLater(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app"}]}}`)
	i := newInjector(t)
	result, err := i.Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	webIdentity := func(pod any, path ...any) {
		c := at(pod, path...).(map[string]any)
		env, _ := c["env"].([]any)
		c["env"] = append(env, map[string]any{"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": "/var/run/secrets/eks.amazonaws.com/serviceaccount/token"})
		mounts, _ := c["volumeMounts"].([]any)
		c["volumeMounts"] = append(mounts, map[string]any{"name": "aws-iam-token", "mountPath": "/var/run/secrets/eks.amazonaws.com/serviceaccount"})
	}
	again := func(paths ...[]any) (int, error) {
		pod := decode(t, apply(t, raw, result.Patch))
		for _, path := range paths {
			webIdentity(pod, path...)
		}
		text, err := json.Marshal(pod)
		if err != nil {
			t.Fatal(err)
		}
		got, err := i.Inject(text, namespace)
		return len(got.Patch), err
	}
	if n, err := again([]any{"spec", "initContainers", 0}); err != nil || n > 0 {
		t.Errorf("web identity only in the sidecar: %d operations, error %v, want none", n, err)
	}
	if _, err := again([]any{"spec", "initContainers", 0}, []any{"spec", "containers", 0}); err == nil {
		t.Error("web identity in all containers: Inject accepts the pod")
	}
}
