package admin

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/credence-iam/credence/broker/credential"
)

// Buckets, in seconds. Prometheus' older form, because every server takes it.
var (
	// An answer comes from memory, within a millisecond, or waits: for a new pod to be heard of 2 s, for
	// STS a second or two, and for anything 30 s.
	answerBuckets = []float64{0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}
	// STS answers in some 50 ms within its region, and the cache gives up after 30 s.
	stsBuckets = []float64{0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}
)

// scrapeTimeout is what Prometheus itself waits for by default.
const scrapeTimeout = 10 * time.Second

// stsActions are the calls that the broker makes.
var stsActions = []string{"AssumeRole", "GetCallerIdentity", "OwnCredentials"}

// other stands for an action that is not in stsActions.
const other = "other"

// outcomeOK is the outcome of an STS call that did what it was to do.
const outcomeOK = "ok"

// Metrics counts what happens, and asks its sources for the rest when it is scraped. Labels hold
// actions, outcomes, kinds and reasons, of which there are few; never a role, a namespace or a pod,
// of which there can be any number. Make it with [NewMetrics]. Its methods may be called
// concurrently.
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

// NewMetrics returns metrics of a program of that version, with what is known of the process itself.
func NewMetrics(version string, log *slog.Logger) (*Metrics, error) {
	if log == nil {
		return nil, errors.New("metrics need a Logger")
	}
	m := &Metrics{
		registry: prometheus.NewRegistry(), log: log,
		answers: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "credence_broker_answer_duration_seconds", Buckets: answerBuckets,
			Help: "Time from the arrival of a call of GetCredentials to its answer, refusals included.",
		}),
		refusals: make(map[credential.Reason]prometheus.Counter),
		stsCalls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "credence_broker_sts_calls_total",
			Help: "Calls of STS that ended, by action and outcome: ok, or a reason of docs/errors.md.",
		}, []string{"action", "outcome"}),
		stsTook: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "credence_broker_sts_call_duration_seconds", Buckets: stsBuckets,
			Help: "Time that calls of STS took, by action, failures included.",
		}, []string{"action"}),
	}
	answers := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "credence_broker_answers_total",
		Help: "Calls of GetCredentials that were answered: allowed with credentials, or refused.",
	}, []string{"outcome"})
	refusals := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "credence_broker_refusals_total",
		Help: "Calls of GetCredentials that were refused, by the reason of docs/errors.md.",
	}, []string{"reason"})
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "credence_broker_build_info",
		Help: "Always 1. The labels tell the version of this broker and of Go.",
	}, []string{"version", "goversion"})
	for _, c := range []prometheus.Collector{
		m.answers, m.stsCalls, m.stsTook, answers, refusals, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("registering metrics: %w", err)
		}
	}
	// All series are there from the start, at zero: an alert on a rate does not see the first increase
	// of a series that was not there before.
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

// Answer counts a call of GetCredentials: why it was refused, "" when it was not, and how long it
// took. It has the form of broker.Config.Observe.
func (m *Metrics) Answer(reason credential.Reason, took time.Duration) {
	m.answers.Observe(took.Seconds())
	if reason == "" {
		m.allowed.Inc()
		return
	}
	m.refused.Inc()
	counter, known := m.refusals[reason]
	if !known {
		counter = m.refusals[credential.ReasonInternal] // A reason that is not declared is a fault of ours.
	}
	counter.Inc()
}

// STSCall counts a call of STS that ended. outcome is "ok" or the text of a credential.Reason.
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

// Handler serves the metrics in the forms that Prometheus asks for.
func (m *Metrics) Handler() http.Handler { return MetricsHandler(m.registry, m.log) }

// MetricsHandler serves the metrics of registry. It lets scrapes wait for each other: each counts all sessions under the lock that answers need. It refuses none, or one
// client that scrapes all the time would keep Prometheus out. As many wait as there are connections, of which addresses
// have equal shares. A client that reads slowly makes nobody wait: http.TimeoutHandler keeps its response for it.
func MetricsHandler(registry *prometheus.Registry, log *slog.Logger) http.Handler {
	handler := promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn)})
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
