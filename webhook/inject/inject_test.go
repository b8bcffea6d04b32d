package inject_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	gocmp "github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/webhook/inject"
)

var update = flag.Bool("update", false, "write the results of golden tests to testdata")

const namespace = "team-a"

// config returns the default configuration of tests.
func config(t testing.TB) inject.Config {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return inject.Config{
		Keys:     keys,
		Image:    "registry.example/credence-sidecar:v1",
		Broker:   "credence-broker.credence.svc:9443",
		Settings: inject.DefaultSettings(),
	}
}

func newInjector(t testing.TB, change ...func(*inject.Config)) *inject.Injector {
	t.Helper()
	cfg := config(t)
	for _, f := range change {
		f(&cfg)
	}
	i, err := inject.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.UseDNS(clusterDNS); err != nil {
		t.Fatal(err)
	}
	return i
}

// clusterDNS is the default DNS of tests.
var clusterDNS = inject.DNS{Domain: "cluster.local", Servers: []netip.Addr{netip.MustParseAddr("10.96.0.10")}}

// apply applies ops to raw, as the API server does.
func apply(t testing.TB, raw []byte, ops []inject.Operation) []byte {
	t.Helper()
	if ops == nil {
		return raw
	}
	encoded, err := json.Marshal(ops)
	if err != nil {
		t.Fatal(err)
	}
	patch, err := jsonpatch.DecodePatch(encoded)
	if err != nil {
		t.Fatalf("%v in %s", err, encoded)
	}
	out, err := patch.Apply(raw)
	if err != nil {
		t.Fatalf("%v after applying %s to %s", err, encoded, raw)
	}
	return out
}

// decode decodes JSON and keeps the text of numbers.
func decode(t testing.TB, raw []byte) any {
	t.Helper()
	var v any
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v in %s", err, raw)
	}
	return v
}

func golden(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("testdata has no *.in.yaml")
	}
	return files
}

func readYAML(t testing.TB, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := yaml.YAMLToJSON(text)
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return raw
}

// settingsFor returns the settings for a golden file: the defaults, with those of NAME.settings.yaml.
func settingsFor(t testing.TB, in string) inject.Settings {
	t.Helper()
	s := inject.DefaultSettings()
	text, err := os.ReadFile(strings.TrimSuffix(in, ".in.yaml") + ".settings.yaml")
	if errors.Is(err, fs.ErrNotExist) {
		return s
	}
	if err == nil {
		err = yaml.UnmarshalStrict(text, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestGolden compares injected pods, with their warnings as comments, with files. A second injection must add nothing.
func TestGolden(t *testing.T) {
	withSettings := 0
	for _, in := range golden(t) {
		s := settingsFor(t, in)
		if !reflect.DeepEqual(s, inject.DefaultSettings()) {
			withSettings++
		}
		t.Run(strings.TrimSuffix(filepath.Base(in), ".in.yaml"), func(t *testing.T) {
			i := newInjector(t, func(c *inject.Config) { c.Settings = s })
			raw := readYAML(t, in)
			result, err := i.Inject(raw, namespace)
			if err != nil {
				t.Fatal(err)
			}
			patched := apply(t, raw, result.Patch)
			var got bytes.Buffer
			for _, warning := range result.Warnings {
				got.WriteString("# warning: " + warning + "\n")
			}
			text, err := yaml.JSONToYAML(patched)
			if err != nil {
				t.Fatal(err)
			}
			got.Write(text)

			out := strings.TrimSuffix(in, ".in.yaml") + ".out.yaml"
			if *update {
				if err := os.WriteFile(out, got.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(out)
			if err != nil {
				t.Fatalf("%v; run with -update and check the result", err)
			}
			if diff := gocmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", out, diff)
			}

			again, err := i.Inject(patched, namespace)
			if err != nil {
				t.Fatalf("second injection: %v", err)
			}
			if again.Patch != nil {
				t.Errorf("second injection adds %v", again.Patch)
			}
		})
	}
	if withSettings < 3 {
		t.Errorf("%d golden files have settings, want at least 3", withSettings)
	}
}

// TestUnknownFieldsKeepTheirText: injection keeps unknown fields, and the text of numbers.
func TestUnknownFieldsKeepTheirText(t *testing.T) {
	// YAML would round these numbers.
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"},"new":12345678901234567890},` +
		`"spec":{"new":{"x":9007199254740993},"initContainers":[{"name":"i","new":[1.10]}],"containers":[{"name":"c","new":1e400,"env":[{"name":"A","new":null}]}]}}`)
	result, err := newInjector(t).Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	out := decode(t, apply(t, raw, result.Patch))
	if err := embedded("", decode(t, raw), out); err != nil {
		t.Error(err)
	}
}

func TestNew(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*inject.Config)
		want   string
	}{
		{"keys", func(c *inject.Config) { c.Keys = policy.Keys{} }, "configuring injection: annotation keys are required"},
		{"image", func(c *inject.Config) { c.Image = "" }, `sidecar image "" is invalid; set --sidecar-image to an image such as registry.example/credence-sidecar:v1`},
		{"broker", func(c *inject.Config) { c.Broker = "" }, `broker address "" is invalid; set --broker to HOST:PORT such as credence-broker.credence.svc:9443`},
		{"broker of gRPC", func(c *inject.Config) { c.Broker = "dns:///credence-broker:9443" }, `broker address "dns:///credence-broker:9443" is invalid; set --broker to HOST:PORT such as credence-broker.credence.svc:9443`},
		{"broker without port", func(c *inject.Config) { c.Broker = "credence-broker" }, `broker address "credence-broker" is invalid; set --broker to HOST:PORT such as credence-broker.credence.svc:9443`},
		{"settings", func(c *inject.Config) { c.Settings.Port = 80 }, "sidecar settings: port: 80 is out of bounds: from 1024 to 65535"},
		{"no settings", func(c *inject.Config) { c.Settings = inject.Settings{} }, "sidecar settings: memory: 0Mi is out of bounds: from 12Mi to 256Mi"},
		{"trust", func(c *inject.Config) { c.TrustConfigMap = "A b" }, `trust ConfigMap "A b" is not a name that Kubernetes accepts; change --trust-config-map`},
		{"shadowed", func(c *inject.Config) { c.OnShadowed = "ignore" }, `action "ignore" for shadowed credentials is unknown; set --on-shadowed to refuse or warn`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := config(t)
			tc.change(&cfg)
			i, err := inject.New(cfg)
			if err == nil || err.Error() != tc.want {
				t.Errorf("error is %v, want %s", err, tc.want)
			}
			if i != nil {
				t.Error("New returns an Injector with an error")
			}
		})
	}
}

// TestRefusals has the whole message of each refusal, because users see it.
func TestRefusals(t *testing.T) {
	const (
		role   = `"metadata":{"annotations":{"iam.amazonaws.com/role":"reader"}}`
		copied = `; remove it from the manifest, with volume "credence-identity" and variables AWS_CONTAINER_*; the webhook adds it to each new pod`
	)
	present := func(edit ...string) string {
		raw := []byte(`{` + role + `,"spec":{"containers":[{"name":"app"}]}}`)
		result, err := newInjector(t).Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		text := string(apply(t, raw, result.Patch))
		changed := strings.NewReplacer(edit...).Replace(text)
		if changed == text {
			t.Fatalf("%q does not change %s", edit, text)
		}
		return changed
	}
	differs := func(what string) string {
		return `init container "credence-sidecar" is not the sidecar that the webhook adds: ` + what + copied
	}
	for _, tc := range []struct {
		name   string
		raw    string
		reason credential.Reason
		want   string
	}{
		{"no JSON", `{`, credential.ReasonPodUnsupported, "cannot read the pod: unexpected end of JSON input"},
		{"no spec", `{` + role + `}`, credential.ReasonPodUnsupported, "the pod has no spec"},
		{"no containers", `{` + role + `,"spec":{}}`, credential.ReasonPodUnsupported, "the pod has no containers"},
		{"null container", `{` + role + `,"spec":{"containers":[null]}}`, credential.ReasonPodUnsupported, "the pod has a container without a name"},
		{"misspelled", `{"metadata":{"annotations":{"iam.amazonaws.com/roel":"reader"}},"spec":{"containers":[{"name":"app"}]}}`,
			credential.ReasonAnnotationUnknown, `annotation "iam.amazonaws.com/roel" is unknown; did you mean "iam.amazonaws.com/role"?`},
		{"hostNetwork", `{` + role + `,"spec":{"hostNetwork":true,"containers":[{"name":"app"}]}}`, credential.ReasonPodUnsupported,
			`the pod has hostNetwork, so every process on its node could get its credentials from the sidecar; remove hostNetwork, or annotation "iam.amazonaws.com/role"`},
		{"windows", `{` + role + `,"spec":{"os":{"name":"windows"},"containers":[{"name":"app"}]}}`, credential.ReasonPodUnsupported,
			`the pod is for Windows, and the sidecar runs on Linux only; remove annotation "iam.amazonaws.com/role"`},
		{"static", `{"metadata":{"annotations":{"iam.amazonaws.com/role":"reader","kubernetes.io/config.mirror":"x"}},"spec":{"containers":[{"name":"app"}]}}`, credential.ReasonPodUnsupported,
			`the pod is static: the kubelet runs it from a file, which admission cannot change; remove annotation "iam.amazonaws.com/role" from the file, or make the pod a DaemonSet`},
		{"port", `{` + role + `,"spec":{"containers":[{"name":"app","ports":[{"containerPort":80},{"containerPort":9779}]}]}}`, credential.ReasonPodUnsupported,
			`container "app" has port 9779, on which the sidecar listens, and containers of a pod share ports; change the port, or set the sidecar's with annotation "iam.amazonaws.com/sidecar-port"`},
		{"port of init container", `{` + role + `,"spec":{"initContainers":[{"name":"i","ports":[{"containerPort":9779}]}],"containers":[{"name":"app"}]}}`, credential.ReasonPodUnsupported,
			`container "i" has port 9779, on which the sidecar listens, and containers of a pod share ports; change the port, or set the sidecar's with annotation "iam.amazonaws.com/sidecar-port"`},
		{"containers", `{"metadata":{"annotations":{"iam.amazonaws.com/role":"reader","iam.amazonaws.com/containers":"app,ap"}},"spec":{"initContainers":[{"name":"i"}],"containers":[{"name":"app"}]}}`,
			credential.ReasonPodUnsupported, `annotation "iam.amazonaws.com/containers" names ["ap"], and the pod has only ["app" "i"]; correct the name`},
		{"web identity", `{` + role + `,"spec":{"containers":[{"name":"app","env":[{"name":"AWS_WEB_IDENTITY_TOKEN_FILE","value":"/token"}]}]}}`, credential.ReasonShadowed,
			`container "app" has AWS_WEB_IDENTITY_TOKEN_FILE, which SDKs prefer to the annotated role; remove it (and what sets it, such as the service account's eks.amazonaws.com/role-arn), or list the container in "iam.amazonaws.com/skip-containers"`},
		{"web identity in init container", `{` + role + `,"spec":{"initContainers":[{"name":"i","env":[{"name":"AWS_WEB_IDENTITY_TOKEN_FILE","valueFrom":{"configMapKeyRef":{"name":"c","key":"k"}}}]}],"containers":[{"name":"app"}]}}`, credential.ReasonShadowed,
			`container "i" has AWS_WEB_IDENTITY_TOKEN_FILE, which SDKs prefer to the annotated role; remove it (and what sets it, such as the service account's eks.amazonaws.com/role-arn), or list the container in "iam.amazonaws.com/skip-containers"`},
		{"sidecar's name", `{` + role + `,"spec":{"containers":[{"name":"credence-sidecar"}]}}`, credential.ReasonPodUnsupported,
			`container name "credence-sidecar" is reserved for the sidecar that the webhook adds; choose another name`},
		{"volume's name", `{` + role + `,"spec":{"containers":[{"name":"app"}],"volumes":[{"name":"credence-identity","emptyDir":{}}]}}`, credential.ReasonPodUnsupported,
			`volume name "credence-identity" is reserved for the volume that the webhook adds; remove the volume, or choose another name`},
		{"sidecar without volume", `{` + role + `,"spec":{"containers":[{"name":"app"}],"initContainers":[{"name":"credence-sidecar"}]}}`, credential.ReasonPodUnsupported,
			`init container "credence-sidecar" has no volume "credence-identity"` + copied},

		{"other image", present(`credence-sidecar:v1"`, `evil:v1"`), credential.ReasonPodUnsupported,
			differs(`its image is "registry.example/evil:v1", not "registry.example/credence-sidecar:v1"`)},
		{"command", present(`"command":["/credence-sidecar"]`, `"command":["/bin/sh"]`), credential.ReasonPodUnsupported, differs(`its command differs`)},
		{"args", present(`"command":["/credence-sidecar"]`, `"command":["/credence-sidecar"],"args":["--x"]`), credential.ReasonPodUnsupported, differs(`its command differs`)},
		{"restart policy", present(`"restartPolicy":"Always",`, ``), credential.ReasonPodUnsupported, differs(`its restartPolicy is not Always`)},
		{"mount", present(`"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount"`, `"mountPath":"/other"`), credential.ReasonPodUnsupported,
			differs(`it does not mount volume "credence-identity" at /var/run/secrets/kubernetes.io/serviceaccount`)},
		{"mount of a part", present(`"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount"`, `"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount","subPath":"x"`), credential.ReasonPodUnsupported,
			differs(`it does not mount volume "credence-identity" at /var/run/secrets/kubernetes.io/serviceaccount`)},
		{"mount of an expanded part", present(`"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount"`, `"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount","subPathExpr":"$(X)"`), credential.ReasonPodUnsupported,
			differs(`it does not mount volume "credence-identity" at /var/run/secrets/kubernetes.io/serviceaccount`)},
		{"port of the present sidecar", present(`"127.0.0.1:9779"`, `"127.0.0.1:8080"`, `{"name":"app"`, `{"name":"app","ports":[{"containerPort":8080}]`), credential.ReasonPodUnsupported,
			`container "app" has port 8080, on which the sidecar listens, and containers of a pod share ports; change the port, or set the sidecar's with annotation "iam.amazonaws.com/sidecar-port"`},
		{"other broker", present(`"credence-broker.credence.svc:9443"`, `"broker.other.svc:9443"`), credential.ReasonPodUnsupported,
			differs(`its variable CREDENCE_BROKER is not "credence-broker.credence.svc:9443"`)},
		{"no broker", present(`"CREDENCE_BROKER"`, `"OTHER"`), credential.ReasonPodUnsupported,
			differs(`its variable CREDENCE_BROKER is not "credence-broker.credence.svc:9443"`)},
		{"all addresses", present(`"127.0.0.1:9779"`, `"0.0.0.0:9779"`), credential.ReasonPodUnsupported, differs(`its variable CREDENCE_LISTEN is not 127.0.0.1:PORT`)},
		{"port of no webhook", present(`"127.0.0.1:9779"`, `"127.0.0.1:80"`), credential.ReasonPodUnsupported, differs(`its variable CREDENCE_LISTEN is not 127.0.0.1:PORT`)},
		{"port with a zero", present(`"127.0.0.1:9779"`, `"127.0.0.1:09780"`), credential.ReasonPodUnsupported, differs(`its variable CREDENCE_LISTEN is not 127.0.0.1:PORT`)},
		{"no port", present(`"CREDENCE_LISTEN"`, `"OTHER"`), credential.ReasonPodUnsupported, differs(`its variable CREDENCE_LISTEN is not 127.0.0.1:PORT`)},
		{"bad memory", `{"metadata":{"annotations":{"iam.amazonaws.com/role":"reader","iam.amazonaws.com/sidecar-memory":"64M"}},"spec":{"containers":[{"name":"app"}]}}`,
			credential.ReasonAnnotationInvalid, `annotation "iam.amazonaws.com/sidecar-memory": "64M" is not an amount of memory; write whole mebibytes, such as 16Mi or 64Mi`},
		{"no authorization", present(`"CREDENCE_AUTHORIZATION"`, `"OTHER"`), credential.ReasonPodUnsupported, differs(`its variable CREDENCE_AUTHORIZATION is not the pod's UID`)},
		{"authorization overridden", present(`{"name":"CREDENCE_ROUTING_KEY"`, `{"name":"CREDENCE_AUTHORIZATION","value":"known"},{"name":"CREDENCE_ROUTING_KEY"`,
			`{"name":"CREDENCE_AUTHORIZATION","valueFrom":{"fieldRef":{"fieldPath":"metadata.uid"}}},`, ``), credential.ReasonPodUnsupported, differs(`its variable CREDENCE_AUTHORIZATION is not the pod's UID`)},
		{"authorization", present(`{"name":"CREDENCE_AUTHORIZATION","valueFrom":{"fieldRef":{"fieldPath":"metadata.uid"}}}`, `{"name":"CREDENCE_AUTHORIZATION","value":"known"}`),
			credential.ReasonPodUnsupported, differs(`its variable CREDENCE_AUTHORIZATION is not the pod's UID`)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			result, err := newInjector(t).Inject([]byte(tc.raw), namespace)
			if err == nil {
				t.Fatalf("Inject accepts %s", tc.raw)
			}
			if err.Error() != tc.want {
				t.Errorf("refusal is\n%s\nwant\n%s", err, tc.want)
			}
			if !errors.Is(err, credential.ErrInvalid) || credential.ReasonOf(err) != tc.reason {
				t.Errorf("reason is %s, want %s with kind ErrInvalid", credential.ReasonOf(err), tc.reason)
			}
			if result.Patch != nil {
				t.Errorf("refusal has patch %v", result.Patch)
			}
		})
	}
}

// TestRoutingKey: sidecar and brokers compute the same routing key for a pod.
func TestRoutingKey(t *testing.T) {
	keys := config(t).Keys
	for _, scope := range []policy.Scope{policy.ScopeRole, policy.ScopeServiceAccount, policy.ScopePod} {
		raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r","iam.amazonaws.com/session-scope":"` + string(scope) + `"}},` +
			`"spec":{"serviceAccountName":"cart","containers":[{"name":"app"}]}}`)
		result, err := newInjector(t).Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		var pod corev1.Pod
		if err := json.Unmarshal(apply(t, raw, result.Patch), &pod); err != nil {
			t.Fatal(err)
		}
		var got policy.RoutingKey
		hasUID := false
		for _, v := range pod.Spec.InitContainers[0].Env {
			switch v.Name {
			case "CREDENCE_ROUTING_KEY":
				got = policy.RoutingKey(v.Value)
			case "CREDENCE_POD_UID":
				hasUID = v.ValueFrom != nil && v.ValueFrom.FieldRef != nil && v.ValueFrom.FieldRef.FieldPath == "metadata.uid"
			}
		}
		if hasUID {
			got = got.ForPod("uid-1")
		}
		want, err := policy.Pod{Namespace: namespace, Name: "cart-1", UID: "uid-1", ServiceAccount: "cart", Request: keys.Request(pod.Annotations)}.RoutingKey()
		if err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("scope %s: sidecar has key %s, and brokers have %s", scope, got, want)
		}
	}
}

// TestOldRoutingKey: another webhook may change an annotation on which the routing key depends. The sidecar works with the
// old key.
func TestOldRoutingKey(t *testing.T) {
	shared := `{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"serviceAccountName":"cart","containers":[{"name":"app"}]}}`
	own := strings.Replace(shared, `"r"`, `"r","iam.amazonaws.com/session-scope":"pod"`, 1)
	for _, tc := range []struct{ name, raw, old, changed string }{
		{"role", shared, `"iam.amazonaws.com/role":"r"`, `"iam.amazonaws.com/role":"other"`},
		{"scope pod", shared, `"iam.amazonaws.com/role":"r"`, `"iam.amazonaws.com/role":"r","iam.amazonaws.com/session-scope":"pod"`},
		{"scope pod no longer", own, `"iam.amazonaws.com/session-scope":"pod"`, `"iam.amazonaws.com/session-scope":"service-account"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			i := newInjector(t)
			result, err := i.Inject([]byte(tc.raw), namespace)
			if err != nil {
				t.Fatal(err)
			}
			injected := string(apply(t, []byte(tc.raw), result.Patch))
			changed := strings.Replace(injected, tc.old, tc.changed, 1)
			if changed == injected {
				t.Fatalf("%s is not in %s", tc.old, injected)
			}
			again, err := i.Inject([]byte(changed), namespace)
			if err != nil || again.Patch != nil {
				t.Errorf("second injection adds %v (%v)", again.Patch, err)
			}
		})
	}
}

// TestResources: settings and a pod's overrides of CPU give a pair that Kubernetes accepts, and a Guaranteed pod keeps its
// class.
func TestResources(t *testing.T) {
	const guaranteed = `,"resources":{"limits":{"cpu":"1","memory":"1Gi"}}`
	cpu := func(request, limit, guaranteed policy.CPU) func(*inject.Config) {
		return func(c *inject.Config) {
			c.Settings.CPU = inject.CPU{Request: request, Limit: limit, Guaranteed: guaranteed}
		}
	}
	for _, tc := range []struct {
		name        string
		set         func(*inject.Config)
		annotations string
		resources   string // of the container
		want        string // request and limit
	}{
		{"defaults", nil, ``, ``, "5m 100m"},
		{"defaults, guaranteed", nil, ``, guaranteed, "50m 50m"},
		{"settings", cpu(20, 40, 60), ``, ``, "20m 40m"},
		{"settings, guaranteed", cpu(20, 40, 60), ``, guaranteed, "60m 60m"},
		{"settings, guaranteed with less than the request", cpu(70, 90, 60), ``, guaranteed, "70m 70m"},
		{"no limit", cpu(20, 0, 60), ``, ``, "20m 0"},
		{"no limit, guaranteed", cpu(20, 0, 60), ``, guaranteed, "60m 60m"},
		{"request", nil, `"sidecar-cpu-request":"50m"`, ``, "50m 100m"},
		{"request, guaranteed", nil, `"sidecar-cpu-request":"70m"`, guaranteed, "70m 70m"},
		{"small request, guaranteed", nil, `"sidecar-cpu-request":"1m"`, guaranteed, "10m 10m"},
		{"request above the limit", nil, `"sidecar-cpu-request":"200m"`, ``, "200m 200m"},
		{"request without a limit", cpu(20, 0, 60), `"sidecar-cpu-request":"200m"`, ``, "200m 0"},
		{"limit", nil, `"sidecar-cpu-limit":"1"`, ``, "5m 1"},
		{"limit, guaranteed", nil, `"sidecar-cpu-limit":"70m"`, guaranteed, "70m 70m"},
		{"limit below the request", cpu(200, 400, 60), `"sidecar-cpu-limit":"50m"`, ``, "50m 50m"},
		{"no limit by annotation", nil, `"sidecar-cpu-limit":"0"`, ``, "5m 0"},
		{"no limit by annotation, guaranteed", nil, `"sidecar-cpu-limit":"0"`, guaranteed, "50m 50m"},
		{"both", nil, `"sidecar-cpu-request":"20m","sidecar-cpu-limit":"30m"`, ``, "20m 30m"},
		{"both, guaranteed", nil, `"sidecar-cpu-request":"20m","sidecar-cpu-limit":"30m"`, guaranteed, "30m 30m"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			annotations := `"iam.amazonaws.com/role":"r"`
			if tc.annotations != "" {
				annotations += strings.ReplaceAll(","+tc.annotations, `,"`, `,"iam.amazonaws.com/`)
			}
			raw := []byte(`{"metadata":{"annotations":{` + annotations + `}},"spec":{"containers":[{"name":"app"` + tc.resources + `}]}}`)
			var changes []func(*inject.Config)
			if tc.set != nil {
				changes = append(changes, tc.set)
			}
			result, err := newInjector(t, changes...).Inject(raw, namespace)
			if err != nil {
				t.Fatal(err)
			}
			var pod corev1.Pod
			if err := json.Unmarshal(apply(t, raw, result.Patch), &pod); err != nil {
				t.Fatal(err)
			}
			r := pod.Spec.InitContainers[0].Resources
			if got := r.Requests.Cpu().String() + " " + r.Limits.Cpu().String(); got != tc.want {
				t.Errorf("request and limit are %s, want %s", got, tc.want)
			}
			if r.Limits.Cpu().IsZero() != (len(r.Limits) == 1) {
				t.Errorf("limits are %v, want a CPU limit only if it is not 0", r.Limits)
			}
		})
	}
}

// TestUse: new settings apply to the next pod. Invalid settings change nothing.
func TestUse(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app"}]}}`)
	i := newInjector(t)
	memory := func() string {
		t.Helper()
		result, err := i.Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		_, text, _ := strings.Cut(string(apply(t, raw, result.Patch)), `"limits":{"cpu":"100m","memory":"`)
		text, _, _ = strings.Cut(text, `"`)
		return text
	}
	s := inject.DefaultSettings()
	s.Memory, s.PodAnnotations, s.ImagePullSecrets = 64, map[string]string{"a": "b"}, []string{"s"}
	if err := i.Use(s); err != nil || memory() != "64Mi" {
		t.Errorf("after Use: error %v, memory %s, want 64Mi", err, memory())
	}
	// The settings in force share no memory with the caller.
	s.PodAnnotations["a"], s.ImagePullSecrets[0] = "c", "t"
	i.Settings().PodAnnotations["a"], i.Settings().ImagePullSecrets[0] = "d", "u"
	if got := i.Settings(); got.PodAnnotations["a"] != "b" || got.ImagePullSecrets[0] != "s" {
		t.Errorf("caller changed the settings in force: %+v", got)
	}
	s.Port = 80
	s.Memory = 128
	err := i.Use(s)
	if field, ok := errors.AsType[*inject.FieldError](err); !ok || field.Field != "port" || memory() != "64Mi" {
		t.Errorf("after invalid settings: error %v, memory %s, want port and 64Mi", err, memory())
	}
}

// TestConcurrentUse: each pod gets one set of settings, never a mixture of two.
func TestConcurrentUse(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app"}]}}`)
	i := newInjector(t)
	one, other := inject.DefaultSettings(), inject.DefaultSettings()
	one.Port, one.Memory, one.PodAnnotations = 2001, 21, map[string]string{"n": "1"}
	other.Port, other.Memory, other.PodAnnotations = 2002, 22, map[string]string{"n": "2"}
	if err := i.Use(one); err != nil {
		t.Fatal(err)
	}
	var writer sync.WaitGroup
	done := make(chan struct{})
	writer.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if err := errors.Join(i.Use(other), i.Use(one)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 2000 {
		result, err := i.Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := json.Marshal(result.Patch)
		if err != nil {
			t.Fatal(err)
		}
		text := string(encoded)
		var parts []string
		for n, wants := range map[string][]string{
			"1": {`"127.0.0.1:2001"`, `"http://127.0.0.1:2001/"`, `"memory":"21Mi"`, `"value":"1"`},
			"2": {`"127.0.0.1:2002"`, `"http://127.0.0.1:2002/"`, `"memory":"22Mi"`, `"value":"2"`},
		} {
			for _, want := range wants {
				if strings.Contains(text, want) {
					parts = append(parts, n)
				}
			}
		}
		joined := strings.Join(parts, "")
		if joined != "1111" && joined != "2222" {
			t.Fatalf("pod has parts of settings %s: %s", joined, text)
		}
	}
	close(done)
	writer.Wait()
}

func TestWarnShadowed(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app","env":[{"name":"AWS_WEB_IDENTITY_TOKEN_FILE","value":"/token"}]}]}}`)
	result, err := newInjector(t, func(c *inject.Config) { c.OnShadowed = inject.WarnShadowed }).Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{`container "app" sets AWS_WEB_IDENTITY_TOKEN_FILE, so SDKs use that identity, not the annotated role. Remove it at the end of the migration.`}
	if diff := gocmp.Diff(want, result.Warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}
	if result.Patch == nil {
		t.Error("Inject returns no patch")
	}
}

func TestPlatformUser(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"containers":[{"name":"app"}]}}`)
	result, err := newInjector(t, func(c *inject.Config) { c.Settings.RunAsUser = inject.PlatformUser }).Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	out := string(apply(t, raw, result.Patch))
	if strings.Contains(out, "runAsUser") || !strings.Contains(out, `"runAsNonRoot":true`) {
		t.Errorf("want runAsNonRoot without runAsUser in %s", out)
	}
}

func TestResult(t *testing.T) {
	raw := []byte(`{"metadata":{"generateName":"app-","annotations":{"iam.amazonaws.com/role":"r"}},"spec":{"serviceAccount":"old-name","hostNetwork":true,"containers":[{"name":"app"}]}}`)
	injector := newInjector(t)
	got, err := injector.Inject(raw, namespace)
	if err == nil {
		t.Fatal("Inject accepts a pod with hostNetwork")
	}
	want := inject.Result{
		Annotated: true,
		Name:      "app-",
		Pod: policy.Pod{
			Namespace: namespace, ServiceAccount: "old-name",
			Request: injector.Keys().Request(map[string]string{"iam.amazonaws.com/role": "r"}),
		},
	}
	if diff := gocmp.Diff(want, got, gocmp.AllowUnexported(policy.Request{})); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
}

// TestTokenLifetime: a fifth of the token's lifetime, the minimum at the start of a termination, and 25 minutes cover the
// grace period.
func TestTokenLifetime(t *testing.T) {
	for _, tc := range []struct {
		grace string
		want  string
	}{
		{"", "7200"},
		{`"terminationGracePeriodSeconds":-9223372036854775808,`, "7200"},
		{`"terminationGracePeriodSeconds":0,`, "7200"},
		{`"terminationGracePeriodSeconds":2940,`, "7200"},
		{`"terminationGracePeriodSeconds":2941,`, "7205"},
		{`"terminationGracePeriodSeconds":18779,`, "86395"},
		{`"terminationGracePeriodSeconds":18781,`, "86400"},
		{`"terminationGracePeriodSeconds":9223372036854775807,`, "86400"},
	} {
		raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"r"}},"spec":{` + tc.grace + `"containers":[{"name":"app"}]}}`)
		result, err := newInjector(t).Inject(raw, namespace)
		if err != nil {
			t.Fatal(err)
		}
		if out := string(apply(t, raw, result.Patch)); !strings.Contains(out, `"expirationSeconds":`+tc.want+`,`) {
			t.Errorf("%q: want expirationSeconds %s in %s", tc.grace, tc.want, out)
		}
	}
}

// TestWindows: Inject refuses a pod that can run only on Windows nodes, whichever field says so. It accepts others.
func TestWindows(t *testing.T) {
	affinity := func(terms string) string {
		return `"affinity":{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[` + terms + `]}}}`
	}
	const (
		windows = `{"key":"kubernetes.io/os","operator":"In","values":["windows"]}`
		zone    = `{"key":"zone","operator":"In","values":["windows"]}`
	)
	for name, tc := range map[string]struct {
		spec    string
		refused bool
	}{
		"os":                   {`"os":{"name":"windows"}`, true},
		"selector":             {`"nodeSelector":{"kubernetes.io/os":"windows"}`, true},
		"old selector":         {`"nodeSelector":{"beta.kubernetes.io/os":"windows"}`, true},
		"affinity":             {affinity(`{"matchExpressions":[` + zone + `,` + windows + `]}`), true},
		"in each term":         {affinity(`{"matchExpressions":[` + windows + `]},{"matchExpressions":[` + windows + `,` + zone + `]}`), true},
		"not Linux":            {affinity(`{"matchExpressions":[{"key":"kubernetes.io/os","operator":"NotIn","values":["linux"]}]}`), true},
		"Linux":                {`"os":{"name":"linux"},"nodeSelector":{"kubernetes.io/os":"linux"}`, false},
		"in one term only":     {affinity(`{"matchExpressions":[` + windows + `]},{"matchExpressions":[` + zone + `]}`), false},
		"either":               {affinity(`{"matchExpressions":[{"key":"kubernetes.io/os","operator":"In","values":["windows","linux"]}]}`), false},
		"not Windows":          {affinity(`{"matchExpressions":[{"key":"kubernetes.io/os","operator":"NotIn","values":["windows"]}]}`), false},
		"any operating system": {affinity(`{"matchExpressions":[{"key":"kubernetes.io/os","operator":"Exists"}]}`), false},
		"preferred":            {`"affinity":{"nodeAffinity":{"preferredDuringSchedulingIgnoredDuringExecution":[{"weight":1,"preference":{"matchExpressions":[` + windows + `]}}]}}`, false},
		"no terms":             {affinity(``), false},
		"an empty term":        {affinity(`{}`), false},
	} {
		t.Run(name, func(t *testing.T) {
			raw := `{"metadata":{"annotations":{"iam.amazonaws.com/role":"reader"}},"spec":{` + tc.spec + `,"containers":[{"name":"app"}]}}`
			_, err := newInjector(t).Inject([]byte(raw), namespace)
			e, ok := errors.AsType[*credential.Error](err)
			if refused := ok && strings.Contains(e.Message, "the pod is for Windows"); refused != tc.refused || !refused && err != nil {
				t.Errorf("refused: %v, want %v (%v)", refused, tc.refused, err)
			}
		})
	}
}

// TestPresentSidecar: a sidecar that the pod already has stays as it is. Containers that another webhook added get the
// environment for it. Warnings show what the user may not expect.
func TestPresentSidecar(t *testing.T) {
	raw := []byte(`{"metadata":{"annotations":{"iam.amazonaws.com/role":"reader"}},"spec":{"containers":[{"name":"app"}]}}`)
	first, err := newInjector(t).Inject(raw, namespace)
	if err != nil {
		t.Fatal(err)
	}
	injected := strings.Replace(string(apply(t, raw, first.Patch)), `"containers":[`, `"containers":[{"name":"proxy"},`, 1)
	const (
		oldVersion = `not the webhook's version`
		role       = `"iam.amazonaws.com/role":"reader"`
		listen     = `{"name":"CREDENCE_LISTEN","value":"127.0.0.1:9779"}`
		defaultURI = "http://127.0.0.1:9779/v1/credentials"
	)
	for name, tc := range map[string]struct {
		edit    []string // pairs of old and new text
		warning string   // a part of the only one; empty for none
		uri     string   // empty: defaultURI
	}{
		"the same":              {nil, "", ""},
		"older":                 {[]string{`sidecar:v1"`, `sidecar:v0"`}, `image "registry.example/credence-sidecar:v0", ` + oldVersion, ""},
		"on a mirror":           {[]string{`registry.example/credence-sidecar:v1"`, `mirror/x/credence-sidecar:v1@sha256:1"`}, "", ""},
		"older, on a mirror":    {[]string{`registry.example/credence-sidecar:v1"`, `mirror/x/credence-sidecar:v0"`}, `"mirror/x/credence-sidecar:v0"`, ""},
		"untagged":              {[]string{`sidecar:v1"`, `sidecar"`}, `"registry.example/credence-sidecar"`, ""},
		"without a variable":    {[]string{`{"name":"CREDENCE_METADATA","value":"v2"},`, ``}, "", ""},
		"with a newer variable": {[]string{`"env":[{"name":"CREDENCE_BROKER"`, `"env":[{"name":"CREDENCE_NEW","value":"x"},{"name":"CREDENCE_BROKER"`}, "", ""},
		"other probe":           {[]string{`"probe"]`, `"wait"]`}, "", ""},
		"other roots":           {[]string{`"name":"credence-trust"`, `"name":"other-trust"`}, "", ""},
		"other port":            {[]string{listen, strings.Replace(listen, "9779", "9780", 1)}, `container "app" sets AWS_CONTAINER_CREDENTIALS_FULL_URI`, "http://127.0.0.1:9780/v1/credentials"},
		"port set twice":        {[]string{listen, listen + "," + strings.Replace(listen, "9779", "9780", 1)}, `container "app" sets AWS_CONTAINER_CREDENTIALS_FULL_URI`, "http://127.0.0.1:9780/v1/credentials"},
		"annotated port":        {[]string{role, role + `,"iam.amazonaws.com/sidecar-port":"9780"`}, `keeps CREDENCE_LISTEN="127.0.0.1:9779", but the annotations ask for "127.0.0.1:9780"`, ""},
		"annotated metadata":    {[]string{role, role + `,"iam.amazonaws.com/imds":"v1"`}, `keeps CREDENCE_METADATA="v2", but the annotations ask for "v1"`, ""},
		"annotated timeout":     {[]string{role, role + `,"iam.amazonaws.com/start-timeout":"7s"`}, `but the annotations ask for "7s"`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			text := strings.NewReplacer(tc.edit...).Replace(injected)
			if text == injected && tc.edit != nil {
				t.Fatalf("%q does not change %s", tc.edit, text)
			}
			result, err := newInjector(t).Inject([]byte(text), namespace)
			if err != nil {
				t.Fatal(err)
			}
			patched := decode(t, apply(t, []byte(text), result.Patch))
			if err := embedded("", decode(t, []byte(text)), patched); err != nil {
				t.Error(err)
			}
			if n := len(at(patched, "spec", "initContainers").([]any)); n != 1 {
				t.Errorf("pod has %d init containers, want 1", n)
			}
			if got := variable(named(t, patched, "containers", "proxy"), "AWS_CONTAINER_CREDENTIALS_FULL_URI"); got != cmp.Or(tc.uri, defaultURI) {
				t.Errorf("the added container's endpoint is %v, want %s", got, cmp.Or(tc.uri, defaultURI))
			}
			switch {
			case tc.warning == "" && len(result.Warnings) > 0:
				t.Errorf("warnings are %q, want none", result.Warnings)
			case tc.warning != "" && (len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], tc.warning)):
				t.Errorf("warnings are %q, want one with %q", result.Warnings, tc.warning)
			}
		})
	}
}
