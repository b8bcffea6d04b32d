package broker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// patient is a broker's detection of impairments, with its reports in the order in which they came.
type patient struct {
	*broker.Impairments

	began   time.Time
	mu      sync.Mutex
	reports []string // guarded by mu
}

func newPatient(t *testing.T) *patient {
	t.Helper()
	p := new(patient)
	report := func(what string) func(broker.Impairment) {
		return func(is broker.Impairment) {
			p.mu.Lock()
			defer p.mu.Unlock()
			line := fmt.Sprintf("%v: %s %s", time.Since(p.began), what, is.Reason)
			if what == "impaired" {
				line += fmt.Sprintf(" x%d since %v", is.Count, is.Since.Sub(p.began))
			}
			p.reports = append(p.reports, line)
		}
	}
	var err error
	p.Impairments, err = broker.NewImpairments(broker.ImpairmentsConfig{
		Impaired: report("impaired"), Recovered: report("recovered"), Logger: slog.New(slog.DiscardHandler),
	})
	fatal(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = p.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	time.Sleep(time.Second / 2) // Checks are never at the times of fetches.
	p.began = time.Now()
	return p
}

// fetch fetches once a second until then: it fails with the reason, or succeeds if that is empty.
func (p *patient) fetch(t *testing.T, until time.Duration, reasons ...credential.Reason) {
	source := p.Source(sourceOf(func() error {
		reason := reasons[0]
		reasons = append(reasons[1:], reason)
		if reason == "" {
			return nil
		}
		return credential.Errorf(credential.ErrUnavailable, reason, "no session")
	}))
	for time.Since(p.began) < until {
		_, _ = source.Credential(t.Context(), policy.Grant{})
		time.Sleep(time.Second)
	}
}

type sourceOf func() error

func (s sourceOf) Credential(context.Context, policy.Grant) (credential.Credential, error) {
	return credential.Credential{}, s()
}

func (p *patient) want(t *testing.T, want ...string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if diff := cmp.Diff(want, p.reports); diff != "" {
		t.Errorf("reports (- want, + got):\n%s", diff)
	}
}

func TestImpairments(t *testing.T) {
	const down, throttled = credential.ReasonSTSUnavailable, credential.ReasonSTSThrottled
	for name, tt := range map[string]struct {
		run  func(t *testing.T, p *patient)
		want []string
	}{
		"an outage": {func(t *testing.T, p *patient) {
			p.fetch(t, 10500*time.Millisecond, "")
			p.fetch(t, 5*time.Minute, down)
			p.fetch(t, 10*time.Minute, "")
		}, []string{"29.5s: impaired STS_UNAVAILABLE x19 since 11s", "5m29.5s: recovered STS_UNAVAILABLE"}},
		"one call after it": {func(t *testing.T, p *patient) {
			p.fetch(t, time.Minute, down)
			p.fetch(t, time.Minute+time.Second, "")
			time.Sleep(time.Hour)
		}, []string{"19.5s: impaired STS_UNAVAILABLE x20 since 0s", "1m29.5s: recovered STS_UNAVAILABLE"}},
		"no call after it": {func(t *testing.T, p *patient) {
			p.fetch(t, time.Minute, down)
			time.Sleep(time.Hour)
		}, []string{"19.5s: impaired STS_UNAVAILABLE x20 since 0s"}},
		"short":                    {func(t *testing.T, p *patient) { p.fetch(t, 12*time.Second, down); p.fetch(t, time.Hour, "") }, nil},
		"one role of three":        {func(t *testing.T, p *patient) { p.fetch(t, time.Hour, down, "", "") }, nil},
		"most roles":               {func(t *testing.T, p *patient) { p.fetch(t, time.Minute, throttled, throttled, "") }, []string{"19.5s: impaired STS_THROTTLED x14 since 0s"}},
		"another reason":           {func(t *testing.T, p *patient) { p.fetch(t, time.Hour, credential.ReasonInternal) }, nil},
		"refusals are no failures": {func(t *testing.T, p *patient) { p.fetch(t, time.Hour, credential.ReasonSTSDenied) }, nil},
		"few calls": {func(t *testing.T, p *patient) {
			for range 3 {
				p.fetch(t, time.Since(p.began)+time.Second, down)
				time.Sleep(20 * time.Minute)
			}
		}, []string{"20m4.5s: impaired STS_UNAVAILABLE x2 since 0s"}},
		"for hours": {func(t *testing.T, p *patient) { p.fetch(t, 2*time.Hour+time.Minute, down) }, []string{
			"19.5s: impaired STS_UNAVAILABLE x20 since 0s", "1h0m19.5s: impaired STS_UNAVAILABLE x3620 since 0s", "2h0m19.5s: impaired STS_UNAVAILABLE x7220 since 0s",
		}},
		"again and again": {func(t *testing.T, p *patient) {
			for time.Since(p.began) < 20*time.Minute {
				p.fetch(t, time.Since(p.began)+time.Minute, down)
				p.fetch(t, time.Since(p.began)+time.Minute, "")
			}
		}, []string{
			"19.5s: impaired STS_UNAVAILABLE x20 since 0s", "1m29.5s: recovered STS_UNAVAILABLE",
			"10m19.5s: impaired STS_UNAVAILABLE x20 since 10m0s", "11m29.5s: recovered STS_UNAVAILABLE",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPatient(t)
				tt.run(t, p)
				p.want(t, tt.want...)
			})
		})
	}
}

// TestWrongAudienceIsAnImpairment: other pods' tokens that are accepted do not hide it.
func TestWrongAudienceIsAnImpairment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPatient(t)
		var reported reports
		known := identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1"}
		observe := broker.ReportTo(&reported, func(id identity.Pod) bool { return id == known }, p.Impairments)
		call := func(id identity.Pod) {
			observe(t.Context(), broker.Call{Err: &credential.Error{
				Kind: credential.ErrUnauthenticated, Reason: credential.ReasonTokenAudience, Message: "set --audience", Cause: &identity.OtherAudienceError{Pod: id},
			}})
		}
		for range 10 {
			call(identity.Pod{Namespace: "shop", Name: "cart-1", UID: "of another cluster"})
			time.Sleep(time.Minute)
		}
		p.want(t)
		for range 3 {
			call(known)
			p.fetch(t, time.Since(p.began)+time.Minute, "")
		}
		p.fetch(t, 20*time.Minute, "")
		p.want(t, "11m4.5s: impaired TOKEN_AUDIENCE x2 since 10m0s", "17m4.5s: recovered TOKEN_AUDIENCE")
	})
}

// TestPodsInAnOutage: pods without a session have it reported, once the outage has lasted. Others have not.
func TestPodsInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, ststest.Config{}, cacheConfig{})
		served := e.pod("shop", "served", "role", "cart")
		e.mustGet(served)
		e.sts.SetOutage(ststest.Failing)
		waiting := e.pod("shop", "waiting", "role", "till")
		call := func() {
			e.mustGet(served)
			if _, err := e.get(t.Context(), waiting); !errors.Is(err, credential.ErrUnavailable) {
				t.Errorf("in the outage: %v", err)
			}
		}
		call()
		e.mu.Lock()
		if len(e.unavailable) != 0 {
			t.Errorf("at first, %q were reported", e.unavailable)
		}
		e.mu.Unlock()
		for range 20 {
			time.Sleep(5 * time.Second)
			call()
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if len(e.unavailable) == 0 || slices.ContainsFunc(e.unavailable, func(s string) bool { return s != "waiting: STS_UNAVAILABLE" }) {
			t.Errorf("%q were reported, want the waiting pod", strings.Join(e.unavailable, ", "))
		}
		if len(e.refused) != 0 {
			t.Errorf("refusals were reported: %v", e.refused)
		}
	})
}
