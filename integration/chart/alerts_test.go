//go:build unix

package chart_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/prometheus"
)

const (
	metricsPage    = "../../docs/metrics.md"
	operationsPage = "../../docs/operations.md"
	dashboardFile  = "../../charts/credence/dashboards/credence.json"
)

// alerts returns the rules that the chart creates with these values.
func alerts(t *testing.T, set ...string) chart.RuleFile {
	t.Helper()
	file, err := chart.Alerts(t.Context(), chart.Config{Helm: helm, Set: set})
	if err != nil {
		t.Fatal(err)
	}
	if len(file.Groups[0].Rules) < 20 {
		t.Fatalf("the chart has %d alerts", len(file.Groups[0].Rules))
	}
	return file
}

// alertCase is a row of testdata/alerts.yaml.
type alertCase struct {
	Alert  string            `json:"alert"`
	Series map[string]string `json:"series"`
	At     string            `json:"at"`
	Fires  []struct {
		Labels      map[string]string `json:"labels"`
		Description string            `json:"description"`
	} `json:"fires"`
}

// TestAlertsFire lets promtool evaluate the rules with recorded series. Each alert must fire in a case, with its texts, and
// be quiet in another one.
func TestAlertsFire(t *testing.T) {
	t.Parallel()
	promtool := prometheus.Program(t, "promtool")
	text, err := os.ReadFile("testdata/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cases []alertCase
	if err := yaml.UnmarshalStrict(text, &cases); err != nil {
		t.Fatal(err)
	}
	rules := alerts(t)
	byName := map[string]chart.Alert{}
	for _, rule := range rules.Groups[0].Rules {
		byName[rule.Alert] = rule
	}
	type dict = map[string]any
	fires, quiet := map[string]bool{}, map[string]bool{}
	tests := []dict{}
	for _, c := range cases {
		rule, ok := byName[c.Alert]
		if !ok {
			t.Fatalf("testdata/alerts.yaml has a case of %s, which the chart lacks", c.Alert)
		}
		series, expected := []dict{}, []dict{}
		for _, name := range slices.Sorted(maps.Keys(c.Series)) {
			series = append(series, dict{"series": name, "values": c.Series[name]})
		}
		for _, one := range c.Fires {
			labels, annotations := maps.Clone(one.Labels), maps.Clone(rule.Annotations)
			maps.Copy(labels, rule.Labels)
			annotations["description"] = one.Description
			expected = append(expected, dict{"exp_labels": labels, "exp_annotations": annotations})
		}
		fires[c.Alert], quiet[c.Alert] = fires[c.Alert] || len(c.Fires) > 0, quiet[c.Alert] || len(c.Fires) == 0
		tests = append(tests, dict{
			"interval": "1m", "input_series": series,
			"alert_rule_test": []dict{{"eval_time": c.At, "alertname": c.Alert, "exp_alerts": expected}},
		})
	}
	for name := range byName {
		if !fires[name] || !quiet[name] {
			t.Errorf("%s needs a case in which it fires and a case in which it does not", name)
		}
	}
	dir := t.TempDir()
	for name, content := range map[string]any{
		"rules.yaml": rules,
		"tests.yaml": dict{"rule_files": []string{"rules.yaml"}, "evaluation_interval": "1m", "tests": tests},
	} {
		text, err := yaml.Marshal(content)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"check", "rules", "rules.yaml"}, {"test", "rules", "tests.yaml"}} {
		cmd := exec.CommandContext(t.Context(), promtool, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestAlertValues shows what the values of the PrometheusRule change.
func TestAlertValues(t *testing.T) {
	t.Parallel()
	rules := chart.Of[*chart.PrometheusRule](objects(t, "everything"))
	if len(rules) != 1 || rules[0].Namespace != "monitoring" || rules[0].Labels["release"] != "prometheus" {
		t.Fatalf("the rules are %+v", rules)
	}
	byName := map[string]chart.Alert{}
	for _, rule := range rules[0].Spec.Groups[0].Rules {
		byName[rule.Alert] = rule
	}
	defaults := alerts(t).Groups[0].Rules
	if _, ok := byName["CredencePodsRefused"]; ok || len(byName) != len(defaults)-1 {
		t.Errorf("there are %d alerts of %d, without the one that is disabled", len(byName), len(defaults))
	}
	slow, down := byName["CredenceSlow"], byName["CredenceBrokerDown"]
	if slow.For != "30m" || !strings.HasSuffix(slow.Expr, "> 5") || slow.Annotations["dashboard"] == "" || slow.Annotations["summary"] == "" {
		t.Errorf("the changed alert is %+v", slow)
	}
	if diff := cmp.Diff(map[string]string{"severity": "critical", "team": "identity"}, slow.Labels); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"severity": "critical", "team": "platform"}, down.Labels); diff != "" {
		t.Error(diff)
	}
	if got := down.Annotations["runbook_url"]; got != "https://runbooks.example.com/credence#credencebrokerdown" {
		t.Errorf("the runbook is %s", got)
	}
	for set, want := range map[string][2]string{
		"broker.replicas=5":           {"CredenceReplicasMissing", "(credence_broker_ready) > 0) < 5,"},
		"webhook.replicas=3":          {"CredenceReplicasMissing", "(credence_webhook_ready) > 0) < 3,"},
		"certificates.duration=2h30m": {"CredenceCertificateExpires", "(credence_webhook_certificate_expiry_timestamp_seconds) - time() < 1485,"},
		"certificates.duration=8760h": {"CredenceCertificateExpires", "- time() < 604800,"},
		"certificates.duration=2h,certificates.source=secrets,certificates.roots=" + roots: {"CredenceCertificateExpires", "- time() < 604800,"},
	} {
		found := false
		for _, rule := range alerts(t, set, "certificates.renewBeforePercentage=33").Groups[0].Rules {
			found = found || rule.Alert == want[0] && strings.Contains(rule.Expr, want[1])
		}
		if !found {
			t.Errorf("with %s, %s has not %q", set, want[0], want[1])
		}
	}
	var schema struct {
		Properties struct {
			Metrics struct {
				Properties struct {
					PrometheusRule struct {
						Properties struct {
							Alerts struct{ Properties map[string]any }
						}
					}
				}
			}
		}
	}
	text, err := os.ReadFile(schemaFile)
	if err == nil {
		err = json.Unmarshal(text, &schema)
	}
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, rule := range defaults {
		names = append(names, rule.Alert)
	}
	slices.Sort(names)
	if diff := cmp.Diff(names, slices.Sorted(maps.Keys(schema.Properties.Metrics.Properties.PrometheusRule.Properties.Alerts.Properties))); diff != "" {
		t.Errorf("alerts (-) and those that the schema lets users change (+):\n%s", diff)
	}
}

// roots are enough for the schema.
const roots = "-----BEGIN CERTIFICATE----- -----END CERTIFICATE-----"

// TestAlertPages compares the table of docs/metrics.md with the alerts, and requires a runbook of each alert in
// docs/operations.md, with its three parts.
func TestAlertPages(t *testing.T) {
	t.Parallel()
	const begin, end = "<!-- alerts: made from charts/credence/alerts.yaml by go test ./integration/chart -update -->\n", "<!-- end of alerts -->\n"
	page, err := os.ReadFile(metricsPage)
	if err != nil {
		t.Fatal(err)
	}
	operations, err := os.ReadFile(operationsPage)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(page), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks %q or %q", metricsPage, begin, end)
	}
	sections := map[string]string{}
	for section := range strings.SplitSeq(string(operations), "\n### ") {
		title, body, _ := strings.Cut(section, "\n")
		body, _, _ = strings.Cut(body, "\n## ")
		sections[title] = body
	}
	var table strings.Builder
	table.WriteString("\n| alert | severity | after | meaning |\n|---|---|---|---|\n")
	known := map[string]bool{}
	for _, rule := range alerts(t).Groups[0].Rules {
		known[rule.Alert] = true
		anchor := strings.ToLower(rule.Alert)
		_, _ = fmt.Fprintf(&table, "| [`%s`](operations.md#%s) | %s | %s | %s |\n", rule.Alert, anchor, rule.Labels["severity"], rule.For, rule.Annotations["summary"])
		if want := "https://github.com/credence-iam/credence/blob/main/docs/operations.md#" + anchor; rule.Annotations["runbook_url"] != want {
			t.Errorf("%s: the runbook is %s, want %s", rule.Alert, rule.Annotations["runbook_url"], want)
		}
		if !slices.Contains([]string{"critical", "warning", "info"}, rule.Labels["severity"]) || rule.Expr == "" {
			t.Errorf("%s: the severity is %q, the expression is %q", rule.Alert, rule.Labels["severity"], rule.Expr)
		}
		for _, name := range []string{"summary", "description"} {
			if text := rule.Annotations[name]; len(text) < 20 || !strings.HasSuffix(text, ".") {
				t.Errorf("%s: its %s is no sentence: %q", rule.Alert, name, text)
			}
		}
		if body := sections[rule.Alert]; !runbook.MatchString(body) {
			t.Errorf("%s: section %s must have what users notice, a first command, and numbered causes; it has:\n%s", operationsPage, rule.Alert, body)
		}
	}
	for title := range sections {
		if strings.HasPrefix(title, "Credence") && !known[title] {
			t.Errorf("%s has a section %s, which is no alert", operationsPage, title)
		}
	}
	table.WriteString("\n")
	want := before + begin + table.String() + end + after
	if *update {
		if err := os.WriteFile(metricsPage, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
	} else if want != string(page) {
		t.Errorf("the alerts in %s are not those of the chart; run go test ./integration/chart -update", metricsPage)
	}
}

// runbook matches the section of an alert.
var runbook = regexp.MustCompile(`(?s)^\n\*\*Users notice:\*\* .+\n\n\*\*First:\*\* .*\n\n    \S.*\n\*\*Causes, in order:\*\*\n\n1\. .+`)

// TestDashboard shows that the ConfigMap has the dashboard, and that Grafana can place and read it.
func TestDashboard(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	maps := configMaps(objects(t, "everything"), "credence-dashboard")
	if len(maps) != 1 || maps[0].Namespace != "monitoring" || maps[0].Annotations["grafana_folder"] != "Credence" || maps[0].Labels["grafana_dashboard"] != "credence" {
		t.Fatalf("the ConfigMaps are %+v", maps)
	}
	if got := maps[0].Data["credence.json"]; got != strings.TrimSuffix(string(text), "\n") {
		t.Errorf("the ConfigMap has %d bytes, the dashboard %d", len(got), len(text))
	}
	if got := configMaps(objectsWith(t, "metrics.grafanaDashboard.enabled=true"), "credence-dashboard"); len(got) != 1 ||
		got[0].Labels["grafana_dashboard"] != "1" || got[0].Annotations != nil || got[0].Namespace != chart.Namespace {
		t.Errorf("by default the ConfigMap is %+v", got)
	}
	var board struct {
		Panels []struct {
			ID                       int
			Type, Title, Description string
			GridPos                  struct{ X, Y, W, H int }
			Targets                  []struct{ Expr string }
			Datasource               struct{ UID string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	ids, cells, queries := map[int]bool{}, map[[2]int]string{}, 0
	for _, panel := range board.Panels {
		if ids[panel.ID] || panel.ID == 0 {
			t.Errorf("panel %q has the number %d of another one", panel.Title, panel.ID)
		}
		ids[panel.ID] = true
		for x := panel.GridPos.X; x < panel.GridPos.X+panel.GridPos.W; x++ {
			for y := panel.GridPos.Y; y < panel.GridPos.Y+panel.GridPos.H; y++ {
				if other := cells[[2]int{x, y}]; other != "" || x > 23 {
					t.Fatalf("panel %q covers %q, or is outside", panel.Title, other)
				}
				cells[[2]int{x, y}] = panel.Title
			}
		}
		if panel.Type == "row" {
			continue
		}
		if panel.Description == "" || !strings.HasSuffix(panel.Description, ".") || len(panel.Targets) == 0 || panel.Datasource.UID != "${datasource}" {
			t.Errorf("panel %q needs a description, a query and the data source of the dashboard", panel.Title)
		}
		for _, target := range panel.Targets {
			queries++
			for _, variable := range regexp.MustCompile(`\$\w+`).FindAllString(target.Expr, -1) {
				if variable != "$namespace" && variable != "$__rate_interval" {
					t.Errorf("panel %q uses %s", panel.Title, variable)
				}
			}
		}
	}
	if queries < 40 {
		t.Errorf("the dashboard has %d queries", queries)
	}
}

// objectsWith renders the chart with these values.
func objectsWith(t *testing.T, set ...string) []runtime.Object {
	t.Helper()
	rendered, err := chart.Render(t.Context(), chart.Config{Helm: helm, Set: set})
	if err != nil {
		t.Fatal(err)
	}
	all, err := chart.Decode(rendered)
	if err != nil {
		t.Fatal(err)
	}
	return all
}
