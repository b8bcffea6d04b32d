// Package metrics has the Prometheus metrics of the webhook.
//
// It guarantees few series: labels hold decisions, reasons, states and causes, never a namespace or a pod. All series of
// reviews exist from the start, at zero, because an alert on a rate misses the first increase of a new series. It serves
// nothing: package admin does.
package metrics

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/webhook"
)

// Buckets of the histograms.
var (
	// In seconds. A review takes a millisecond, or waits for the API server to read a namespace.
	reviewBuckets = []float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5}
	// In bytes. The patch of a pod with one container has 3 kB, and 0.5 kB more for each further container.
	patchBuckets = []float64{2e3, 4e3, 8e3, 16e3, 32e3, 64e3, 128e3}
)

// prefix starts the name of each metric.
const prefix = "credence_webhook_"

// Metrics counts reviews, and reads its sources at each scrape. Make it with [New]. Its methods may be called
// concurrently.
type Metrics struct {
	registry *prometheus.Registry
	reviews  map[string]prometheus.Counter
	refusals map[credential.Reason]prometheus.Counter
	duration prometheus.Histogram
	patch    prometheus.Histogram
}

// Sources are called at each scrape, from several goroutines. They must not block. All are required.
type Sources struct {
	Ready        func() bool
	Certificate  func() time.Time              // end of validity of the serving certificate; zero: unknown
	InformerAge  func() time.Duration          // time since the namespace watch last worked; 0 while it works
	LiveReads    func() (made, refused uint64) // reads of namespaces that bypass the watch cache
	RulesFile    func() (ok, configured bool)  // whether the rules in force are those of the file
	SettingsFile func() (ok, configured bool)  // the same for the file with sidecar settings
	Connections  func() connlimit.Stats
}

// New returns the metrics of a webhook of the given version, including those of its process.
func New(version string, sources Sources) (*Metrics, error) {
	if sources.Ready == nil || sources.Certificate == nil || sources.InformerAge == nil || sources.LiveReads == nil || sources.RulesFile == nil || sources.SettingsFile == nil || sources.Connections == nil {
		return nil, errors.New("metrics of the webhook need all sources")
	}
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		reviews:  make(map[string]prometheus.Counter), refusals: make(map[credential.Reason]prometheus.Counter),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: prefix + "review_duration_seconds", Buckets: reviewBuckets,
			Help: "Time from the arrival of an admission review to its response.",
		}),
		patch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: prefix + "patch_bytes", Buckets: patchBuckets,
			Help: "Length of the patches of injected pods.",
		}),
	}
	reviews := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: prefix + "reviews_total",
		Help: "Admission reviews by decision: untouched (not a new annotated pod), injected, complete (already injected), refused, checked (a check after an installation).",
	}, []string{"decision"})
	refusals := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: prefix + "refusals_total",
		Help: "Refused pods, by reason of docs/errors.md.",
	}, []string{"reason"})
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: prefix + "build_info",
		Help: "Always 1. The labels are the versions of this webhook and of Go.",
	}, []string{"version", "goversion"})
	for _, c := range []prometheus.Collector{
		m.duration, m.patch, reviews, refusals, build, sources,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	for _, decision := range webhook.Decisions() {
		m.reviews[decision] = reviews.WithLabelValues(decision)
	}
	for _, reason := range credential.Reasons() {
		m.refusals[reason] = refusals.WithLabelValues(string(reason))
	}
	build.WithLabelValues(version, runtime.Version()).Set(1)
	return m, nil
}

// Registry returns the registry to serve.
func (m *Metrics) Registry() *prometheus.Registry { return m.registry }

// Observe counts a review. It has the form of webhook.Config.Observe.
func (m *Metrics) Observe(o webhook.Observation) {
	m.duration.Observe(o.Duration.Seconds())
	if counter, known := m.reviews[o.Decision]; known {
		counter.Inc()
	}
	if o.PatchBytes > 0 {
		m.patch.Observe(float64(o.PatchBytes))
	}
	if o.Reason == "" {
		return
	}
	counter, known := m.refusals[o.Reason]
	if !known {
		counter = m.refusals[credential.ReasonInternal] // An undeclared reason is a defect of the webhook.
	}
	counter.Inc()
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prefix+name, help, labels, nil)
}

// Metrics that are read from [Sources].
var (
	ready             = desc("ready", "1 if this webhook is ready, as in /readyz, otherwise 0.")
	certificate       = desc("certificate_expiry_timestamp_seconds", "End of validity of the serving certificate, in seconds since 1970.")
	informerAge       = desc("informer_age_seconds", "Time since the namespace watch last worked; 0 while it works.")
	liveReads         = desc("live_reads_total", "Live reads of namespaces, by outcome: made, or refused by their rate limits.", "outcome")
	rulesFile         = desc("rules_file_ok", "1 if the rules in force are those of the rules file, 0 if the file is invalid or unreadable; absent without a file.")
	settingsFile      = desc("sidecar_settings_file_ok", "1 if the sidecar settings in force are those of their file, 0 if the file is invalid or unreadable; absent without a file.")
	connections       = desc("connections", "Open connections, by state: unauthenticated, authenticated (always 0 in a webhook), waiting (for a free place).", "state")
	connectionsClosed = desc("connections_closed_total", "Connections that the webhook closed early, by cause: crowded (too many, and its address had the most), late (its request did not arrive in time), flood (too many bytes before a response).", "cause")
)

// Describe implements prometheus.Collector.
func (s Sources) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{ready, certificate, informerAge, liveReads, rulesFile, settingsFile, connections, connectionsClosed} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (s Sources) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	counter := func(d *prometheus.Desc, value uint64, label string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), label)
	}
	if s.Ready() {
		gauge(ready, 1)
	} else {
		gauge(ready, 0)
	}
	if end := s.Certificate(); !end.IsZero() {
		gauge(certificate, float64(end.UnixMilli())/1000)
	}
	gauge(informerAge, s.InformerAge().Seconds())
	made, refused := s.LiveReads()
	counter(liveReads, made, "made")
	counter(liveReads, refused, "refused")
	for d, state := range map[*prometheus.Desc]func() (ok, configured bool){rulesFile: s.RulesFile, settingsFile: s.SettingsFile} {
		switch ok, configured := state(); {
		case ok && configured:
			gauge(d, 1)
		case configured:
			gauge(d, 0)
		}
	}
	open := s.Connections()
	gauge(connections, float64(open.Unauthenticated), "unauthenticated")
	gauge(connections, float64(open.Authenticated), "authenticated")
	gauge(connections, float64(open.Waiting), "waiting")
	for _, cause := range connlimit.Causes() {
		counter(connectionsClosed, open.Closed[cause], cause.String())
	}
}
