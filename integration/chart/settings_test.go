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

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

// TestSettings shows that the chart's sidecar settings are a valid file. TestObjectsAgree shows that the webhook gets it.
func TestSettings(t *testing.T) {
	t.Parallel()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
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
		maps := configMaps(all, "credence-sidecar-settings")
		if len(maps) != 1 {
			t.Errorf("%s: there are %d ConfigMaps of settings", name, len(maps))
			continue
		}
		// Without defaults, a field that the file does not have shows.
		got, err := settingsfile.Parse([]byte(maps[0].Data["settings.yaml"]), inject.Settings{}, keys)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (- want, + got):\n%s", name, diff)
		}
	}
}

// TestRules shows that the chart's rules are a valid file. TestObjectsAgree shows that both programs get it.
func TestRules(t *testing.T) {
	t.Parallel()
	files := configMaps(objects(t, "everything"), "credence-rules")
	if len(files) != 1 {
		t.Fatalf("there are %d ConfigMaps with rules", len(files))
	}
	file, err := rulesfile.Parse([]byte(files[0].Data["rules.yaml"]))
	if err != nil {
		t.Fatal(err)
	}
	// The case sets all fields, so a field that the schema does not have shows.
	for _, v := range []reflect.Value{reflect.ValueOf(file), reflect.ValueOf(file.Namespaces[0])} {
		for i := range v.NumField() {
			if v.Field(i).IsZero() {
				t.Errorf("%s is not set", v.Type().Field(i).Name)
			}
		}
	}
}

// TestSchemaHasTheFieldsOfTheFiles shows that the schema has the fields that the programs read from the sidecar settings and
// the rules file, except fields that the chart has in another place.
func TestSchemaHasTheFieldsOfTheFiles(t *testing.T) {
	t.Parallel()
	type object struct {
		AdditionalProperties any                        `json:"additionalProperties"`
		Properties           map[string]json.RawMessage `json:"properties"`
		Definitions          map[string]json.RawMessage `json:"definitions"`
	}
	parse := func(text []byte) (o object) {
		t.Helper()
		if err := json.Unmarshal(text, &o); err != nil {
			t.Fatal(err)
		}
		return o
	}
	text, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	schema := parse(text)
	sidecar := parse(schema.Properties["sidecar"])
	for name, tc := range map[string]struct {
		schema object
		want   []string
	}{
		// The image's pull policy is next to the image. onShadowed is a flag of the webhook.
		"sidecar":        {sidecar, append(jsonNames(reflect.TypeFor[inject.Settings](), "imagePullPolicy"), "onShadowed")},
		"sidecar.cpu":    {parse(sidecar.Properties["cpu"]), jsonNames(reflect.TypeFor[inject.CPU]())},
		"rules":          {parse(schema.Definitions["rules"]), jsonNames(reflect.TypeFor[policy.File]())},
		"namespaceRules": {parse(schema.Definitions["namespaceRules"]), jsonNames(reflect.TypeFor[policy.NamespaceRules]())},
	} {
		slices.Sort(tc.want)
		if diff := cmp.Diff(tc.want, slices.Sorted(maps.Keys(tc.schema.Properties))); diff != "" {
			t.Errorf("%s (- the programs, + the schema):\n%s", name, diff)
		}
		if tc.schema.AdditionalProperties != false {
			t.Errorf("%s accepts unknown fields", name)
		}
	}
}

// TestTemplatesRefuse shows that the templates refuse what the schema cannot express: values with which a program does not
// start, or which the API server refuses.
func TestTemplatesRefuse(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		set  []string
		want string // empty: the chart accepts it
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

// TestWrongSettings shows that the webhook accepts all settings that Helm installs. A file reaches all webhooks at once: no
// rollout stops an invalid one.
func TestWrongSettings(t *testing.T) {
	t.Parallel()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	accepted := 0
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
		accepted++
		all, err := chart.Decode(text)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range configMaps(all, "credence-sidecar-settings") {
			if _, err := settingsfile.Parse([]byte(c.Data["settings.yaml"]), inject.DefaultSettings(), keys); err != nil {
				t.Errorf("%s is installed, but the webhook refuses it: %v", set, err)
			}
		}
	}
	if accepted != 8 {
		t.Errorf("Helm accepts %d of these, want 8", accepted)
	}
}

// TestNullValues shows that a value that is null is empty or refused. Helm removes it before it validates values, and a
// template would read it as 0, such as no replicas or the user root.
func TestNullValues(t *testing.T) {
	t.Parallel()
	render := func(keys []string, set ...string) (string, error) {
		nulls := set
		for _, key := range keys {
			nulls = append(nulls, strings.ReplaceAll(key, "kubernetes.io", `kubernetes\.io`)+"=null")
		}
		text, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: nulls})
		return string(text), err
	}
	var objects, required, empty, optional []string
	for key, value := range leaves(t, valuesFile) {
		for at := strings.LastIndexByte(key, '.'); at > 0; at = strings.LastIndexByte(key[:at], '.') {
			objects = append(objects, key[:at])
		}
		switch v := reflect.ValueOf(value); {
		case value == false || v.Kind() != reflect.Bool && (v.IsZero() || (v.Kind() == reflect.Map || v.Kind() == reflect.Slice) && v.Len() == 0):
			empty = append(empty, key)
		case free(key) || key == "priorityClassName":
			optional = append(optional, key)
		default:
			required = append(required, key)
		}
	}
	slices.Sort(objects)
	for _, object := range slices.Compact(objects) {
		if object != "global" {
			required = append(required, object)
		}
	}
	for _, key := range required {
		_, err := render([]string{key})
		schema := "missing property '" + key[strings.LastIndexByte(key, '.')+1:] + "'"
		if err == nil || !strings.Contains(err.Error(), "must not be null: "+key) && !strings.Contains(err.Error(), schema) && key != "check" {
			t.Errorf("%s: %v", key, err)
		}
	}
	if len(required) < 70 || len(optional) != 6 {
		t.Errorf("found %d values that must not be null, and %q that may", len(required), optional)
	}
	uses := []string{"metrics.annotatePods=true", "metrics.podMonitor.enabled=true", "metrics.prometheusRule.enabled=true", "metrics.grafanaDashboard.enabled=true", "networkPolicy.enabled=true", "test.namespace=a", "test.role=b"}
	empty = slices.DeleteFunc(empty, func(key string) bool {
		return slices.Contains(uses, key+"=true") || key == "test.namespace" || key == "test.role"
	})
	want, err := render(nil, uses...)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := render(empty, uses...); err != nil || got != want {
		t.Errorf("with null for all values that are empty by default: %v %s", err, cmp.Diff(want, got))
	}
	got, err := render(append(optional, "global"), uses...)
	if err == nil {
		_, err = chart.Decode([]byte(got))
	}
	if err != nil || strings.Contains(got, "nil>") {
		t.Errorf("with null for %q: %v", optional, err)
	}
}
