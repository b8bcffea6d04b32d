package admin

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
)

// Buckets of the webhook's histograms.
var (
	// In seconds. A review takes a millisecond, or waits for the API server to tell of a namespace.
	reviewBuckets = []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5}
	// In bytes. A pod of one container takes 3 kB, each further container 0.5 kB.
	patchBuckets = []float64{2e3, 4e3, 8e3, 16e3, 32e3, 64e3, 128e3}
)

// decisions are what becomes of a review, as package webhook names them.
var decisions = []string{"untouched", "injected", "complete", "refused"}

// WebhookMetrics are the metrics of the webhook; like [Metrics], with few series. Make them with
// [NewWebhookMetrics]. Their methods may be called concurrently.
type WebhookMetrics struct {
	registry *prometheus.Registry
	log      *slog.Logger

	reviews  map[string]prometheus.Counter
	refusals map[credential.Reason]prometheus.Counter
	took     prometheus.Histogram
	patch    prometheus.Histogram
}

// WebhookSources are asked at each scrape, as [Sources] are, but all of them are required.
type WebhookSources struct {
	Certificate func() time.Time               // end of validity of the serving certificate; zero: unknown
	InformerAge func() time.Duration           // since the watch last heard from the API server; 0: at present
	LiveReads   func() (made, refused uint64)  // reads past the watch
	RulesFile   func() (f RulesFile, has bool) // false where there is none
	// SettingsFile is the file with settings of the sidecar, as RulesFile.
	SettingsFile func() (f RulesFile, has bool)
	Connections  func() connlimit.Stats
}

// NewWebhookMetrics returns metrics of a webhook of that version, with what is known of the process itself.
func NewWebhookMetrics(version string, sources WebhookSources, log *slog.Logger) (*WebhookMetrics, error) {
	if log == nil || sources.Certificate == nil || sources.InformerAge == nil || sources.LiveReads == nil || sources.RulesFile == nil || sources.SettingsFile == nil || sources.Connections == nil {
		return nil, errors.New("metrics of the webhook need a Logger and all sources")
	}
	m := &WebhookMetrics{
		registry: prometheus.NewRegistry(), log: log,
		reviews: make(map[string]prometheus.Counter), refusals: make(map[credential.Reason]prometheus.Counter),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: ofWebhook + "review_duration_seconds", Buckets: reviewBuckets,
			Help: "Time from the arrival of an admission review to its answer.",
		}),
		patch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: ofWebhook + "patch_bytes", Buckets: patchBuckets,
			Help: "Length of the patches of pods that were injected.",
		}),
	}
	reviews := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: ofWebhook + "reviews_total",
		Help: "Admission reviews by decision: untouched (no new annotated pod), injected, complete (called again, nothing to add), refused.",
	}, []string{"decision"})
	refusals := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: ofWebhook + "refusals_total",
		Help: "Pods that were refused, by the reason of docs/errors.md.",
	}, []string{"reason"})
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: ofWebhook + "build_info",
		Help: "Always 1. The labels tell the version of this webhook and of Go.",
	}, []string{"version", "goversion"})
	for _, c := range []prometheus.Collector{
		m.took, m.patch, reviews, refusals, build, sources.watched(),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	for _, decision := range decisions {
		m.reviews[decision] = reviews.WithLabelValues(decision)
	}
	for _, reason := range credential.Reasons() {
		m.refusals[reason] = refusals.WithLabelValues(string(reason))
	}
	build.WithLabelValues(version, runtime.Version()).Set(1)
	return m, nil
}

// Review counts a review that was answered: what was decided, why it was refused, "" when it was not, how long it
// took, and how long the patch is, 0 without one.
func (m *WebhookMetrics) Review(decision string, reason credential.Reason, took time.Duration, patchBytes int) {
	m.took.Observe(took.Seconds())
	if counter, known := m.reviews[decision]; known {
		counter.Inc()
	}
	if patchBytes > 0 {
		m.patch.Observe(float64(patchBytes))
	}
	if reason == "" {
		return
	}
	counter, known := m.refusals[reason]
	if !known {
		counter = m.refusals[credential.ReasonInternal] // A reason that is not declared is a fault of ours.
	}
	counter.Inc()
}

// Handler serves the metrics in the forms that Prometheus asks for.
func (m *WebhookMetrics) Handler() http.Handler { return serve(m.registry, m.log) }

func (s WebhookSources) watched() sourced {
	// The same facts as a broker's, under other names.
	named := func(name, help string, kind prometheus.ValueType, labels ...string) number {
		return number{desc: prometheus.NewDesc(ofWebhook+name, help, labels, nil), kind: kind}
	}
	end := named("certificate_expiry_timestamp_seconds", "End of validity of the certificate that is served, in seconds since 1970.", prometheus.GaugeValue)
	age := named("informer_age_seconds", "Time since the watch on namespaces last heard from the API server; 0 while it does.", prometheus.GaugeValue)
	reads := named("live_reads_total", "Reads of the API server for namespaces that the watch may be behind of, by outcome: made, or refused by their bounds.", prometheus.CounterValue, "outcome")
	fine := named("rules_file_ok", "1 when the rules in force are what their file holds, 0 when the file cannot be taken; absent without a file.", prometheus.GaugeValue)
	settled := named("sidecar_settings_file_ok", "1 when the sidecar settings in force are what their file holds, 0 when the file cannot be taken; absent without a file.", prometheus.GaugeValue)
	ok := func(file func() (RulesFile, bool)) func() (float64, bool) {
		return func() (float64, bool) {
			f, has := file()
			if f.OK {
				return 1, has
			}
			return 0, has
		}
	}
	open := named("connections", connectionsHelp, prometheus.GaugeValue, "state")
	closed := named("connections_closed_total", connectionsClosedHelp, prometheus.CounterValue, "cause")
	return sourced{
		watchConnections(open, closed, s.Connections),
		when(end, func() (float64, bool) { end := s.Certificate(); return unix(end), !end.IsZero() }),
		always(age, func() float64 { return s.InformerAge().Seconds() }),
		{[]number{reads}, func(emit func(number, float64, ...string)) {
			made, refused := s.LiveReads()
			emit(reads, float64(made), "made")
			emit(reads, float64(refused), "refused")
		}},
		when(fine, ok(s.RulesFile)),
		when(settled, ok(s.SettingsFile)),
	}
}
