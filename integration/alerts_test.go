//go:build unix

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/prometheus"
	"github.com/credence-iam/credence/integration/stack"
)

// TestAlertsAndDashboard lets a Prometheus scrape the broker, the webhook and the API server while parts of them fail. The
// rules of the chart fire without their delay. Each query of the dashboard has data, and so has each selector of the
// alerts and of their recorded series. It restarts the programs, so it does not run in parallel.
func TestAlertsAndDashboard(t *testing.T) {
	path := prometheus.Program(t, "prometheus")
	rules, err := chart.Alerts(t.Context(), chart.Config{})
	if err != nil {
		t.Fatal(err)
	}
	alerts := rules.Groups[0].Rules
	for i := range alerts {
		alerts[i].For = ""
	}
	rulesFile, settingsFile := filepath.Join(t.TempDir(), "rules.yaml"), filepath.Join(t.TempDir(), "settings.yaml")
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(rulesFile, "namespaces: [{match: ['*'], accounts: ['*'], roles: ['*']}]")
	write(settingsFile, "memory: 64Mi")
	restartBroker(t, "--rules-file="+rulesFile, "--assume-role="+arn("hop"))
	webhookFlags := []string{"--rules-file=" + rulesFile, "--sidecar-settings-file=" + settingsFile}
	restartWebhook(t, webhookFlags...)
	server, err := prometheus.Start(t.Context(), prometheus.Config{
		Path: path, Host: control.Host(), Folder: filepath.Join(control.Run().Dir(), "prometheus"),
		Interval: time.Second, Evaluation: time.Second, Rules: rules, Scrape: scrapeConfig(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop(0)
	// has waits until each query, by its name, has had data.
	has := func(queries map[string]string) {
		t.Helper()
		await.Until(t, "all queries have data", func() error {
			for name, query := range queries {
				series, err := server.Query(t.Context(), query)
				if err != nil {
					return err
				}
				if len(series) > 0 {
					delete(queries, name)
				}
			}
			if len(queries) > 0 {
				return fmt.Errorf("these have none: %q", queries)
			}
			return nil
		})
	}
	fired := map[string]bool{}
	fires := func(names ...string) {
		t.Helper()
		for _, name := range names {
			await.Until(t, name+" fires", func() error {
				all, err := server.Alerts(t.Context())
				for _, a := range all {
					if a.Labels["alertname"] == name && a.State == "firing" {
						if text := fmt.Sprint(a.Annotations); strings.Contains(text, "<error") || strings.Contains(text, "<no value>") {
							return await.Never{Err: errors.New(text)}
						}
						fired[name] = true
						return nil
					}
				}
				return errors.Join(err, errors.New("it does not"))
			})
		}
	}

	has(map[string]string{"targets": `credence_broker_ready and on () credence_webhook_ready and on () kubernetes_build_info{job="apiserver"}`})
	fires("CredenceCertificateExpires", "CredenceReplicasMissing") // a day is left, and each component has one replica
	ns := namespace(t, ".*")
	calls := func(behavior ststest.Behavior, names ...string) {
		t.Helper()
		for _, name := range names {
			credence.STS.SetRole(arn("alerts-"+name), behavior)
			_, _ = call(t, token(t, create(t, ns, name, role("alerts-"+name)))) // most are refused
		}
	}
	throttled, keys := ststest.Behavior{Fault: ststest.Throttling()}, ststest.Behavior{Fault: &ststest.Fault{Code: "InvalidClientTokenId", Status: 403}}
	calls(ststest.Behavior{}, "good")
	calls(ststest.Behavior{Latency: 3 * time.Second}, "slow")
	calls(ststest.Behavior{Deny: true}, "denied")
	calls(ststest.Behavior{Fault: ststest.Unavailable()}, "unavailable")
	calls(throttled, "throttled")
	calls(keys, "keys")
	misspelled := func() error {
		_, err := kubetest.Dry(t, credence.Client, ns, stack.Pod("misspelled", map[string]string{"iam.amazonaws.com/roel": "x"}))
		return err
	}
	if misspelled() == nil {
		t.Fatal("a misspelled annotation is accepted")
	}
	// A rate needs a second failure, because the series of a failure begins with the first one.
	has(map[string]string{"failures": `count(credence_broker_sts_calls_total{outcome=~"BROKER_CREDENTIALS|STS_THROTTLED|STS_UNAVAILABLE|STS_ACCESS_DENIED"}) >= 4`})
	calls(keys, "more-keys")
	calls(throttled, "more-throttled", "still-more-throttled", "most-throttled")
	fires("CredenceSTSFailing", "CredenceBrokerCredentials", "CredenceSessionsMissing", "CredencePodsRefused", "CredenceSlow")

	write(rulesFile, "namespaces: [{role: x}]")
	write(settingsFile, "memory: 1Mi")
	credence.STS.SetClock(2 * time.Minute)
	t.Cleanup(func() { credence.STS.SetClock(0) })
	immutable := true
	full := kubetest.Namespace(t, credence.Client, nil, nil)
	if _, err := credence.Client.CoreV1().ConfigMaps(full).Create(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "credence-trust"}, Immutable: &immutable,
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	changed, err := credence.Client.CoreV1().Namespaces().Get(t.Context(), full, metav1.GetOptions{})
	if err == nil {
		changed.Labels[injectLabel] = "enabled"
		_, err = credence.Client.CoreV1().Namespaces().Update(t.Context(), changed, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	fires("CredenceRulesFile", "CredenceSidecarSettings", "CredenceTrustUnpublished", "CredenceClockSkew")
	has(grafanaQueries(t))

	write(rulesFile, "namespaces: [{match: ['*'], accounts: ['*'], roles: ['*']}]")
	write(settingsFile, "memory: 64Mi")
	credence.Webhook.Stop(0)
	fires("CredenceWebhookDown")
	await.Until(t, "the API server counts calls that fail", func() error {
		if err := misspelled(); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
			return fmt.Errorf("creating a pod: %w", err)
		}
		series, err := server.Query(t.Context(), `ALERTS{alertname="CredenceWebhookUnreachable"}`)
		if err == nil && len(series) == 0 {
			err = errors.New("no alert")
		}
		return err
	})
	fires("CredenceWebhookUnreachable")
	for n := range 3 {
		credence.Webhook.Stop(0)
		if err := credence.StartWebhook(t.Context(), webhookFlags...); err != nil {
			t.Fatal(err)
		}
		has(map[string]string{"restart": fmt.Sprintf(`changes(process_start_time_seconds{job="credence-webhook"}[1h]) > %d`, n)})
	}
	fires("CredenceRestarts")
	credence.Broker.ShutDown()
	fires("CredenceBrokerDown")

	has(selectors(t, alerts))
	// docs/testing.md has the number.
	if names := slices.Sorted(maps.Keys(fired)); len(names) != 15 {
		t.Errorf("%d of %d alerts fired: %q", len(names), len(alerts), names)
	}
}

// scrapeConfig returns the configuration of Prometheus for the programs and the API server, with labels as the Prometheus
// Operator adds them.
func scrapeConfig(t *testing.T) string {
	t.Helper()
	config, dir := control.Config(), t.TempDir()
	for name, data := range map[string][]byte{"ca": config.CAData, "cert": config.CertData, "key": config.KeyData} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text := fmt.Sprintf("- job_name: apiserver\n  scheme: https\n  tls_config: {ca_file: %[1]q, cert_file: %[2]q, key_file: %[3]q}\n  static_configs: [{targets: [%[4]q]}]\n",
		filepath.Join(dir, "ca"), filepath.Join(dir, "cert"), filepath.Join(dir, "key"), strings.TrimPrefix(config.Host, "https://"))
	for name, address := range map[string]string{"credence-broker": credence.Broker.Admin, "credence-webhook": credence.Webhook.Admin} {
		text += fmt.Sprintf("- job_name: %[1]s\n  static_configs: [{targets: [%[2]q], labels: {namespace: credence, pod: %[1]s-0}}]\n", name, address)
	}
	return text
}

// grafanaQueries returns the queries of the dashboard by their panels, with the values of its variables.
func grafanaQueries(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../charts/credence/dashboards/credence.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ RefID, Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, panel := range board.Panels {
		for _, target := range panel.Targets {
			all[panel.Title+" "+target.RefID] = strings.NewReplacer("$namespace", ".*", "$__rate_interval", "5m").Replace(target.Expr)
		}
	}
	if len(all) < 40 {
		t.Fatalf("the dashboard has %d queries", len(all))
	}
	return all
}

var (
	selector     = regexp.MustCompile(`\b(?:credence|apiserver|process|go)_[a-z_]+(?:\{[^}]*\})?`)
	alternatives = regexp.MustCompile(`(\w+)=~"([A-Z_|]+)"`)
	// fromOutside matches the labels that Prometheus adds or that differ between builds.
	fromOutside = regexp.MustCompile(`\b(?:namespace|pod|job|instance|goversion|version)="[^"]*",?`)
)

// selectors returns queries of the selectors of the alerts, one for each alternative of a label, and those of the series with which
// promtool tests the alerts.
func selectors(t *testing.T, alerts []chart.Alert) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, alert := range alerts {
		for _, found := range selector.FindAllString(alert.Expr, -1) {
			match := alternatives.FindStringSubmatch(found)
			if match == nil {
				all[alert.Alert+": "+found] = "last_over_time(" + found + "[10m])"
				continue
			}
			for value := range strings.SplitSeq(match[2], "|") {
				one := strings.Replace(found, match[0], match[1]+`="`+value+`"`, 1)
				all[alert.Alert+": "+one] = "last_over_time(" + one + "[10m])"
			}
		}
	}
	text, err := os.ReadFile("chart/testdata/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Alert  string
		Series map[string]string
	}
	if err := yaml.Unmarshal(text, &cases); err != nil {
		t.Fatal(err)
	}
	recorded := 0
	for _, c := range cases {
		for series := range c.Series {
			recorded++
			if !strings.Contains(series, `namespace="other"`) {
				all["a case of "+c.Alert+": "+series] = "last_over_time(" + fromOutside.ReplaceAllString(series, "") + "[10m])"
			}
		}
	}
	if len(all) < 60 || recorded < 40 {
		t.Fatalf("found %d selectors and %d recorded series", len(all), recorded)
	}
	return all
}
