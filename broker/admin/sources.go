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
	Queued, Capacity int    // lines that wait to be written, and their maximum
	Lost             uint64 // lines that were not written
}

// EventStats is the state of the queue of Kubernetes Events at one moment.
type EventStats struct {
	Queued                       int
	Written, Suppressed, Dropped uint64 // Suppressed: there was such an Event already
}

// RulesFile is the state of the rules file.
type RulesFile struct {
	Loaded time.Time // when the rules in force were loaded
	OK     bool      // the rules in force are those of the file
}

// SpanStats counts the trace spans that ended, and those of them that the collector took.
type SpanStats struct{ Ended, Exported uint64 }

// Sources are called at each scrape, from several goroutines. They must not block. A nil source has no metrics. A source
// with a second result has none either while that is false: the value is unknown.
type Sources struct {
	Cache           func() cache.Stats
	Audit           func() AuditStats
	Events          func() EventStats
	PodsQueued      func() int                   // changed pods for which prefetching has not been decided
	Certificate     func() time.Time             // end of validity of the serving certificate; zero: unknown
	OwnCredentials  func() (time.Time, bool)     // expiration of the broker's own credentials
	ClockSkew       func() (time.Duration, bool) // how far AWS's clock is ahead of this machine's
	InformerAge     func() time.Duration         // time since the watches last worked; 0 while they work
	VerificationAge func() time.Duration         // time since the API server last provided signing keys or a review
	RulesFile       func() (RulesFile, bool)
	Ready           func() bool
	TrustOK         func() bool                   // whether the broker's roots are published as configured
	LiveReads       func() (made, refused uint64) // reads that bypass the watch cache
	TokenReviews    func() (inFlight, limit int)
	TokensWaiting   func() int // tokens that wait for their verification
	Spans           func() SpanStats
	Connections     func() connlimit.Stats
}

// metricDef defines one metric of a source.
type metricDef struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

// prefix starts the name of each metric.
const prefix = "credence_broker_"

func gauge(name, help string, labels ...string) metricDef {
	return metricDef{desc: prometheus.NewDesc(prefix+name, help, labels, nil), kind: prometheus.GaugeValue}
}

func counter(name, help string, labels ...string) metricDef {
	return metricDef{desc: prometheus.NewDesc(prefix+name, help, labels, nil), kind: prometheus.CounterValue}
}

// The metrics of all sources. docs/metrics.md explains each, and a test compares the two.
var (
	fetchesQueued   = gauge("fetches_queued", "Fetches of sessions that have not begun, by kind: waiting (with waiting callers), renewing (of a key with a valid session), ahead (a prefetch).", "kind")
	fetchesInFlight = gauge("fetches_in_flight", "Fetches of sessions that have begun and not ended.")
	fetchRate       = gauge("fetch_rate_limit", "Fetches of sessions that may begin per second at present.")
	fetchShare      = gauge("fetch_rate_share", "Maximum of fetches per second: this broker's share of the rate of all brokers.")
	fetchDemand     = gauge("fetch_rate_demand", "Fetches per second that the renewals of all active grants need on average.")
	fetchesBegun    = counter("fetches_begun_total", "Fetches of sessions that began, by cause: caller (one waited without a session), renewal (of a valid session), prefetch (before any caller).", "cause")
	fetchesEnded    = counter("fetches_total", "Fetches of sessions that ended, by outcome: ok or failed.", "outcome")
	sessionsActive  = gauge("sessions_kept", "Active grants: a live pod uses each, and this broker owns it.")
	sessionsWarm    = gauge("sessions_warm", "Active grants with a valid session in the cache.")
	sessionsRefused = gauge("sessions_refused", "Active grants without a session because AWS refuses, which a user must fix.")
	sessionsKnown   = gauge("sessions_known", "Grants in the cache, inactive and refused ones included.")
	sessionsLate    = gauge("sessions_late", "Active grants whose session has less than 0.45 of its duration left although AWS does not refuse.")
	stalest         = gauge("stalest_session_seconds", "Shortest time left of a session of an active grant; absent without one.")
	stalestPart     = gauge("stalest_session_ratio", "Smallest part of its session duration that a session of an active grant has left; absent without one.")
	lookups         = counter("lookups_total", "Requests to the cache, by outcome: hit (a valid session), miss (none), stale (a session with less than half of its duration left).", "outcome")

	auditQueued   = gauge("audit_lines_queued", "Audit lines that wait to be written.")
	auditCapacity = gauge("audit_lines_queued_max", "Maximum of audit lines that may wait.")
	auditLost     = counter("audit_lines_lost_total", "Audit lines that were not written.")

	eventsQueued = gauge("events_queued", "Kubernetes Events that wait to be written.")
	eventsEnded  = counter("events_total", "Refusals that a user must fix, by outcome of their Kubernetes Event: written, suppressed (there is one already), dropped.", "outcome")

	podsQueued = gauge("pods_queued", "Changed pods for which prefetching has not been decided, each counted once.")

	certificateEnd     = gauge("certificate_expiry_timestamp_seconds", "End of validity of the serving certificate, in seconds since 1970.")
	ownCredentialsEnd  = gauge("base_credentials_expiry_timestamp_seconds", "Expiration of the broker's own AWS credentials, in seconds since 1970; absent if they do not expire.")
	clockSkew          = gauge("clock_skew_seconds", "How far AWS's clock is ahead of the broker's; negative if it is behind.")
	informerAge        = gauge("informer_age_seconds", "Time since the watches on pods, namespaces, service accounts and broker endpoints last worked; 0 while they work.")
	verificationAge    = gauge("token_verification_age_seconds", "Time since the API server last provided signing keys; with --token-verification=tokenreview, since its last review, 0 while reviews succeed.")
	readiness          = gauge("ready", "1 if this broker is ready, as in /readyz, otherwise 0.")
	liveReads          = counter("live_reads_total", "Live reads of the API server, by outcome: made, or refused by their rate limits.", "outcome")
	reviewsInFlight    = gauge("token_reviews_in_flight", "TokenReviews in flight, with --token-verification=tokenreview.")
	reviewsInFlightMax = gauge("token_reviews_in_flight_max", "Maximum of TokenReviews in flight; further ones wait.")
	tokensWaiting      = gauge("tokens_waiting", "Tokens that wait for their verification.")
	trustOK            = gauge("trust_ok", "1 if the broker's roots are published as configured, 0 if this broker cannot publish or read them; absent without --roots-file.")
	rulesLoaded        = gauge("rules_file_loaded_timestamp_seconds", "When the rules in force were loaded from the rules file, in seconds since 1970.")
	rulesOK            = gauge("rules_file_ok", "1 if the rules in force are those of the rules file, 0 if the file is invalid or unreadable.")
	spans              = counter("trace_spans_total", "Trace spans, by outcome: ended, and exported to the collector.", "outcome")

	connections       = gauge("connections", "Open connections, by state: unauthenticated, authenticated (with a verified token), waiting (for a free place).", "state")
	connectionsClosed = counter("connections_closed_total", "Connections that the broker closed early, by cause: crowded (too many, and its address or namespace had the most), late (its request did not arrive in time), flood (too many bytes before a response).", "cause")
)

// emit sends one value of a scrape.
type emit func(def metricDef, value float64, labels ...string)

// source is one of [Sources] with its metrics.
type source struct {
	defs    []metricDef
	collect func(emit)
}

// collector collects the metrics of sources.
type collector []source

// Describe implements prometheus.Collector.
func (c collector) Describe(out chan<- *prometheus.Desc) {
	for _, s := range c {
		for _, def := range s.defs {
			out <- def.desc
		}
	}
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	for _, s := range c {
		s.collect(func(def metricDef, value float64, labels ...string) {
			out <- prometheus.MustNewConstMetric(def.desc, def.kind, value, labels...)
		})
	}
}

// Watch adds the metrics of sources. It may be called several times, as parts of the program start. A source that was
// added before is an error.
func (m *Metrics) Watch(s Sources) error {
	all := s.collector()
	if len(all) == 0 {
		return errors.New("adding metrics: no source is set")
	}
	if err := m.registry.Register(all); err != nil {
		return fmt.Errorf("adding metrics: %w", err)
	}
	return nil
}

// unix returns t in seconds since 1970.
func unix(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

// sometimes is a source with one value that may be unknown.
func sometimes(def metricDef, value func() (float64, bool)) source {
	return source{[]metricDef{def}, func(send emit) {
		if v, known := value(); known {
			send(def, v)
		}
	}}
}

// always is a source with one value.
func always(def metricDef, value func() float64) source {
	return sometimes(def, func() (float64, bool) { return value(), true })
}

// fromBool returns 1 for true and 0 for false.
func fromBool(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (s Sources) collector() (all collector) {
	add := func(collect func(emit), defs ...metricDef) { all = append(all, source{defs, collect}) }
	if s.Cache != nil {
		add(func(send emit) { sendCache(send, s.Cache()) },
			fetchesQueued, fetchesInFlight, fetchRate, fetchShare, fetchDemand, fetchesBegun, fetchesEnded,
			sessionsActive, sessionsWarm, sessionsRefused, sessionsLate, sessionsKnown, stalest, stalestPart, lookups)
	}
	if s.Audit != nil {
		add(func(send emit) {
			a := s.Audit()
			send(auditQueued, float64(a.Queued))
			send(auditCapacity, float64(a.Capacity))
			send(auditLost, float64(a.Lost))
		}, auditQueued, auditCapacity, auditLost)
	}
	if s.Events != nil {
		add(func(send emit) {
			e := s.Events()
			send(eventsQueued, float64(e.Queued))
			send(eventsEnded, float64(e.Written), "written")
			send(eventsEnded, float64(e.Suppressed), "suppressed")
			send(eventsEnded, float64(e.Dropped), "dropped")
		}, eventsQueued, eventsEnded)
	}
	if s.PodsQueued != nil {
		all = append(all, always(podsQueued, func() float64 { return float64(s.PodsQueued()) }))
	}
	if s.Certificate != nil {
		all = append(all, sometimes(certificateEnd, func() (float64, bool) { end := s.Certificate(); return unix(end), !end.IsZero() }))
	}
	if s.OwnCredentials != nil {
		all = append(all, sometimes(ownCredentialsEnd, func() (float64, bool) { end, known := s.OwnCredentials(); return unix(end), known }))
	}
	if s.ClockSkew != nil {
		all = append(all, sometimes(clockSkew, func() (float64, bool) { skew, known := s.ClockSkew(); return skew.Seconds(), known }))
	}
	if s.InformerAge != nil {
		all = append(all, always(informerAge, func() float64 { return s.InformerAge().Seconds() }))
	}
	if s.VerificationAge != nil {
		all = append(all, always(verificationAge, func() float64 { return s.VerificationAge().Seconds() }))
	}
	if s.Ready != nil {
		all = append(all, always(readiness, func() float64 { return fromBool(s.Ready()) }))
	}
	if s.TrustOK != nil {
		all = append(all, always(trustOK, func() float64 { return fromBool(s.TrustOK()) }))
	}
	if s.LiveReads != nil {
		add(func(send emit) {
			made, refused := s.LiveReads()
			send(liveReads, float64(made), "made")
			send(liveReads, float64(refused), "refused")
		}, liveReads)
	}
	if s.TokenReviews != nil {
		add(func(send emit) {
			inFlight, limit := s.TokenReviews()
			send(reviewsInFlight, float64(inFlight))
			send(reviewsInFlightMax, float64(limit))
		}, reviewsInFlight, reviewsInFlightMax)
	}
	if s.TokensWaiting != nil {
		all = append(all, always(tokensWaiting, func() float64 { return float64(s.TokensWaiting()) }))
	}
	if s.RulesFile != nil {
		add(func(send emit) {
			if f, known := s.RulesFile(); known {
				send(rulesLoaded, unix(f.Loaded))
				send(rulesOK, fromBool(f.OK))
			}
		}, rulesLoaded, rulesOK)
	}
	if s.Connections != nil {
		add(func(send emit) {
			c := s.Connections()
			send(connections, float64(c.Unauthenticated), "unauthenticated")
			send(connections, float64(c.Authenticated), "authenticated")
			send(connections, float64(c.Waiting), "waiting")
			for _, cause := range connlimit.Causes() {
				send(connectionsClosed, float64(c.Closed[cause]), cause.String())
			}
		}, connections, connectionsClosed)
	}
	if s.Spans != nil {
		add(func(send emit) {
			n := s.Spans()
			send(spans, float64(n.Ended), "ended")
			send(spans, float64(n.Exported), "exported")
		}, spans)
	}
	return all
}

func sendCache(send emit, c cache.Stats) {
	send(fetchesQueued, float64(c.Waiting), "waiting")
	send(fetchesQueued, float64(c.Renewing), "renewing")
	send(fetchesQueued, float64(c.Ahead), "ahead")
	send(fetchesInFlight, float64(c.InFlight))
	send(fetchRate, c.Rate)
	send(fetchShare, c.Share)
	send(fetchDemand, c.Demand)
	send(fetchesBegun, float64(c.ForCallers), "caller")
	send(fetchesBegun, float64(c.Renewals), "renewal")
	send(fetchesBegun, float64(c.Prefetches), "prefetch")
	send(fetchesEnded, float64(c.Fetched), outcomeOK)
	send(fetchesEnded, float64(c.Failed), "failed")
	send(sessionsActive, float64(c.Active))
	send(sessionsWarm, float64(c.Warm))
	send(sessionsRefused, float64(c.Refused))
	send(sessionsLate, float64(c.Late))
	send(sessionsKnown, float64(c.Entries))
	if c.Warm > 0 {
		send(stalest, c.Stalest.Seconds())
		send(stalestPart, c.StalestPart)
	}
	send(lookups, float64(c.Hits), "hit")
	send(lookups, float64(c.Misses), "miss")
	send(lookups, float64(c.Stale), "stale")
}
