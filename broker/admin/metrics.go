package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/credence-iam/credence/broker/credential"
)

// Buckets in seconds, in Prometheus' classic form, which every server accepts.
var (
	// A response comes from memory within a millisecond, or waits: up to 2 s for the watch of a new pod, a second or two for
	// STS, and 30 s at most.
	answerBuckets = []float64{0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}
	// STS responds within some 50 ms in its Region. The cache cancels a call after 30 s.
	stsBuckets = []float64{0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}
)

// scrapeTimeout is Prometheus' own default.
const scrapeTimeout = 10 * time.Second

// stsActions are the STS calls of the broker.
var stsActions = []string{"AssumeRole", "GetCallerIdentity", "OwnCredentials"}

// other replaces an action that is not in stsActions.
const other = "other"

// outcomeOK is the outcome of a successful STS call.
const outcomeOK = "ok"

// Metrics counts events, and reads its sources at each scrape. Labels hold actions, outcomes, kinds and reasons, which are
// few, but never a role, a namespace or a pod, whose number is unlimited. Make it with [NewMetrics]. Its methods are safe
// for concurrent use.
type Metrics struct {
	registry *prometheus.Registry
	log      *slog.Logger

	answers  prometheus.Histogram
	allowed  prometheus.Counter
	refused  prometheus.Counter
	refusals map[credential.Reason]prometheus.Counter
	stsCalls *prometheus.CounterVec
	stsTook  *prometheus.HistogramVec
}

// NewMetrics returns the metrics of a program of the given version, including those of its process.
func NewMetrics(version string, log *slog.Logger) (*Metrics, error) {
	if log == nil {
		return nil, errors.New("metrics need a Logger")
	}
	m := &Metrics{
		registry: prometheus.NewRegistry(), log: log,
		answers: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "credence_broker_answer_duration_seconds", Buckets: answerBuckets,
			Help: "Time from the arrival of a GetCredentials call to its response, refusals included.",
		}),
		refusals: make(map[credential.Reason]prometheus.Counter),
		stsCalls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "credence_broker_sts_calls_total",
			Help: "STS calls that ended, by action and outcome: ok, or a reason of docs/errors.md.",
		}, []string{"action", "outcome"}),
		stsTook: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "credence_broker_sts_call_duration_seconds", Buckets: stsBuckets,
			Help: "Duration of STS calls by action, failures included.",
		}, []string{"action"}),
	}
	answers := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "credence_broker_answers_total",
		Help: "GetCredentials calls by outcome: allowed (with credentials) or refused.",
	}, []string{"outcome"})
	refusals := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "credence_broker_refusals_total",
		Help: "Refused GetCredentials calls, by reason of docs/errors.md.",
	}, []string{"reason"})
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "credence_broker_build_info",
		Help: "Always 1. The labels are the versions of this broker and of Go.",
	}, []string{"version", "goversion"})
	for _, c := range []prometheus.Collector{
		m.answers, m.stsCalls, m.stsTook, answers, refusals, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	// All series exist from the start, at zero: an alert on a rate misses the first increase of a new series.
	m.allowed, m.refused = answers.WithLabelValues("allowed"), answers.WithLabelValues("refused")
	for _, reason := range credential.Reasons() {
		m.refusals[reason] = refusals.WithLabelValues(string(reason))
	}
	for _, action := range stsActions {
		m.stsCalls.WithLabelValues(action, outcomeOK)
		m.stsTook.WithLabelValues(action)
	}
	build.WithLabelValues(version, runtime.Version()).Set(1)
	return m, nil
}

// Answer counts a call of GetCredentials: the reason of its refusal, "" if it was allowed, and its duration. It has the
// form of broker.Config.Observe.
func (m *Metrics) Answer(reason credential.Reason, took time.Duration) {
	m.answers.Observe(took.Seconds())
	if reason == "" {
		m.allowed.Inc()
		return
	}
	m.refused.Inc()
	counter, known := m.refusals[reason]
	if !known {
		counter = m.refusals[credential.ReasonInternal] // An undeclared reason is our bug.
	}
	counter.Inc()
}

// STSCall counts an STS call that ended. outcome is "ok" or the text of a credential.Reason.
func (m *Metrics) STSCall(action, outcome string, took time.Duration) {
	if !slices.Contains(stsActions, action) {
		action = other
	}
	if _, known := m.refusals[credential.Reason(outcome)]; !known && outcome != outcomeOK {
		outcome = string(credential.ReasonInternal)
	}
	m.stsCalls.WithLabelValues(action, outcome).Inc()
	m.stsTook.WithLabelValues(action).Observe(took.Seconds())
}

// Handler returns a handler that serves the metrics.
func (m *Metrics) Handler() http.Handler { return MetricsHandler(m.registry, m.log) }

// scrapeLog logs the errors of scrapes. A client that closes its connection during a scrape is none: Prometheus does so if
// it gives up, or reuses a connection just when this server closes it because it was idle.
type scrapeLog struct{ log *slog.Logger }

func (l scrapeLog) Println(v ...any) {
	for _, value := range v {
		if err, ok := value.(error); ok && errors.Is(err, context.Canceled) {
			return
		}
	}
	l.log.Warn("Could not serve all metrics", "error", strings.TrimSpace(fmt.Sprintln(v...)))
}

// MetricsHandler serves the metrics of registry. Only one scrape runs at a time, because each counts all sessions under
// the lock that requests need. The others wait: if they were refused, a client that scrapes all the time would keep
// Prometheus out. As many can wait as there are connections, which addresses share equally. A client that reads slowly
// delays no other, because http.TimeoutHandler buffers its response.
func MetricsHandler(registry *prometheus.Registry, log *slog.Logger) http.Handler {
	handler := promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorLog: scrapeLog{log}})
	one := make(chan struct{}, 1)
	return http.TimeoutHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case one <- struct{}{}:
			defer func() { <-one }()
			handler.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	}), scrapeTimeout, fmt.Sprintf("no metrics within %s\n", scrapeTimeout))
}
