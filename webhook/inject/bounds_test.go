package inject_test

import (
	"encoding/json"
	"errors"
	"strings"
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

// TestCopiedSidecar: what a copied sidecar mounts, and what is in it, has to be where the sidecar looks for it.
func TestCopiedSidecar(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app"}]}}`)
	i := newInjector(t)
	result, err := i.Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	injected := string(apply(t, raw, result.Patch))
	const (
		mount    = `"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount"`
		unlike   = `it does not mount volume "credence-identity" at /var/run/secrets/kubernetes.io/serviceaccount`
		token    = `"path":"token"`
		noToken  = `the token in volume "credence-identity" differs`
		root     = `{"key":"roots.pem","path":"roots.pem"}`
		noRoots  = `the roots in volume "credence-identity" differ`
		itsItems = `"items":[` + root + `]`
	)
	for name, tc := range map[string]struct{ old, changed, want string }{
		"subPath":        {mount, mount + `,"subPath":"x"`, unlike},
		"subPathExpr":    {mount, mount + `,"subPathExpr":"$(X)"`, unlike},
		"token's path":   {token, `"path":"other"`, noToken},
		"all keys":       {itsItems, `"items":[]`, noRoots},
		"one more key":   {itsItems, `"items":[` + root + `,{"key":"x","path":"token"}]`, noRoots},
		"other key":      {root, `{"key":"x","path":"roots.pem"}`, noRoots},
		"roots' path":    {root, `{"key":"roots.pem","path":"x"}`, noRoots},
		"nothing at all": {"", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.Count(injected, tc.old) != 1 && tc.old != "" {
				t.Fatalf("%s is not once in %s", tc.old, injected)
			}
			result, err := i.Inject([]byte(strings.Replace(injected, tc.old, tc.changed, 1)), namespace)
			if result.Patch != nil {
				t.Errorf("the patch is %v", result.Patch)
			}
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if e, ok := errors.AsType[*credential.Error](err); !ok || !strings.Contains(e.Message, "("+tc.want+")") || e.Reason != credential.ReasonPodUnsupported {
				t.Errorf("error is %v, want one with (%s)", err, tc.want)
			}
		})
	}
}
