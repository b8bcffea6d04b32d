package inject_test

import (
	"encoding/json"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/credential"
)

// TestVariableSetTwice: the last variable with a name applies, as in the kubelet.
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
				t.Errorf("refused: %v, want %v (error %v)", refused, tc.refused, err)
			}
			if (result.Patch == nil) != tc.refused {
				t.Errorf("patch is %v, want one: %v", result.Patch, !tc.refused)
			}
		})
	}
}

// sidecarOf injects a pod with one container with resources, and returns the sidecar. fields starts the pod's spec.
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
		t.Fatalf("pod has %d init containers, want 1", len(pod.Spec.InitContainers))
	}
	return pod.Spec.InitContainers[0]
}

// TestLimitOfZero: a limit of 0 is no limit, so the pod is not Guaranteed.
func TestLimitOfZero(t *testing.T) {
	for resources, want := range map[string]string{
		`{"limits":{"cpu":"0","memory":"1Gi"}}`:                                   "5m",
		`{"limits":{"cpu":"1","memory":"0"}}`:                                     "5m",
		`{"limits":{"cpu":"0","memory":"0"},"requests":{"cpu":"0","memory":"0"}}`: "5m",
		`{"limits":{"cpu":"1","memory":"1Gi"}}`:                                   "50m",
	} {
		requests := sidecarOf(t, "", resources).Resources.Requests
		if got := requests.Cpu().String(); got != want {
			t.Errorf("with container resources %s, the sidecar requests %s of CPU, want %s", resources, got, want)
		}
	}
}

// TestPodLevelResources: the sidecar declares no resource that the pod declares as a whole, by request or by limit.
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
			t.Errorf("with pod resources %s, the sidecar has %s, want %s", whole, got, want)
		}
	}
}
