package admin_test

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
)

func webhookSources() admin.WebhookSources {
	return admin.WebhookSources{
		Certificate: func() time.Time { return time.Unix(1_800_000_000, 0) },
		InformerAge: func() time.Duration { return 14 * time.Second },
		LiveReads:   func() (made, refused uint64) { return 20, 21 },
		RulesFile:   func() (admin.RulesFile, bool) { return admin.RulesFile{OK: true}, true },
		// One that cannot be taken.
		SettingsFile: func() (admin.RulesFile, bool) { return admin.RulesFile{}, true },
		Connections:  func() connlimit.Stats { return connectionStats },
	}
}

func newWebhookMetrics(t *testing.T) *admin.WebhookMetrics {
	t.Helper()
	m, err := admin.NewWebhookMetrics("v1.2.3", webhookSources(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func scrapeWebhook(t *testing.T, m *admin.WebhookMetrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	admin.Handler(m.Handler()).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("/metrics answers %d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestWebhookMetrics(t *testing.T) {
	m := newWebhookMetrics(t)
	m.Review("injected", "", 2*time.Millisecond, 3000)
	m.Review("untouched", "", 2*time.Millisecond, 0)
	m.Review("refused", credential.ReasonRoleNotPermitted, 20*time.Millisecond, 0)
	for i := range 5000 { // which nobody has declared
		m.Review(fmt.Sprint("decision", i), credential.Reason(fmt.Sprint("REASON_", i)), time.Second, 0)
	}
	text := scrapeWebhook(t, m)
	for _, want := range []string{
		`reviews_total{decision="injected"} 1`, `reviews_total{decision="untouched"} 1`, `reviews_total{decision="complete"} 0`, `reviews_total{decision="refused"} 1`,
		`refusals_total{reason="ROLE_NOT_PERMITTED"} 1`, `refusals_total{reason="INTERNAL"} 5000`, `refusals_total{reason="POD_UNSUPPORTED"} 0`,
		`review_duration_seconds_bucket{le="0.0025"} 2`, `review_duration_seconds_count 5003`,
		`patch_bytes_bucket{le="2000"} 0`, `patch_bytes_bucket{le="4000"} 1`, `patch_bytes_count 1`,
		`certificate_expiry_timestamp_seconds 1.8e+09`, `informer_age_seconds 14`, `rules_file_ok 1`, `sidecar_settings_file_ok 0`,
		`live_reads_total{outcome="made"} 20`, `live_reads_total{outcome="refused"} 21`, `build_info{goversion="go`,
		`connections{state="unauthenticated"} 31`, `connections_closed_total{cause="crowded"} 34`,
	} {
		if !strings.Contains(text, "\ncredence_webhook_"+want) {
			t.Errorf("there is no %s", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
	var own strings.Builder
	for line := range strings.Lines(text) {
		for _, match := range regexp.MustCompile(`[{,]([a-z_]+)="`).FindAllStringSubmatch(line, -1) {
			if strings.HasPrefix(line, "credence_") && !slices.Contains([]string{"cause", "decision", "state", "outcome", "reason", "le", "version", "goversion"}, match[1]) {
				t.Errorf("the label %s is not known to have few values: %s", match[1], line)
			}
		}
		if strings.Contains(line, "credence_webhook_") {
			own.WriteString(line)
		}
	}
	problems, err := promlint.New(strings.NewReader(own.String())).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestWebhookMetricsNeedTheirSources(t *testing.T) {
	for name, change := range map[string]func(*admin.WebhookSources){
		"certificate": func(s *admin.WebhookSources) { s.Certificate = nil }, "informer": func(s *admin.WebhookSources) { s.InformerAge = nil },
		"live reads": func(s *admin.WebhookSources) { s.LiveReads = nil }, "rules": func(s *admin.WebhookSources) { s.RulesFile = nil },
		"settings": func(s *admin.WebhookSources) { s.SettingsFile = nil },
	} {
		sources := webhookSources()
		change(&sources)
		if _, err := admin.NewWebhookMetrics("v1", sources, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("without %s there are metrics", name)
		}
	}
}
