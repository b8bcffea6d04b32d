package admin

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/connlimit"
)

// AuditStats is the state of the audit log at one moment.
type AuditStats struct {
	Queued, Capacity int    // lines that wait to be written, and how many may
	Lost             uint64 // lines that were not written
}

// EventStats is the state of the queue of Kubernetes Events at one moment.
type EventStats struct {
	Queued                       int
	Written, Suppressed, Dropped uint64 // became one; there was one already; did not become one
}

// RulesFile is the state of the rules file.
type RulesFile struct {
	Loaded time.Time // when what is in force was loaded
	OK     bool      // what is in force is what the file holds
}

// SpanStats counts the spans of traces: those that ended, and those of them that the collector took.
type SpanStats struct{ Ended, Exported uint64 }

// Sources are asked at each scrape, from several goroutines at a time. They must not block. A source
// that is nil leaves its metrics out; so does one that does not know its value, as its second result
// tells.
type Sources struct {
	Cache           func() cache.Stats
	Audit           func() AuditStats
	Events          func() EventStats
	PodsQueued      func() int                   // pods that changed and have not been looked at
	Certificate     func() time.Time             // end of validity of the serving certificate; zero: unknown
	BaseCredentials func() (time.Time, bool)     // end of validity of the broker's own AWS credentials
	ClockSkew       func() (time.Duration, bool) // how far AWS's clock is ahead of ours
	InformerAge     func() time.Duration         // since the watches last heard from the API server; 0: at present
	VerificationAge func() time.Duration         // since the API server last gave what tokens are verified by
	RulesFile       func() (RulesFile, bool)
	Ready           func() bool
	LiveReads       func() (made, refused uint64) // reads past the watches
	TokenReviews    func() (now, most int)        // under way, and how many may be
	TokensWaiting   func() int                    // for their turn to be verified
	Spans           func() SpanStats
	Connections     func() connlimit.Stats
}

// number is one metric that is asked for.
type number struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

// ofBroker starts the name of each metric.
const ofBroker = "credence_broker_"

func gauge(name, help string, labels ...string) number {
	return number{desc: prometheus.NewDesc(ofBroker+name, help, labels, nil), kind: prometheus.GaugeValue}
}

func counter(name, help string, labels ...string) number {
	return number{desc: prometheus.NewDesc(ofBroker+name, help, labels, nil), kind: prometheus.CounterValue}
}

// The metrics that are asked for. docs/metrics.md says what to make of each, and a test compares.
var (
	fetchesQueued  = gauge("fetches_queued", "Calls of STS that have not begun, by kind: waiting (callers wait for it), renewing (a session falls due), ahead (a pod will ask).", "kind")
	fetchesFlying  = gauge("fetches_in_flight", "Calls of STS for sessions that have begun and not ended.")
	fetchRate      = gauge("fetch_rate_limit", "Calls of STS for sessions that may begin in a second, at present: less than configured after STS has throttled.")
	fetchShare     = gauge("fetch_rate_share", "Calls of STS for sessions that this broker may begin in a second at best: its part of what all brokers may together.")
	fetchDemand    = gauge("fetch_rate_demand", "Calls of STS per second that it takes on average to renew the sessions that are kept.")
	fetchesBegun   = counter("fetches_begun_total", "Calls of STS for sessions that began, by cause: caller (one had nothing to go on with), renewal (a session was held), prefetch (neither).", "cause")
	fetchesEnded   = counter("fetches_total", "Fetches of sessions that ended, by outcome: ok or failed.", "outcome")
	sessionsKept   = gauge("sessions_kept", "Sessions that live pods want.")
	sessionsWarm   = gauge("sessions_warm", "Sessions that live pods want and that are held and valid.")
	sessionsDenied = gauge("sessions_refused", "Sessions that live pods want and that AWS refuses: a person has to change something.")
	sessionsKnown  = gauge("sessions_known", "Sessions that are held or remembered, wanted or not, refused ones included.")
	sessionsLate   = gauge("sessions_late", "Sessions that live pods want and that have less than 0.45 of their lives left, though AWS does not refuse them: later than promised.")
	stalest        = gauge("stalest_session_seconds", "Time to expiry of the wanted session that expires first; absent while none is held.")
	lookups        = counter("lookups_total", "Sessions that were asked for, by outcome: hit (answered at once), miss (had to wait for STS), stale (answered past half of the session's life).", "outcome")

	auditQueued   = gauge("audit_lines_queued", "Audit lines that wait to be written.")
	auditCapacity = gauge("audit_lines_queued_max", "How many audit lines may wait before any is lost.")
	auditLost     = counter("audit_lines_lost_total", "Audit lines that were not written.")

	eventsQueued = gauge("events_queued", "Kubernetes Events that wait to be written.")
	eventsEnded  = counter("events_total", "Refusals that are for a person to mend, by what became of their Kubernetes Event: written, suppressed (there is one already), dropped.", "outcome")

	podsQueued = gauge("pods_queued", "Pods that changed and whose session has not been looked at. The same pod is in it once.")

	certificateEnd = gauge("certificate_expiry_timestamp_seconds", "End of validity of the certificate that is served, in seconds since 1970.")
	baseEnd        = gauge("base_credentials_expiry_timestamp_seconds", "End of validity of the broker's own AWS credentials, in seconds since 1970; absent for such as do not end.")
	clockSkew      = gauge("clock_skew_seconds", "How far the clock of AWS is ahead of the broker's; negative when it is behind.")
	informerAge    = gauge("informer_age_seconds", "Time since the watches on pods, namespaces, service accounts and the brokers' endpoints last heard from the API server; 0 while they do.")
	keysAge        = gauge("token_verification_age_seconds", "Time since the API server last gave what tokens are verified by: its signing keys or, with --token-verification=tokenreview, a review; then it is 0 while reviews succeed.")
	readiness      = gauge("ready", "1 when this broker is ready, as /readyz says, and 0 when it is not.")
	liveReads      = counter("live_reads_total", "Reads of the API server for what the watches do not know yet, by outcome: made, or refused by their bounds.", "outcome")
	reviews        = gauge("token_reviews_in_flight", "TokenReviews under way, with --token-verification=tokenreview.")
	reviewsMost    = gauge("token_reviews_in_flight_max", "How many TokenReviews may be under way; further ones wait.")
	tokensWaiting  = gauge("tokens_waiting", "Tokens that wait for their turn to be verified.")
	rulesLoaded    = gauge("rules_file_loaded_timestamp_seconds", "When the rules in force were loaded from their file, in seconds since 1970.")
	rulesOK        = gauge("rules_file_ok", "1 when the rules in force are what their file holds, 0 when the file cannot be taken.")
	spans          = counter("trace_spans_total", "Spans of traces, by outcome: ended, and exported to the collector. What lies between them for longer than some seconds is lost.", "outcome")
)

// The connections of a broker or a webhook.
const (
	connectionsHelp       = "Connections that are open, by state: unauthenticated, authenticated (a token was believed), waiting (there is no room for it yet)."
	connectionsClosedHelp = "Connections that were closed before their time, by cause: crowded (there were too many, and its address or namespace held the most), late (its request did not arrive in time), flood (too many bytes before an answer)."
)

var (
	connections       = gauge("connections", connectionsHelp, "state")
	connectionsClosed = counter("connections_closed_total", connectionsClosedHelp, "cause")
)

// watchConnections shows the state of connections in the two metrics.
func watchConnections(open, closed number, state func() connlimit.Stats) watched {
	return watched{[]number{open, closed}, func(emit func(number, float64, ...string)) {
		s := state()
		emit(open, float64(s.Unauthenticated), "unauthenticated")
		emit(open, float64(s.Authenticated), "authenticated")
		emit(open, float64(s.Waiting), "waiting")
		for _, cause := range connlimit.Causes() {
			emit(closed, float64(s.Closed[cause]), cause.String())
		}
	}}
}

// watched is one source with the metrics that it gives.
type watched struct {
	numbers []number
	collect func(emit func(n number, value float64, labels ...string))
}

// sourced collects what sources know.
type sourced []watched

// Describe implements prometheus.Collector.
func (s sourced) Describe(out chan<- *prometheus.Desc) {
	for _, w := range s {
		for _, n := range w.numbers {
			out <- n.desc
		}
	}
}

// Collect implements prometheus.Collector.
func (s sourced) Collect(out chan<- prometheus.Metric) {
	for _, w := range s {
		w.collect(func(n number, value float64, labels ...string) {
			out <- prometheus.MustNewConstMetric(n.desc, n.kind, value, labels...)
		})
	}
}

// Watch adds sources. It may be called again as parts of the program come into being, with other
// sources; the same one twice is an error.
func (m *Metrics) Watch(s Sources) error {
	all := s.watched()
	if len(all) == 0 {
		return errors.New("watching metrics: no source is set")
	}
	if err := m.registry.Register(all); err != nil {
		return fmt.Errorf("watching metrics: %w", err)
	}
	return nil
}

// seconds since 1970, as Prometheus has times.
func unix(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

// when is a watched source of one number that is not always known.
func when(n number, value func() (float64, bool)) watched {
	return watched{[]number{n}, func(emit func(number, float64, ...string)) {
		if v, known := value(); known {
			emit(n, v)
		}
	}}
}

func always(n number, value func() float64) watched {
	return when(n, func() (float64, bool) { return value(), true })
}

func (s Sources) watched() (all sourced) {
	if s.Cache != nil {
		all = append(all, watched{
			[]number{fetchesQueued, fetchesFlying, fetchRate, fetchShare, fetchDemand, fetchesBegun, fetchesEnded, sessionsKept, sessionsWarm, sessionsDenied, sessionsLate, sessionsKnown, stalest, lookups},
			func(emit func(number, float64, ...string)) {
				c := s.Cache()
				emit(fetchesQueued, float64(c.Waiting), "waiting")
				emit(fetchesQueued, float64(c.Renewing), "renewing")
				emit(fetchesQueued, float64(c.Ahead), "ahead")
				emit(fetchesFlying, float64(c.InFlight))
				emit(fetchRate, c.Rate)
				emit(fetchShare, c.Share)
				emit(fetchDemand, c.Demand)
				emit(fetchesBegun, float64(c.ForCallers), "caller")
				emit(fetchesBegun, float64(c.Renewals), "renewal")
				emit(fetchesBegun, float64(c.Prefetches), "prefetch")
				emit(fetchesEnded, float64(c.Fetched), outcomeOK)
				emit(fetchesEnded, float64(c.Failed), "failed")
				emit(sessionsKept, float64(c.Active))
				emit(sessionsWarm, float64(c.Warm))
				emit(sessionsDenied, float64(c.Refused))
				emit(sessionsLate, float64(c.Late))
				emit(sessionsKnown, float64(c.Entries))
				if c.Warm > 0 {
					emit(stalest, c.Stalest.Seconds())
				}
				emit(lookups, float64(c.Hits), "hit")
				emit(lookups, float64(c.Misses), "miss")
				emit(lookups, float64(c.Stale), "stale")
			},
		})
	}
	if s.Audit != nil {
		all = append(all, watched{[]number{auditQueued, auditCapacity, auditLost}, func(emit func(number, float64, ...string)) {
			a := s.Audit()
			emit(auditQueued, float64(a.Queued))
			emit(auditCapacity, float64(a.Capacity))
			emit(auditLost, float64(a.Lost))
		}})
	}
	if s.Events != nil {
		all = append(all, watched{[]number{eventsQueued, eventsEnded}, func(emit func(number, float64, ...string)) {
			e := s.Events()
			emit(eventsQueued, float64(e.Queued))
			emit(eventsEnded, float64(e.Written), "written")
			emit(eventsEnded, float64(e.Suppressed), "suppressed")
			emit(eventsEnded, float64(e.Dropped), "dropped")
		}})
	}
	if s.PodsQueued != nil {
		all = append(all, always(podsQueued, func() float64 { return float64(s.PodsQueued()) }))
	}
	if s.Certificate != nil {
		all = append(all, when(certificateEnd, func() (float64, bool) { end := s.Certificate(); return unix(end), !end.IsZero() }))
	}
	if s.BaseCredentials != nil {
		all = append(all, when(baseEnd, func() (float64, bool) { end, known := s.BaseCredentials(); return unix(end), known }))
	}
	if s.ClockSkew != nil {
		all = append(all, when(clockSkew, func() (float64, bool) { skew, known := s.ClockSkew(); return skew.Seconds(), known }))
	}
	if s.InformerAge != nil {
		all = append(all, always(informerAge, func() float64 { return s.InformerAge().Seconds() }))
	}
	if s.VerificationAge != nil {
		all = append(all, always(keysAge, func() float64 { return s.VerificationAge().Seconds() }))
	}
	if s.Ready != nil {
		all = append(all, always(readiness, func() float64 {
			if s.Ready() {
				return 1
			}
			return 0
		}))
	}
	if s.LiveReads != nil {
		all = append(all, watched{[]number{liveReads}, func(emit func(number, float64, ...string)) {
			made, refused := s.LiveReads()
			emit(liveReads, float64(made), "made")
			emit(liveReads, float64(refused), "refused")
		}})
	}
	if s.TokenReviews != nil {
		all = append(all, watched{[]number{reviews, reviewsMost}, func(emit func(number, float64, ...string)) {
			now, most := s.TokenReviews()
			emit(reviews, float64(now))
			emit(reviewsMost, float64(most))
		}})
	}
	if s.TokensWaiting != nil {
		all = append(all, watched{[]number{tokensWaiting}, func(emit func(number, float64, ...string)) {
			emit(tokensWaiting, float64(s.TokensWaiting()))
		}})
	}
	if s.RulesFile != nil {
		all = append(all, watched{[]number{rulesLoaded, rulesOK}, func(emit func(number, float64, ...string)) {
			if f, known := s.RulesFile(); known {
				emit(rulesLoaded, unix(f.Loaded))
				fine := 0.0
				if f.OK {
					fine = 1
				}
				emit(rulesOK, fine)
			}
		}})
	}
	if s.Connections != nil {
		all = append(all, watchConnections(connections, connectionsClosed, s.Connections))
	}
	if s.Spans != nil {
		all = append(all, watched{[]number{spans}, func(emit func(number, float64, ...string)) {
			n := s.Spans()
			emit(spans, float64(n.Ended), "ended")
			emit(spans, float64(n.Exported), "exported")
		}})
	}
	return all
}
