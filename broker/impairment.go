package broker

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	// impairmentInterval is the time between two checks.
	impairmentInterval = 5 * time.Second
	// impairedAfter is how long failures must last before they are reported. Single failures are normal, and retries fix them.
	impairedAfter = 15 * time.Second
	// recoveredAfter is how long calls must succeed before the end is reported.
	recoveredAfter = 30 * time.Second
	// audienceRecoveredAfter is the same for tokens for another audience. A refused sidecar calls once in about a minute.
	audienceRecoveredAfter = 5 * time.Minute
	// impairmentPause is the minimum time between two reports of one reason, so that a broker that fails and recovers in turn
	// writes few Events.
	impairmentPause = 10 * time.Minute
	// impairmentRepeat is how often a lasting impairment is reported again: an API server keeps an Event for an hour.
	impairmentRepeat = time.Hour
)

// Impairment is a cause for which this broker cannot do its work.
type Impairment struct {
	// Reason is BROKER_CREDENTIALS, STS_UNAVAILABLE, STS_THROTTLED or TOKEN_AUDIENCE.
	Reason credential.Reason
	// Err is the latest failure.
	Err *credential.Error
	// Pod is the pod of the latest token for another audience; zero for other reasons.
	Pod policy.Pod
	// Since is the time of the first failure, and Last that of the latest one. Count is the number of failures.
	Since, Last time.Time
	Count       int
}

// ImpairmentsConfig configures [NewImpairments].
type ImpairmentsConfig struct {
	// Impaired reports an impairment that lasts, again each hour. It must not block. Required.
	Impaired func(Impairment)
	// Recovered reports the end of an impairment that was reported. It must not block. Required.
	Recovered func(Impairment)
	// Logger receives the same. Required.
	Logger *slog.Logger
}

// Impairments detects that this broker cannot do its work: AWS does not accept its credentials, STS does not respond or
// throttles, or tokens have another audience. Its methods may be called concurrently.
type Impairments struct {
	cfg ImpairmentsConfig

	mu       sync.Mutex
	fetched  int                             // sessions, and refusals by STS, since the last check; guarded by mu
	byReason map[credential.Reason]*impaired // its keys do not change; guarded by mu
}

// impaired is what Impairments knows of one reason.
type impaired struct {
	// alone is set if one failure shows the cause whatever else succeeds.
	alone          bool
	recoveredAfter time.Duration

	Impairment           // Count is zero if there is none
	failed     int       // since the last check
	fetched    int       // successes since the first failure
	lasting    bool      // the failures have lasted impairedAfter
	bad        time.Time // the last check that found failures
	good       bool      // a fetch has succeeded since
	reported   time.Time // zero: never
	announced  bool      // the current impairment was reported
}

// NewImpairments checks cfg.
func NewImpairments(cfg ImpairmentsConfig) (*Impairments, error) {
	if cfg.Impaired == nil || cfg.Recovered == nil || cfg.Logger == nil {
		return nil, errors.New("the detection of impairments needs Impaired, Recovered and a Logger")
	}
	i := &Impairments{cfg: cfg, byReason: map[credential.Reason]*impaired{
		credential.ReasonTokenAudience: {alone: true, recoveredAfter: audienceRecoveredAfter},
	}}
	for _, reason := range []credential.Reason{credential.ReasonBrokerCredentials, credential.ReasonSTSUnavailable, credential.ReasonSTSThrottled} {
		i.byReason[reason] = &impaired{recoveredAfter: recoveredAfter}
	}
	return i, nil
}

// Source returns a source that fetches from s, and whose outcomes i records.
func (i *Impairments) Source(s credential.Source[policy.Grant]) credential.Source[policy.Grant] {
	return observedSource{s, i}
}

type observedSource struct {
	credential.Source[policy.Grant]

	impairments *Impairments
}

// Credential implements [credential.Source].
func (s observedSource) Credential(ctx context.Context, g policy.Grant) (credential.Credential, error) {
	c, err := s.Source.Credential(ctx, g)
	if !errors.Is(ctx.Err(), context.Canceled) { // not at the shutdown
		s.impairments.record(err, policy.Pod{})
	}
	return c, err
}

// record records the outcome of a fetch, or the refusal of the pod's token for another audience.
func (i *Impairments) record(err error, pod policy.Pod) {
	e, _ := errors.AsType[*credential.Error](err)
	i.mu.Lock()
	defer i.mu.Unlock()
	switch t := i.of(e); {
	case t != nil:
		t.Err, t.Pod, t.Last = e, pod, time.Now()
		if t.Count == 0 {
			t.Reason, t.Since = e.Reason, t.Last
		}
		t.Count++
		t.failed++
	case err == nil, errors.Is(err, credential.ErrDenied), errors.Is(err, credential.ErrInvalid):
		i.fetched++ // STS knows the broker
	}
}

// of returns the record of the error's reason; nil if no broker is impaired for that reason. The caller holds mu.
func (i *Impairments) of(e *credential.Error) *impaired {
	if e == nil {
		return nil
	}
	return i.byReason[e.Reason]
}

// hasLasted reports whether this broker is impaired for the reason of e, so that retries do not help soon.
func (i *Impairments) hasLasted(e *credential.Error) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	t := i.of(e)
	return t != nil && t.lasting
}

// Run detects impairments until ctx ends. It ignores failures from before it was called.
func (i *Impairments) Run(ctx context.Context) error {
	i.mu.Lock()
	i.fetched = 0
	for _, t := range i.byReason {
		t.end()
	}
	i.mu.Unlock()
	ticker := time.NewTicker(impairmentInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		for _, report := range i.check(time.Now()) {
			report(ctx)
		}
	}
}

// check looks at the outcomes since the last check, and returns what to report.
func (i *Impairments) check(now time.Time) (reports []func(context.Context)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	fetched := i.fetched
	i.fetched = 0
	for _, t := range i.byReason {
		failed := t.failed
		t.failed = 0
		t.fetched += fetched
		switch {
		case t.Count == 0:
			t.fetched = 0
			continue
		case failed > 0 && (t.alone || failed >= fetched && t.Count >= t.fetched):
			t.bad, t.good = now, false
			t.lasting = t.lasting || t.Last.Sub(t.Since) >= impairedAfter
		case fetched > 0:
			t.good = true
		}
		if (t.alone || t.good) && now.Sub(t.bad) >= t.recoveredAfter {
			if t.announced {
				is := t.Impairment
				reports = append(reports, func(ctx context.Context) {
					i.cfg.Logger.InfoContext(ctx, "This broker has recovered", "reason", is.Reason, "since", is.Since)
					i.cfg.Recovered(is)
				})
			}
			t.end()
			continue
		}
		pause := impairmentPause
		if t.announced {
			pause = impairmentRepeat
		}
		if t.lasting && t.bad.Equal(now) && (t.reported.IsZero() || now.Sub(t.reported) >= pause) {
			t.reported, t.announced = now, true
			is := t.Impairment
			reports = append(reports, func(ctx context.Context) {
				i.cfg.Logger.WarnContext(ctx, "This broker is impaired", "reason", is.Reason, "since", is.Since, "failures", is.Count, "error", is.Err)
				i.cfg.Impaired(is)
			})
		}
	}
	return reports
}

// end forgets the impairment, but not when it was reported.
func (t *impaired) end() {
	t.Impairment, t.failed, t.fetched, t.lasting, t.bad, t.good, t.announced = Impairment{}, 0, 0, false, time.Time{}, false, false
}
