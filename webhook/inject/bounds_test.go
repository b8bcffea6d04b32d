package inject_test

import (
	"encoding/json"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
)

// TestVariableSetTwice: of variables of the same name the last counts, as it does to the kubelet.
func TestVariableSetTwice(t *testing.T) {
	const (
		set   = `{"name":"AWS_WEB_IDENTITY_TOKEN_FILE","value":"/token"}`
		empty = `{"name":"AWS_WEB_IDENTITY_TOKEN_FILE","value":""}`
	)
	for name, tc := range map[string]struct {
		env     string
		refused bool
	}{
		"set last":   {empty + `,` + set, true},
		"empty last": {set + `,` + empty, false},
	} {
		t.Run(name, func(t *testing.T) {
			raw := `{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app","env":[` + tc.env + `]}]}}`
			result, err := newInjector(t).Inject([]byte(raw), namespace)
			if refused := credential.ReasonOf(err) == credential.ReasonShadowed; refused != tc.refused || !refused && err != nil {
				t.Errorf("refused: %v, want %v (%v)", refused, tc.refused, err)
			}
			if (result.Patch == nil) != tc.refused {
				t.Errorf("the patch is %v", result.Patch)
			}
		})
	}
}

// sidecarOf injects a pod of one container with resources, in a spec that begins with fields, and returns the sidecar.
func sidecarOf(t *testing.T, fields, resources string) corev1.Container {
	t.Helper()
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{` + fields + `"containers":[{"name":"app","resources":` + resources + `}]}}`)
	result, err := newInjector(t).Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(apply(t, raw, result.Patch), &pod); err != nil {
		t.Fatal(err)
	}
	if len(pod.Spec.InitContainers) != 1 {
		t.Fatalf("there are %d init containers", len(pod.Spec.InitContainers))
	}
	return pod.Spec.InitContainers[0]
}

// TestLimitOfZero: a limit of 0 limits nothing, so that Kubernetes does not take the pod for Guaranteed.
func TestLimitOfZero(t *testing.T) {
	for resources, want := range map[string]string{
		`{"limits":{"cpu":"0","memory":"1Gi"}}`:                                   "5m",
		`{"limits":{"cpu":"1","memory":"0"}}`:                                     "5m",
		`{"limits":{"cpu":"0","memory":"0"},"requests":{"cpu":"0","memory":"0"}}`: "5m",
		`{"limits":{"cpu":"1","memory":"1Gi"}}`:                                   "50m",
	} {
		requests := sidecarOf(t, "", resources).Resources.Requests
		if got := requests.Cpu().String(); got != want {
			t.Errorf("beside %s the sidecar requests %s of CPU, want %s", resources, got, want)
		}
	}
}

// TestPodLevelResources: of what the pod as a whole declares, by request or by limit, the sidecar declares nothing.
func TestPodLevelResources(t *testing.T) {
	for whole, want := range map[string]string{
		`{"requests":{"cpu":"1"}}`:                           `{"limits":{"memory":"16Mi"},"requests":{"memory":"16Mi"}}`,
		`{"requests":{"memory":"1Gi"}}`:                      `{"limits":{"cpu":"100m"},"requests":{"cpu":"5m"}}`,
		`{"limits":{"cpu":"1"}}`:                             `{"limits":{"memory":"16Mi"},"requests":{"memory":"16Mi"}}`,
		`{"requests":{"cpu":"1"},"limits":{"memory":"1Gi"}}`: `{}`,
		`{}`: `{"limits":{"cpu":"100m","memory":"16Mi"},"requests":{"cpu":"5m","memory":"16Mi"}}`,
	} {
		got, err := json.Marshal(sidecarOf(t, `"resources":`+whole+`,`, `{}`).Resources)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("in a pod with %s the sidecar has %s, want %s", whole, got, want)
		}
	}
}
