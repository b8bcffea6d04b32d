//go:build unix

package chart_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/chart"
)

// rendered renders the chart and decodes the result.
func rendered(t *testing.T, cfg chart.Config) []runtime.Object {
	t.Helper()
	cfg.Helm = helm
	text, err := chart.Render(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	all, err := chart.Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// podSpecs returns the pods of all Deployments and Jobs by the name of their object.
func podSpecs(all []runtime.Object) map[string]corev1.PodTemplateSpec {
	pods := map[string]corev1.PodTemplateSpec{}
	for _, object := range all {
		if object, ok := object.(*batchv1.Job); ok {
			pods[object.Name] = object.Spec.Template
		}
	}
	for _, d := range deploymentsOf(all) {
		pods[d.Name] = d.Spec.Template
	}
	return pods
}

// images returns the images of all pods and of the sidecar.
func images(t *testing.T, all []runtime.Object) (found []string) {
	t.Helper()
	for _, pod := range podSpecs(all) {
		found = append(found, pod.Spec.Containers[0].Image)
	}
	found = append(found, flagsOf(t, deployment(t, all, "webhook"))["--sidecar-image"])
	slices.Sort(found)
	return slices.Compact(found)
}

// TestImageRegistry shows that global.imageRegistry replaces the registry of all images, and only that.
func TestImageRegistry(t *testing.T) {
	t.Parallel()
	for registry, want := range map[string][]string{
		"":                       {"ghcr.io/credence-iam/credence-broker:0.1.0", "localhost/hook:0.1.0", "team/sidecar:0.1.0"},
		"mirror.example:5000":    {"mirror.example:5000/credence-iam/credence-broker:0.1.0", "mirror.example:5000/hook:0.1.0", "mirror.example:5000/team/sidecar:0.1.0"},
		"mirror.example/proxy/":  {"mirror.example/proxy/credence-iam/credence-broker:0.1.0", "mirror.example/proxy/hook:0.1.0", "mirror.example/proxy/team/sidecar:0.1.0"},
		"mirror.example/a/proxy": {"mirror.example/a/proxy/credence-iam/credence-broker:0.1.0", "mirror.example/a/proxy/hook:0.1.0", "mirror.example/a/proxy/team/sidecar:0.1.0"},
	} {
		got := images(t, rendered(t, chart.Config{Set: []string{
			"global.imageRegistry=" + registry, "images.webhook.repository=localhost/hook", "images.sidecar.repository=team/sidecar", "test.role=r", "test.namespace=n",
		}}))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("registry %q (-want +got):\n%s", registry, diff)
		}
	}
}

// TestDependency shows that the chart renders as a dependency with an alias: Helm passes it the keys that other charts have
// below global, and the parent's condition. A null in the parent's values stands for the default.
func TestDependency(t *testing.T) {
	t.Parallel()
	folder, err := chart.Folder()
	if err != nil {
		t.Fatal(err)
	}
	parent := t.TempDir()
	if err := os.CopyFS(filepath.Join(parent, "charts", "credence"), os.DirFS(folder)); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		"Chart.yaml":  "apiVersion: v2\nname: platform\nversion: 1.0.0\ndependencies:\n- {name: credence, alias: iam-1e3, version: 0.x, condition: iam-1e3.enabled}\n",
		"values.yaml": "global: {imageRegistry: mirror.example, imagePullSecrets: [all], storageClass: fast, security: {allowInsecureImages: true}}\niam-1e3: {enabled: true, namespaceOverride: iam, runAsUser: null}\n",
	} {
		if err := os.WriteFile(filepath.Join(parent, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all := rendered(t, chart.Config{Chart: parent})
	for _, d := range deployments(t, all) {
		if pod := d.Spec.Template.Spec; d.Namespace != "iam" || !strings.HasPrefix(pod.Containers[0].Image, "mirror.example/") || len(pod.ImagePullSecrets) != 1 || pod.ImagePullSecrets[0].Name != "all" {
			t.Errorf("%s/%s has image %s and pull secrets %v", d.Namespace, d.Name, pod.Containers[0].Image, pod.ImagePullSecrets)
		} else if user := pod.SecurityContext.RunAsUser; user == nil || *user == 0 {
			t.Errorf("%s runs as user %v", d.Name, user)
		}
	}
}

// TestReuseValues shows the message for "helm upgrade --reuse-values" from release 0.1.0, with which Helm ignores the
// defaults of the new chart.
func TestReuseValues(t *testing.T) {
	t.Parallel()
	folder, err := chart.Folder()
	if err != nil {
		t.Fatal(err)
	}
	old := t.TempDir()
	if err := os.CopyFS(old, os.DirFS(folder)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(old, "values.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"global", "namespaceOverride", "commonLabels", "extraObjects", "revisionHistoryLimit", "check", "test"} {
		if _, ok := values[key]; !ok {
			t.Fatalf("the chart has no value %s", key)
		}
		delete(values, key)
	}
	if text, err = yaml.Marshal(values); err == nil {
		err = os.WriteFile(file, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := chart.Render(t.Context(), chart.Config{Helm: helm, Chart: old}); err == nil || !strings.Contains(err.Error(), "use --reset-then-reuse-values instead") {
		t.Errorf("got %v", err)
	}
}

// TestNumericNames shows that a namespace and a release whose names are numbers give valid objects. Without quotes, YAML
// would read them as numbers, and 1e3 as 1000.
func TestNumericNames(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"123", "1e3"} {
		for _, cfg := range []chart.Config{
			{Release: name, Namespace: name},
			{Release: name},
		} {
			// --set would read such a value as a number, as YAML does without quotes.
			cfg.SetString = []string{
				"test.role=reader", "test.namespace=shop", "certificates.source=issuer", "certificates.issuerRef.name=" + name,
				"certificates.brokerSecret=b" + name, "certificates.webhookSecret=" + name, "priorityClassName=" + name,
			}
			if cfg.Namespace == "" {
				cfg.SetString = append(cfg.SetString, "namespaceOverride="+name)
			}
			cfg.Set = []string{"networkPolicy.enabled=true", "metrics.serviceMonitor.enabled=true"}
			all := rendered(t, cfg)
			for _, object := range all {
				meta := object.(metav1.Object)
				if ns := meta.GetNamespace(); ns != "" && ns != name && meta.GetName() != "credence-test" {
					t.Errorf("%s is in namespace %q", meta.GetName(), ns)
				}
				if got := meta.GetLabels()["app.kubernetes.io/instance"]; got != name {
					t.Errorf("%s has instance %q", meta.GetName(), got)
				}
			}
		}
	}
}

// TestCommonLabels shows that all objects and pods have the common labels, and that no selector has them: a Deployment's
// selector is immutable, so the next change of the value would fail.
func TestCommonLabels(t *testing.T) {
	t.Parallel()
	all := objects(t, "everything")
	const key, value = "example.com/owner", "platform"
	for _, object := range all {
		if meta := object.(metav1.Object); meta.GetLabels()[key] != value && meta.GetName() != "extra" {
			t.Errorf("%T %s has labels %v", object, meta.GetName(), meta.GetLabels())
		}
	}
	pods := podSpecs(all)
	if len(pods) != 3 {
		t.Fatalf("found pods of %v", slices.Collect(maps.Keys(pods)))
	}
	for name, pod := range pods {
		if pod.Labels[key] != value {
			t.Errorf("pods of %s have labels %v", name, pod.Labels)
		}
	}
	for _, name := range []string{"broker", "webhook"} {
		if diff := cmp.Diff(map[string]string{"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": name}, deployment(t, all, name).Spec.Selector.MatchLabels); diff != "" {
			t.Errorf("the selector of %s is not that of release 0.1.0, so no upgrade works (-want +got):\n%s", name, diff)
		}
	}
}

// TestRollouts shows that pods restart if a value changes that they read only at their start, and not if they follow it:
// those values are in ConfigMaps and Secrets.
func TestRollouts(t *testing.T) {
	t.Parallel()
	const root = "-----BEGIN CERTIFICATE-----\nbm90IGEgY2VydGlmaWNhdGU=\n-----END CERTIFICATE-----\n"
	values := func(t *testing.T, changes map[string]any) map[string]corev1.PodTemplateSpec {
		file := filepath.Join(t.TempDir(), "values.yaml")
		base := map[string]any{
			"rules":        map[string]any{"namespaces": []any{map[string]any{"match": []any{"*"}, "roles": []any{"*"}}}},
			"certificates": map[string]any{"roots": root},
		}
		maps.Copy(base, changes)
		text, err := json.Marshal(base)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		pods := podSpecs(rendered(t, chart.Config{ValueFiles: []string{file}}))
		delete(pods, "credence-check") // a Job, which is new each time
		return pods
	}
	before := values(t, nil)
	for name, tt := range map[string]struct {
		change   map[string]any
		restarts bool
	}{
		"rules": {map[string]any{"rules": map[string]any{"namespaces": []any{map[string]any{"match": []any{"a"}, "roles": []any{"*"}}}}}, false},
		"sidecar settings": {map[string]any{"sidecar": map[string]any{
			"memory": "64Mi", "cpu": map[string]any{"limit": 0}, "port": 9800, "runAsUser": -1, "logLevel": "warn",
			"imagePullSecrets": []any{"registry"}, "podAnnotations": map[string]any{"example.com/a": "b"},
		}}, false},
		"roots":           {map[string]any{"certificates": map[string]any{"roots": root + root}}, false},
		"common metadata": {map[string]any{"revisionHistoryLimit": 2, "webhook": map[string]any{"deploymentAnnotations": map[string]any{"a": "b"}, "timeoutSeconds": 9}}, false},
		"arguments":       {map[string]any{"clusterName": "other"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if after := values(t, tt.change); cmp.Equal(before, after) == tt.restarts {
				t.Errorf("pods restart: %v, want %v", !tt.restarts, tt.restarts)
			}
		})
	}
}

// TestPlatformValues shows the effect of values that platform teams set in most charts. The golden files have more of them.
func TestPlatformValues(t *testing.T) {
	t.Parallel()
	hook := func(all []runtime.Object) *admissionregistrationv1.MutatingWebhookConfiguration {
		return chart.Of[*admissionregistrationv1.MutatingWebhookConfiguration](all)[0]
	}
	budgets := func(all []runtime.Object) (text []string) {
		for _, b := range chart.Of[*policyv1.PodDisruptionBudget](all) {
			text = append(text, b.Name+" "+b.Spec.MinAvailable.String()+" "+b.Spec.MaxUnavailable.String())
		}
		return text
	}
	accounts := func(all []runtime.Object) (names []string) {
		for _, a := range chart.Of[*corev1.ServiceAccount](all) {
			names = append(names, a.Name)
		}
		return names
	}
	for set, tt := range map[string]struct {
		got  func(all []runtime.Object) any
		want any
	}{
		"webhook.timeoutSeconds=30": {func(all []runtime.Object) any {
			return *hook(all).Webhooks[0].TimeoutSeconds + *chart.Of[*admissionregistrationv1.MutatingWebhookConfiguration](all)[1].Webhooks[0].TimeoutSeconds
		}, int32(60)},
		"webhook.namespaceSelector.matchExpressions[0].key=a,webhook.namespaceSelector.matchExpressions[0].operator=Exists": {func(all []runtime.Object) any {
			e := hook(all).Webhooks[0].NamespaceSelector.MatchExpressions
			return []any{len(e), e[0].Key, e[1].Key, len(hook(all).Webhooks[0].NamespaceSelector.MatchLabels)}
		}, []any{2, "kubernetes.io/metadata.name", "a", 1}},
		"webhook.hostNetwork=true,webhook.adminPort=18080,networkPolicy.enabled=true": {func(all []runtime.Object) any {
			d := deployment(t, all, "webhook")
			pod := d.Spec.Template.Spec
			return []any{
				pod.HostNetwork, pod.DNSPolicy, pod.Containers[0].Ports[1].ContainerPort, flagsOf(t, d)["--admin-listen"], d.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue(),
				len(chart.Of[*networkingv1.NetworkPolicy](all)), deployment(t, all, "broker").Spec.Template.Spec.HostNetwork,
			}
		}, []any{true, corev1.DNSClusterFirstWithHostNet, int32(18080), ":18080", 1, 1, false}},
		"webhook.port=10250": {func(all []runtime.Object) any {
			d := deployment(t, all, "webhook")
			return []any{d.Spec.Template.Spec.Containers[0].Ports[0].ContainerPort, flagsOf(t, d)["--listen"], d.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue()}
		}, []any{int32(10250), ":10250", 0}},
		"broker.podDisruptionBudget.minAvailable=1,webhook.podDisruptionBudget.maxUnavailable=50%": {
			func(all []runtime.Object) any { return budgets(all) }, []string{"credence-broker 1 <nil>", "credence-webhook <nil> 50%"}},
		"broker.podDisruptionBudget.enabled=false": {func(all []runtime.Object) any { return budgets(all) }, []string{"credence-webhook <nil> 1"}},
		"broker.serviceAccount.create=false,broker.serviceAccount.name=mine": {func(all []runtime.Object) any {
			return append(accounts(all), deployment(t, all, "broker").Spec.Template.Spec.ServiceAccountName)
		}, []string{"credence-check", "credence-webhook", "mine"}},
		"webhook.serviceAccount.name=hooks": {func(all []runtime.Object) any { return accounts(all) }, []string{"credence-broker", "credence-check", "hooks"}},
		"check.enabled=false": {func(all []runtime.Object) any {
			return []any{accounts(all), len(hook(all).Webhooks), len(chart.Of[*batchv1.Job](all))}
		}, []any{[]string{"credence-broker", "credence-webhook"}, 1, 0}},
		"metrics.podMonitor.enabled=true,metrics.podMonitor.scrapeTimeout=5s": {func(all []runtime.Object) any {
			var got []any
			for _, m := range chart.Of[*chart.PodMonitor](all) {
				e := m.Spec.PodMetricsEndpoints[0]
				got = append(got, m.Name, e.Port, e.Interval, e.ScrapeTimeout)
			}
			return append(got, len(chart.Of[*chart.ServiceMonitor](all)))
		}, []any{"credence-broker", "admin", "30s", "5s", "credence-webhook", "admin", "30s", "5s", 0}},
		"test.role=reader,test.namespace=shop,test.annotations.x=y,annotationPrefix=a.example": {func(all []runtime.Object) any {
			job := chart.Of[*batchv1.Job](all)[1]
			return []any{job.Namespace, job.Annotations["helm.sh/hook"], job.Spec.Template.Annotations, job.Spec.Template.Spec.Containers[0].Args}
		}, []any{"shop", "test", map[string]string{"a.example/role": "reader", "a.example/start-timeout": "30s", "x": "y"}, []string{"check"}}},
	} {
		t.Run(set, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(tt.want, tt.got(rendered(t, chart.Config{Set: []string{set}}))); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestPlatformValuesAreRefused shows that the templates refuse what the schema cannot, with the fix.
func TestPlatformValuesAreRefused(t *testing.T) {
	t.Parallel()
	for set, want := range map[string]string{
		"broker.extraArgs[0]=--region=x,aws.region=y":                             "broker.extraArgs: --region belongs to the chart or is there twice; remove it",
		"webhook.extraArgs[0]=--listen=:1":                                        "webhook.extraArgs: --listen belongs to the chart",
		"broker.extraArgs[0]=--debug-listen=:8081":                                "lets all pods read session data; use an address of the loopback",
		"broker.extraArgs[0]=--base-arn=a,broker.extraArgs[1]=--base-arn=b":       "--base-arn belongs to the chart or is there twice",
		"webhook.env[0].name=A,webhook.env[1].name=A":                             "webhook.env: A is set already",
		"broker.env[0].name=POD_UID":                                              "broker.env: POD_UID is set already, by the chart",
		"broker.serviceAccount.name=x,webhook.serviceAccount.name=x":              "are equal, so the webhook would have the rights of the broker",
		"broker.serviceAccount.name=credence-webhook":                             "use two ServiceAccounts",
		"broker.serviceAccount.name=credence-check":                               "use another name",
		"broker.serviceAccount.name=credence-commands":                            "credence-commands is the ServiceAccount of commands",
		`commonLabels.iam\.amazonaws\.com/a=b`:                                    "label iam.amazonaws.com/a is under annotationPrefix",
		"annotationPrefix=a.b,webhook.podLabels.a\\.b/injected=b":                 "label a.b/injected is under annotationPrefix",
		"webhook.serviceAccount.create=false,webhook.serviceAccount.name=default": "webhook.serviceAccount.name: default is the ServiceAccount of all pods that name none",
		"certificates.brokerSecret=a,certificates.webhookSecret=a":                "are both a, so the webhook would have the broker's key; use two Secrets",
		"certificates.brokerSecret=credence-ca":                                   "whose key no program may have; use another name",
		"webhook.port=8080":                                                       "webhook.port and webhook.adminPort are both 8080; use two ports",
		"test.role=reader":                                                        "test.namespace and test.role belong together",
		"test.namespace=shop":                                                     "test.namespace and test.role belong together",
		"test.role=reader,test.namespace=credence":                                "Credence does not inject into namespace credence; choose another test.namespace",
		"metrics.serviceMonitor.enabled=true,metrics.podMonitor.enabled=true":     "Prometheus would scrape each pod twice; disable one of them",
	} {
		t.Run(set, func(t *testing.T) {
			t.Parallel()
			if _, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: []string{set}}); err == nil || !strings.Contains(strings.Join(strings.Fields(err.Error()), " "), want) {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
	flags := 0
	for _, d := range deployments(t, objects(t, "everything")) {
		for flag := range flagsOf(t, d) {
			if flag == "--debug-listen" || flag == "--sidecar-port" { // extraArgs of that case
				continue
			}
			flags++
			component := strings.TrimPrefix(d.Name, "credence-")
			if _, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: []string{component + ".extraArgs[0]=" + flag + "=a"}}); err == nil || !strings.Contains(err.Error(), flag+" belongs to the chart") {
				t.Errorf("%s %s: got %v", d.Name, flag, err)
			}
		}
	}
	if flags < 30 {
		t.Errorf("found %d flags of the chart", flags)
	}
	if _, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: []string{"broker.extraArgs[0]=--debug-listen=[::1]:9000", "webhook.extraArgs[0]=--sidecar-port=9000"}}); err != nil {
		t.Error(err)
	}
}

// TestChartYAML shows that the chart's metadata fits the chart: Artifact Hub shows these images, and Helm the icon.
func TestChartYAML(t *testing.T) {
	t.Parallel()
	folder, err := chart.Folder()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(folder, "Chart.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var metadata struct {
		Icon        string            `json:"icon"`
		Annotations map[string]string `json:"annotations"`
	}
	if err := yaml.Unmarshal(text, &metadata); err != nil {
		t.Fatal(err)
	}
	var listed []struct {
		Name  string `json:"name"`
		Image string `json:"image"`
	}
	if err := yaml.Unmarshal([]byte(metadata.Annotations["artifacthub.io/images"]), &listed); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, image := range listed {
		got = append(got, image.Image)
	}
	if diff := cmp.Diff(images(t, rendered(t, chart.Config{})), got); diff != "" {
		t.Errorf("the images in Chart.yaml are not those of the chart (-want +got):\n%s", diff)
	}
	file, ok := strings.CutPrefix(metadata.Icon, "https://raw.githubusercontent.com/credence-iam/credence/main/")
	if !ok {
		t.Fatalf("the icon %q is not in this repository", metadata.Icon)
	}
	if icon, err := os.ReadFile(filepath.Join(folder, "..", "..", file)); err != nil || !strings.HasPrefix(string(icon), "<svg ") {
		t.Errorf("the icon is no SVG: %v", err)
	}
}
