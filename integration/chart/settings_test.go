//go:build unix

package chart_test

import (
	"encoding/json"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

// TestSettings: the chart's settings of the sidecar reach the webhook as a file that it takes and can follow.
func TestSettings(t *testing.T) {
	t.Parallel()
	openshift := inject.DefaultSettings()
	openshift.RunAsUser = inject.PlatformUser
	for name, want := range map[string]inject.Settings{
		"defaults":  inject.DefaultSettings(),
		"openshift": openshift,
		"everything": {
			ImagePullSecrets: []string{"registry"}, Memory: 64, CPU: inject.CPU{Request: 50, Limit: 1000, Guaranteed: 60}, Port: 19779, RunAsUser: 1000680000,
			LogLevel: policy.LogWarn,
			PodAnnotations: map[string]string{
				"traffic.sidecar.istio.io/excludeOutboundPorts": "9443", "sidecar.opentelemetry.io/inject": "false",
			},
		},
	} {
		all := objects(t, name)
		maps := slices.DeleteFunc(chart.Of[*corev1.ConfigMap](all), func(c *corev1.ConfigMap) bool { return c.Name != "credence-sidecar-settings" })
		if len(maps) != 1 {
			t.Errorf("%s: there are %d ConfigMaps of settings", name, len(maps))
			continue
		}
		keys, err := policy.NewKeys(policy.DefaultPrefix)
		if err != nil {
			t.Fatal(err)
		}
		// Upon nothing, so that a field which is not written shows.
		got, err := settingsfile.Parse([]byte(maps[0].Data["settings.yaml"]), inject.Settings{}, keys)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (- want, + got):\n%s", name, diff)
		}
		template := deployment(t, all, "webhook").Spec.Template
		mounts, volumes := template.Spec.Containers[0].VolumeMounts, template.Spec.Volumes
		at := slices.IndexFunc(mounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/etc/credence/sidecar" })
		if at < 0 || mounts[at].SubPath != "" || !mounts[at].ReadOnly {
			t.Errorf("%s: the webhook does not mount the settings as a folder, which is what kubelets keep up to date", name)
			continue
		}
		volume := slices.IndexFunc(volumes, func(v corev1.Volume) bool { return v.Name == mounts[at].Name })
		if volume < 0 || volumes[volume].ConfigMap == nil || volumes[volume].ConfigMap.Name != maps[0].Name {
			t.Errorf("%s: the webhook mounts something else as settings", name)
		}
		if !slices.Contains(template.Spec.Containers[0].Args, "--sidecar-settings-file=/etc/credence/sidecar/settings.yaml") {
			t.Errorf("%s: the webhook is not told where the settings are", name)
		}
	}
}

// TestSettingsRestartNothing: a change of settings changes their ConfigMap and nothing else.
func TestSettingsRestartNothing(t *testing.T) {
	t.Parallel()
	rendered := func(set ...string) map[string]string {
		text, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: set})
		if err != nil {
			t.Fatal(err)
		}
		documents := map[string]string{}
		for document := range strings.SplitSeq(string(text), "\n---\n") {
			source, _, _ := strings.Cut(document, "\n")
			documents[source] += document
		}
		return documents
	}
	before := rendered()
	after := rendered("sidecar.memory=64Mi", "sidecar.cpu.limit=0", "sidecar.port=9780", "sidecar.runAsUser=-1", "sidecar.logLevel=warn",
		"sidecar.imagePullSecrets[0]=registry", `sidecar.podAnnotations.example\.com/a=b`)
	var changed []string
	for source := range after {
		if before[source] != after[source] {
			changed = append(changed, source)
		}
	}
	if diff := cmp.Diff([]string{"# Source: credence/templates/settings.yaml"}, changed); diff != "" {
		t.Errorf("changed are (- want, + got):\n%s", diff)
	}
}

// TestSettingsSchema: the schema knows the fields that the webhook knows, but for what the chart has elsewhere.
func TestSettingsSchema(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	type object struct {
		Properties map[string]json.RawMessage `json:"properties"`
	}
	var schema, sidecar, cpu object
	for _, step := range []struct {
		text []byte
		into *object
		next string
	}{{text, &schema, "sidecar"}, {nil, &sidecar, "cpu"}, {nil, &cpu, ""}} {
		if step.text != nil {
			text = step.text
		}
		if err := json.Unmarshal(text, step.into); err != nil {
			t.Fatal(err)
		}
		text = step.into.Properties[step.next]
	}
	names := func(typ reflect.Type, but ...string) (names []string) {
		for field := range typ.Fields() {
			if name := field.Tag.Get("json"); !slices.Contains(but, name) {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		return names
	}
	// The image's policy is beside the image.
	want := slices.Sorted(slices.Values(append(names(reflect.TypeFor[inject.Settings](), "imagePullPolicy"), "onShadowed")))
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(sidecar.Properties))); diff != "" {
		t.Errorf("sidecar (- the webhook, + the schema):\n%s", diff)
	}
	if diff := cmp.Diff(names(reflect.TypeFor[inject.CPU]()), slices.Sorted(maps.Keys(cpu.Properties))); diff != "" {
		t.Errorf("sidecar.cpu (- the webhook, + the schema):\n%s", diff)
	}
}

// TestSettingsThatTheSchemaCannotTell: what a program would not start with, or an API server not take, is not installed.
func TestSettingsThatTheSchemaCannotTell(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		set  []string
		want string // empty: it is taken
	}{
		{[]string{"sidecar.cpu.request=200m"}, "sidecar.cpu.limit, 100m, is below sidecar.cpu.request, 200m"},
		{[]string{"sidecar.cpu.request=1"}, "sidecar.cpu.limit, 100m, is below sidecar.cpu.request, 1"},
		{[]string{"sidecar.cpu.request=1", "sidecar.cpu.limit=1000m"}, ""},
		{[]string{"sidecar.cpu.request=1", "sidecar.cpu.limit=0"}, ""},
		{[]string{`sidecar.podAnnotations.iam\.amazonaws\.com/role=admin`}, "iam.amazonaws.com/role is under annotationPrefix"},
		{[]string{`sidecar.podAnnotations.IAM\.amazonaws\.com/role=admin`}, "IAM.amazonaws.com/role is under annotationPrefix"},
		{[]string{`sidecar.podAnnotations.iam\.amazonaws\.com/role=admin`, "annotationPrefix=aws.example.com"}, ""},
		{[]string{"sidecar.podAnnotations.a=" + strings.Repeat("ä", 512)}, ""},
		{[]string{"sidecar.podAnnotations.a=" + strings.Repeat("ä", 513)}, "the value of a has 1026 bytes, the limit is 1024"},
		{[]string{"broker.env[0].name=POD_IPS"}, "broker.env: POD_IPS is set already"},
		{[]string{"broker.env[0].name=A", "broker.env[1].name=HTTPS_PROXY", "proxy.https=http://proxy:1"}, "broker.env: HTTPS_PROXY is set already"},
		{[]string{"broker.env[0].name=HTTP_PROXY", "proxy.http=http://proxy:1"}, "broker.env: HTTP_PROXY is set already"},
		{[]string{"broker.env[0].name=NO_PROXY", "proxy.except[0]=.svc"}, "broker.env: NO_PROXY is set already"},
		{[]string{"broker.env[0].name=A", "broker.env[1].name=A"}, "broker.env: A is set already"},
		{[]string{"broker.env[0].name=HTTPS_PROXY", "proxy.http=http://proxy:1", "proxy.except[0]=.svc"}, ""},
	} {
		_, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: tc.set})
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%q: %v, want %q", tc.set, err, tc.want)
		}
	}
}

// TestWrongSettings: whatever Helm installs, the webhook takes. A file reaches all webhooks at once, without a rollout that
// a wrong one would stop.
func TestWrongSettings(t *testing.T) {
	t.Parallel()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for _, set := range []string{
		"podAnnotations.foo bar=x", `podAnnotations.example\.com/a/b=x`, `podAnnotations.example\.com/=x`, "podAnnotations." + strings.Repeat("a", 64) + "=x",
		"podAnnotations." + strings.Repeat("a", 63) + "=x", "podAnnotations." + strings.Repeat("a.", 130) + "a/b=x", `podAnnotations.Kubernetes\.io/a=x`, `podAnnotations.x\.K8S\.IO/a=x`,
		`podAnnotations.notkubernetes\.io/a=x`, `podAnnotations.A_b\.c=x`, `podAnnotations.a_b\.com/c=x`, "podAnnotations.-a=x",
		"imagePullSecrets[0]=a..b", "imagePullSecrets[0]=a.-b", "imagePullSecrets[0]=a.b", "imagePullSecrets[0]=" + strings.Repeat("a", 253), "imagePullSecrets[0]=" + strings.Repeat("a", 254),
		"runAsUser=2147483647", "runAsUser=2147483648", "memory=null", "cpu=null", "cpu.request=null", "cpu.limit=null", "cpu.guaranteed=null", "logLevel=null",
		"port=null", "runAsUser=null", "imagePullSecrets=null", "podAnnotations=null",
	} {
		text, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: []string{"sidecar." + set}})
		if err != nil {
			continue
		}
		taken++
		all, err := chart.Decode(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chart.Of[*corev1.ConfigMap](all) {
			if c.Name != "credence-sidecar-settings" {
				continue
			}
			if _, err := settingsfile.Parse([]byte(c.Data["settings.yaml"]), inject.DefaultSettings(), keys); err != nil {
				t.Errorf("%s is installed, and the webhook says %v", set, err)
			}
		}
	}
	if taken != 8 {
		t.Errorf("%d of these were taken, want 8", taken)
	}
}
