package metrics_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/webhook"
	"github.com/credence-iam/credence/webhook/metrics"
)

func sources() metrics.Sources {
	return metrics.Sources{
		Ready:        func() bool { return true },
		Certificate:  func() time.Time { return time.Unix(1_800_000_000, 0) },
		InformerAge:  func() time.Duration { return 14 * time.Second },
		LiveReads:    func() (made, refused uint64) { return 20, 21 },
		RulesFile:    func() (ok, configured bool) { return true, true },
		SettingsFile: func() (ok, configured bool) { return false, true },
		Connections: func() connlimit.Stats {
			return connlimit.Stats{Unauthenticated: 31, Authenticated: 32, Waiting: 33, Closed: [3]uint64{34, 35, 36}}
		},
	}
}

func newMetrics(t *testing.T, sources metrics.Sources) *metrics.Metrics {
	t.Helper()
	m, err := metrics.New("v1.2.3", sources)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// family is one metric of the webhook.
type family struct {
	name, kind, labels, help string
	samples                  []string // "name{label=value} value", without the prefix of the name
}

// families returns the webhook's own metrics, without those of the process.
func families(t *testing.T, m *metrics.Metrics) (all []family) {
	t.Helper()
	gathered, err := m.Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range gathered {
		name, own := strings.CutPrefix(f.GetName(), "credence_webhook_")
		if !own {
			continue
		}
		one := family{name: f.GetName(), kind: strings.ToLower(f.GetType().String()), help: f.GetHelp()}
		for _, metric := range f.GetMetric() {
			var labels []string
			sample := name
			for _, l := range metric.GetLabel() {
				labels = append(labels, l.GetName())
				sample += "{" + l.GetName() + "=" + l.GetValue() + "}"
			}
			one.labels = strings.Join(labels, ", ")
			if h := metric.GetHistogram(); h != nil {
				one.samples = append(one.samples, fmt.Sprintf("%s count %d", sample, h.GetSampleCount()))
				for _, b := range h.GetBucket() {
					one.samples = append(one.samples, fmt.Sprintf("%s le %v %d", sample, b.GetUpperBound(), b.GetCumulativeCount()))
				}
				continue
			}
			one.samples = append(one.samples, fmt.Sprintf("%s %v", sample, metric.GetGauge().GetValue()+metric.GetCounter().GetValue()))
		}
		all = append(all, one)
	}
	if len(all) < 8 {
		t.Fatalf("webhook has %d metrics, want at least 8", len(all))
	}
	return all
}

func samples(t *testing.T, m *metrics.Metrics) (all []string) {
	t.Helper()
	for _, f := range families(t, m) {
		all = append(all, f.samples...)
	}
	return all
}

func TestMetrics(t *testing.T) {
	m := newMetrics(t, sources())
	m.Observe(webhook.Observation{Decision: "injected", Duration: 2 * time.Millisecond, PatchBytes: 3000})
	m.Observe(webhook.Observation{Decision: "untouched", Duration: 2 * time.Millisecond})
	m.Observe(webhook.Observation{Decision: "refused", Reason: credential.ReasonRoleNotPermitted, Duration: 20 * time.Millisecond})
	for i := range 5000 { // No code declares these.
		m.Observe(webhook.Observation{Decision: fmt.Sprint("decision", i), Reason: credential.Reason(fmt.Sprint("REASON_", i)), Duration: time.Second})
	}
	got := samples(t, m)
	for _, want := range []string{
		`reviews_total{decision=injected} 1`, `reviews_total{decision=untouched} 1`, `reviews_total{decision=complete} 0`, `reviews_total{decision=refused} 1`,
		`refusals_total{reason=ROLE_NOT_PERMITTED} 1`, `refusals_total{reason=INTERNAL} 5000`, `refusals_total{reason=POD_UNSUPPORTED} 0`,
		`review_duration_seconds le 0.0025 2`, `review_duration_seconds count 5003`,
		`patch_bytes le 2000 0`, `patch_bytes le 4000 1`, `patch_bytes count 1`,
		`ready 1`, `certificate_expiry_timestamp_seconds 1.8e+09`, `informer_age_seconds 14`, `rules_file_ok 1`, `sidecar_settings_file_ok 0`,
		`live_reads_total{outcome=made} 20`, `live_reads_total{outcome=refused} 21`,
		`connections{state=unauthenticated} 31`, `connections{state=waiting} 33`, `connections_closed_total{cause=crowded} 34`,
	} {
		if !slices.Contains(got, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if len(got) > 120 {
		t.Errorf("%d samples after 5000 undeclared decisions and reasons, want few", len(got))
	}
	if t.Failed() {
		t.Log(strings.Join(got, "\n"))
	}
	gathered, err := m.Registry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(gathered).Lint()
	if err != nil {
		t.Fatal(err)
	}
	problems = slices.DeleteFunc(problems, func(p promlint.Problem) bool { return !strings.HasPrefix(p.Metric, "credence_") })
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// TestUnknownValues: a value that is not known is absent, not zero.
func TestUnknownValues(t *testing.T) {
	s := sources()
	s.Certificate = func() time.Time { return time.Time{} }
	s.RulesFile = func() (ok, configured bool) { return false, false }
	s.SettingsFile = s.RulesFile
	for _, sample := range samples(t, newMetrics(t, s)) {
		if strings.HasPrefix(sample, "certificate_") || strings.Contains(sample, "_file_ok") {
			t.Errorf("metrics have %s", sample)
		}
	}
}

func TestAllSourcesAreRequired(t *testing.T) {
	for name, change := range map[string]func(*metrics.Sources){
		"ready": func(s *metrics.Sources) { s.Ready = nil }, "certificate": func(s *metrics.Sources) { s.Certificate = nil }, "informer": func(s *metrics.Sources) { s.InformerAge = nil },
		"live reads": func(s *metrics.Sources) { s.LiveReads = nil }, "rules": func(s *metrics.Sources) { s.RulesFile = nil },
		"settings": func(s *metrics.Sources) { s.SettingsFile = nil }, "connections": func(s *metrics.Sources) { s.Connections = nil },
	} {
		s := sources()
		change(&s)
		if _, err := metrics.New("v1", s); err == nil {
			t.Errorf("New without %s: no error", name)
		}
	}
}

// TestPage: the table of docs/metrics.md has each metric with its type, labels and help, and no other.
func TestPage(t *testing.T) {
	text, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(text), "<!-- metrics of the webhook:")
	table, _, ok2 := strings.Cut(table, "<!-- end of metrics of the webhook -->")
	if !ok || !ok2 {
		t.Fatal("docs/metrics.md has no table of the webhook's metrics")
	}
	var rows []string // up to the last column, which the page's author writes
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if !strings.HasPrefix(line, "| `credence_") {
			continue
		}
		if len(cells) != 5 || !strings.HasSuffix(cells[4], ". |") {
			t.Errorf("row has no sentence on when to worry: %s", line)
			continue
		}
		rows = append(rows, strings.Join(cells[:4], " | "))
	}
	var want []string
	for _, f := range families(t, newMetrics(t, sources())) {
		want = append(want, fmt.Sprintf("| `%s` | %s | %s | %s", f.name, f.kind, f.labels, f.help))
	}
	if !slices.Equal(rows, want) {
		t.Errorf("rows of docs/metrics.md are\n%s\nwant\n%s", strings.Join(rows, "\n"), strings.Join(want, "\n"))
	}
}
