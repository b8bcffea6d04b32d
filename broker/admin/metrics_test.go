package admin_test

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
)

var update = flag.Bool("update", false, "regenerate the table of docs/metrics.md, except its last column")

const metricsPage = "../../docs/metrics.md"

func newMetrics(t *testing.T) *admin.Metrics {
	t.Helper()
	m, err := admin.NewMetrics("v1.2.3", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// scrape returns what Prometheus reads.
func scrape(t *testing.T, m *admin.Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	admin.Handler(m.Handler()).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("GET /metrics: %d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// Only one scrape runs at a time, and the others wait. A client that scrapes all the time does not keep Prometheus out.
func TestScrapesWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMetrics(t)
		sources := everything()
		var inFlight, peak atomic.Int32
		sources.Audit = func() admin.AuditStats {
			peak.Store(max(peak.Load(), inFlight.Add(1)))
			time.Sleep(time.Second)
			inFlight.Add(-1)
			return admin.AuditStats{}
		}
		if err := m.Watch(sources); err != nil {
			t.Fatal(err)
		}
		handler := m.Handler()
		var codes []int
		var mu sync.Mutex
		var scrapes sync.WaitGroup
		for range 12 {
			scrapes.Go(func() {
				w := httptest.NewRecorder()
				handler.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
				mu.Lock()
				defer mu.Unlock()
				codes = append(codes, w.Code)
			})
		}
		time.Sleep(5500 * time.Millisecond)
		if mu.Lock(); len(codes) != 5 || slices.ContainsFunc(codes, func(code int) bool { return code != http.StatusOK }) {
			t.Errorf("after 5.5 s of scrapes that take a second each, the responses are %v", codes)
		}
		mu.Unlock()
		scrapes.Wait()
		time.Sleep(time.Second) // a scrape that began as its time was up still runs
		if n := peak.Load(); n != 1 {
			t.Errorf("%d scrapes ran at a time", n)
		}
		if slices.Sort(codes); len(codes) != 12 || codes[8] != http.StatusOK || codes[11] != http.StatusServiceUnavailable {
			t.Errorf("of scrapes that wait for at most 10 s, the responses are %v", codes)
		}
	})
}

var stats = cache.Stats{
	Active: 11, Warm: 10, Refused: 1, Entries: 12, Waiting: 1, Renewing: 2, Ahead: 3, InFlight: 4, Rate: 400, Stalest: 90 * time.Second, StalestPart: 0.25,
	Hits: 100, Misses: 20, Stale: 5, Fetched: 30, Failed: 6,
	Share: 410, Demand: 1.5, Late: 24, ForCallers: 25, Renewals: 26, Prefetches: 27,
}

var connectionStats = connlimit.Stats{Unauthenticated: 31, Authenticated: 32, Waiting: 33, Closed: [3]uint64{34, 35, 36}}

// everything returns all sources.
func everything() admin.Sources {
	at := time.Unix(1_800_000_000, 500_000_000)
	return admin.Sources{
		Cache:           func() cache.Stats { return stats },
		Audit:           func() admin.AuditStats { return admin.AuditStats{Queued: 7, Capacity: 8192, Lost: 8} },
		Ready:           func() bool { return true },
		TrustOK:         func() bool { return false },
		LiveReads:       func() (made, refused uint64) { return 20, 21 },
		TokenReviews:    func() (inFlight, limit int) { return 22, 23 },
		TokensWaiting:   func() int { return 24 },
		Events:          func() admin.EventStats { return admin.EventStats{Queued: 9, Written: 10, Suppressed: 18, Dropped: 11} },
		PodsQueued:      func() int { return 12 },
		Certificate:     func() time.Time { return at },
		OwnCredentials:  func() (time.Time, bool) { return at, true },
		ClockSkew:       func() (time.Duration, bool) { return -1500 * time.Millisecond, true },
		InformerAge:     func() time.Duration { return 14 * time.Second },
		VerificationAge: func() time.Duration { return 15 * time.Second },
		RulesFile:       func() (admin.RulesFile, bool) { return admin.RulesFile{Loaded: at, OK: true}, true },
		Spans:           func() admin.SpanStats { return admin.SpanStats{Ended: 16, Exported: 17} },
		Connections:     func() connlimit.Stats { return connectionStats },
	}
}

func TestSourcesAreScraped(t *testing.T) {
	m := newMetrics(t)
	if err := m.Watch(everything()); err != nil {
		t.Fatal(err)
	}
	m.Answer("", time.Millisecond)
	m.Answer(credential.ReasonRoleNotPermitted, 3*time.Second)
	m.Answer("NOT_DECLARED", time.Minute)
	m.STSCall("AssumeRole", "ok", 70*time.Millisecond)
	m.STSCall("AssumeRole", "STS_THROTTLED", 40*time.Millisecond)
	m.STSCall("GetCallerIdentity", "ok", 40*time.Millisecond)
	m.STSCall("OwnCredentials", "BROKER_CREDENTIALS", 40*time.Millisecond)
	m.STSCall("SomethingElse", "unknown text", 40*time.Millisecond)
	text := scrape(t, m)
	for _, want := range []string{
		`fetches_queued{kind="waiting"} 1`, `fetches_queued{kind="renewing"} 2`, `fetches_queued{kind="ahead"} 3`,
		`fetches_in_flight 4`, `fetch_rate_limit 400`, `fetch_rate_share 410`, `fetch_rate_demand 1.5`, `sessions_late 24`,
		`fetches_begun_total{cause="caller"} 25`, `fetches_begun_total{cause="renewal"} 26`, `fetches_begun_total{cause="prefetch"} 27`,
		`fetches_total{outcome="ok"} 30`, `fetches_total{outcome="failed"} 6`,
		`sessions_kept 11`, `sessions_warm 10`, `sessions_known 12`, `stalest_session_seconds 90`, `stalest_session_ratio 0.25`, `trust_ok 0`,
		`lookups_total{outcome="hit"} 100`, `lookups_total{outcome="miss"} 20`, `lookups_total{outcome="stale"} 5`,
		`audit_lines_queued 7`, `audit_lines_queued_max 8192`, `audit_lines_lost_total 8`,
		`ready 1`, `live_reads_total{outcome="made"} 20`, `live_reads_total{outcome="refused"} 21`, `token_reviews_in_flight 22`, `token_reviews_in_flight_max 23`, `tokens_waiting 24`,
		`events_queued 9`, `events_total{outcome="written"} 10`, `events_total{outcome="dropped"} 11`, `events_total{outcome="suppressed"} 18`,
		`pods_queued 12`, `sessions_refused 1`,
		`certificate_expiry_timestamp_seconds 1.8000000005e+09`, `base_credentials_expiry_timestamp_seconds 1.8000000005e+09`,
		`clock_skew_seconds -1.5`, `informer_age_seconds 14`, `token_verification_age_seconds 15`,
		`rules_file_loaded_timestamp_seconds 1.8000000005e+09`, `rules_file_ok 1`,
		`trace_spans_total{outcome="ended"} 16`, `trace_spans_total{outcome="exported"} 17`,
		`answers_total{outcome="allowed"} 1`, `answers_total{outcome="refused"} 2`,
		`refusals_total{reason="ROLE_NOT_PERMITTED"} 1`, `refusals_total{reason="INTERNAL"} 1`, `refusals_total{reason="TOKEN_EXPIRED"} 0`,
		`answer_duration_seconds_bucket{le="0.001"} 1`, `answer_duration_seconds_bucket{le="5"} 2`, `answer_duration_seconds_count 3`,
		`sts_calls_total{action="AssumeRole",outcome="ok"} 1`, `sts_calls_total{action="AssumeRole",outcome="STS_THROTTLED"} 1`,
		`sts_calls_total{action="other",outcome="INTERNAL"} 1`, `sts_calls_total{action="GetCallerIdentity",outcome="ok"} 1`, `sts_calls_total{action="OwnCredentials",outcome="BROKER_CREDENTIALS"} 1`,
		`sts_call_duration_seconds_bucket{action="AssumeRole",le="0.05"} 1`, `sts_call_duration_seconds_bucket{action="AssumeRole",le="0.1"} 2`,
		`connections{state="unauthenticated"} 31`, `connections{state="authenticated"} 32`, `connections{state="waiting"} 33`,
		`connections_closed_total{cause="crowded"} 34`, `connections_closed_total{cause="late"} 35`, `connections_closed_total{cause="flood"} 36`,
		`build_info{goversion="go`,
	} {
		if !strings.Contains(text, "\ncredence_broker_"+want) {
			t.Errorf("the scrape lacks %s", want)
		}
	}
	for _, want := range []string{"\ngo_goroutines ", "\nprocess_open_fds "} {
		if !strings.Contains(text, want) {
			t.Errorf("the scrape lacks %s", want)
		}
	}
	if strings.Contains(text, "unknown text") || strings.Contains(text, "NOT_DECLARED") {
		t.Error("a label has an undeclared value")
	}
	if t.Failed() {
		t.Log(text)
	}
}

// A source that is nil or does not know its value has no metric, because 0 would be a value.
func TestUnknownValuesAreAbsent(t *testing.T) {
	m := newMetrics(t)
	before := scrape(t, m)
	for _, name := range []string{"sessions_kept", "audit_lines", "events", "pods_queued", "expiry", "clock_skew", "age_seconds", "rules_file", "spans"} {
		if strings.Contains(before, "credence_broker_"+name) {
			t.Errorf("%s is present without a source", name)
		}
	}
	if err := m.Watch(admin.Sources{
		Cache:          func() cache.Stats { return cache.Stats{} },
		Certificate:    func() time.Time { return time.Time{} },
		OwnCredentials: func() (time.Time, bool) { return time.Time{}, false },
		ClockSkew:      func() (time.Duration, bool) { return 0, false },
		RulesFile:      func() (admin.RulesFile, bool) { return admin.RulesFile{}, false },
	}); err != nil {
		t.Fatal(err)
	}
	text := scrape(t, m)
	for _, name := range []string{"expiry", "clock_skew", "rules_file", "stalest"} {
		if regexp.MustCompile(`(?m)^credence_broker_[a-z_]*` + name).MatchString(text) {
			t.Errorf("%s is present although its value is unknown", name)
		}
	}
	if !strings.Contains(text, "credence_broker_sessions_kept 0\n") {
		t.Error("a value of 0 is absent")
	}
	if err := m.Watch(admin.Sources{Cache: func() cache.Stats { return cache.Stats{} }}); err == nil {
		t.Error("Watch accepts a source twice")
	}
	if err := m.Watch(admin.Sources{}); err == nil {
		t.Error("Watch accepts no source")
	}
}

// No label depends on the names or requests of pods.
func TestNumberOfSeriesIsLimited(t *testing.T) {
	m := newMetrics(t)
	if err := m.Watch(everything()); err != nil {
		t.Fatal(err)
	}
	for i := range 5000 {
		m.Answer(credential.Reason(fmt.Sprint("REASON_", i)), time.Second)
		m.STSCall(fmt.Sprint("Action", i), fmt.Sprint("outcome", i), time.Second)
	}
	labels := regexp.MustCompile(`[{,]([a-z_]+)="`)
	series := 0
	for line := range strings.Lines(scrape(t, m)) {
		if !strings.HasPrefix(line, "credence_broker_") {
			continue
		}
		series++
		for _, match := range labels.FindAllStringSubmatch(line, -1) {
			if !slices.Contains([]string{"action", "outcome", "kind", "cause", "reason", "state", "le", "version", "goversion"}, match[1]) {
				t.Errorf("the label %s may have many values: %s", match[1], line)
			}
		}
	}
	if series < 50 || series > 300 {
		t.Errorf("the scrape has %d series", series)
	}
}

func TestMetricsAreWellNamed(t *testing.T) {
	m := newMetrics(t)
	if err := m.Watch(everything()); err != nil {
		t.Fatal(err)
	}
	var own strings.Builder
	for line := range strings.Lines(scrape(t, m)) {
		if strings.Contains(line, "credence_broker_") {
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

// family is one metric of a scrape.
type family struct{ name, kind, labels, help string }

// families parses a scrape.
func families(t *testing.T, text string) []family {
	t.Helper()
	var all []family
	for block := range strings.SplitSeq(text, "# HELP ") {
		head, rest, ok := strings.Cut(block, "\n# TYPE ")
		name, help, ok2 := strings.Cut(head, " ")
		if !ok || !ok2 || !strings.HasPrefix(name, "credence_") {
			continue
		}
		_, kind, _ := strings.Cut(strings.SplitN(rest, "\n", 2)[0], " ")
		var labels []string
		for _, match := range regexp.MustCompile(`[{,]([a-z_]+)="`).FindAllStringSubmatch(rest, -1) {
			if match[1] != "le" && !slices.Contains(labels, match[1]) {
				labels = append(labels, match[1])
			}
		}
		slices.Sort(labels)
		all = append(all, family{name, kind, strings.Join(labels, ", "), help})
	}
	if len(all) < 8 {
		t.Fatalf("the scrape has only %d metrics", len(all))
	}
	return all
}

// docs/metrics.md has exactly the metrics of a scrape, with their HELP texts.
func TestPage(t *testing.T) {
	m := newMetrics(t)
	if err := m.Watch(everything()); err != nil {
		t.Fatal(err)
	}
	m.STSCall("AssumeRole", "ok", time.Second)
	comparePage(t, "metrics", families(t, scrape(t, m)))
}

// comparePage compares the page's table between the comments of that name with a scrape.
func comparePage(t *testing.T, name string, scraped []family) {
	t.Helper()
	begin := "<!-- " + name + ": generated by go test ./broker/admin -update, except the last column -->\n"
	end := "<!-- end of " + name + " -->\n"
	text, err := os.ReadFile(filepath.FromSlash(metricsPage))
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	table, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no table between %q and %q", metricsPage, begin, end)
	}
	advice := map[string]string{}
	for line := range strings.Lines(table) {
		if cells := strings.Split(strings.TrimSpace(line), " | "); len(cells) == 5 && strings.HasPrefix(line, "| `") {
			advice[strings.Trim(cells[0], "| `")] = strings.TrimSuffix(cells[4], " |")
		}
	}
	var want strings.Builder
	want.WriteString("\n| metric | type | labels | what it is | when to worry |\n|---|---|---|---|---|\n")
	for _, f := range scraped {
		when := advice[f.name]
		if len(when) < 3 || !strings.HasSuffix(when, ".") {
			t.Errorf("%s: the page does not say when to worry, only %q", f.name, when)
		}
		delete(advice, f.name)
		_, _ = fmt.Fprintf(&want, "| `%s` | %s | %s | %s | %s |\n", f.name, f.kind, f.labels, f.help, when)
	}
	want.WriteString("\n")
	for name := range advice {
		t.Errorf("the page has %s, which no scrape has", name)
	}
	if *update {
		if err := os.WriteFile(filepath.FromSlash(metricsPage), []byte(before+begin+want.String()+end+after), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if table != want.String() {
		t.Errorf("the table of %s differs from a scrape; run go test ./broker/admin -update. Want:\n%s", metricsPage, want.String())
	}
}

// The pages, and the alerts and the dashboard of the chart, name only existing metrics and label values.
func TestNamesOfMetrics(t *testing.T) {
	m := newMetrics(t)
	if err := m.Watch(everything()); err != nil {
		t.Fatal(err)
	}
	m.STSCall("AssumeRole", string(credential.ReasonSTSThrottled), time.Second)
	scraped := scrape(t, m)
	known := map[string]bool{}
	for _, f := range families(t, scraped) {
		known[f.name] = true
		if f.kind == "histogram" {
			known[f.name+"_bucket"], known[f.name+"_count"], known[f.name+"_sum"] = true, true, true
		}
	}
	page, err := os.ReadFile(filepath.FromSlash(metricsPage))
	if err != nil {
		t.Fatal(err)
	}
	// A test of package webhook/metrics checks the webhook's rows.
	for _, row := range regexp.MustCompile("(?m)^\\| `(credence_webhook_[a-z_]+)` \\|").FindAllSubmatch(page, -1) {
		known[string(row[1])], known[string(row[1])+"_bucket"] = true, true
	}
	for file, least := range map[string]int{
		metricsPage: 40, "../../docs/operations.md": 5, "../../charts/credence/alerts.yaml": 25, "../../charts/credence/dashboards/credence.json": 50,
	} {
		text, err := os.ReadFile(filepath.FromSlash(file))
		if err != nil {
			t.Fatal(err)
		}
		found := regexp.MustCompile(`credence_(?:broker|webhook)_[a-z_]+[a-z]`).FindAllString(string(text), -1)
		if len(found) < least {
			t.Errorf("%s names %d metrics", file, len(found))
		}
		for _, name := range found {
			if !known[name] {
				t.Errorf("%s: %s is not a metric", file, name)
			}
		}
		if file == metricsPage {
			continue
		}
		queries := strings.ReplaceAll(string(text), `\"`, `"`)
		for _, match := range regexp.MustCompile(`(?:outcome|kind|reason|action|decision)(?:=|=~|!~)"([A-Za-z_|]+)"`).FindAllStringSubmatch(queries, -1) {
			for value := range strings.SplitSeq(match[1], "|") {
				if !strings.Contains(scraped, `="`+value+`"`) && !slices.Contains(credential.Reasons(), credential.Reason(value)) {
					t.Errorf("%s: no label has the value %q", file, value)
				}
			}
		}
	}
}

// Prometheus can read compressed metrics.
func TestMetricsOverHTTP(t *testing.T) {
	server := httptest.NewServer(admin.Handler(newMetrics(t).Handler()))
	defer server.Close()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := server.Client().Do(request) // which accepts gzip
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || !response.Uncompressed || !strings.Contains(string(text), "credence_broker_answers_total") {
		t.Errorf("%d bytes, compressed: %v, %v", len(text), response.Uncompressed, err)
	}
}
