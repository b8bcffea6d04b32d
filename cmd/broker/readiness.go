package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/kube/events"
)

// readiness returns the checks that this broker must pass to receive calls, and the check of its identity. shutdown is
// closed when the shutdown begins. deciding is closed when the base ARN is known and prefetch runs.
func (p parts) readiness(shutdown, deciding <-chan struct{}) ([]admin.Check, *identityCheck) {
	warmth := &warmthCheck{
		known:   func() bool { return closed(deciding) && p.directory.Synced() && p.placement.Known() },
		pending: p.prefetch.Pending, progress: p.sessions.Progress,
	}
	identity := &identityCheck{
		identity: p.sts.Identity, sessions: p.sessions.Stats,
		deciding: func() bool { return closed(deciding) }, warm: func() bool { return warmth.check() == nil },
	}
	return []admin.Check{
		{Name: "shutdown", Err: func() error { return unless(!closed(shutdown), "this broker is shutting down") }},
		{Name: "certificate", Err: func() error {
			end := p.pair.NotAfter()
			return unless(time.Now().Before(end), "it expired at "+end.UTC().Format(time.RFC3339))
		}},
		{Name: "base ARN", Err: func() error {
			return unless(closed(deciding), "STS has not returned the account of this broker")
		}},
		{Name: "informers", Err: func() error {
			return unless(p.directory.Synced(), "not all pods, namespaces and service accounts are listed yet")
		}},
		{Name: "endpoints", Err: func() error {
			return unless(p.placement.Known(), "the endpoints of the brokers' Service are not listed yet")
		}},
		{Name: "token verification", Err: func() error {
			return unless(p.verifier.Ready(), "the API server has neither published keys nor reviewed a token yet")
		}},
		{Name: "AWS identity", Err: identity.check},
		{Name: "sessions", Err: warmth.check},
	}, identity
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// identityCheck checks that this broker can get sessions: STS has confirmed its identity, or it has a valid session that pods
// use. Without the check, a broker with wrong keys would replace one that works.
type identityCheck struct {
	identity func() assume.Identity
	sessions func() cache.Stats
	deciding func() bool // whether the base ARN is known
	warm     func() bool // whether the sessions that pods use at the start are cached, or the broker has waited long enough

	mu   sync.Mutex
	done bool // guarded by mu
}

// check passes always after it has passed once: in an outage of STS, a broker that serves its cached sessions is better than
// none.
func (i *identityCheck) check() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.done {
		return nil
	}
	identity, sessions := i.identity(), i.sessions()
	switch {
	case identity.Confirmed || sessions.Warm > 0:
		i.done = true
	case identity.Unsupported && i.deciding() && !i.warm():
		identity.Problem = noSessionYet
	case identity.Unsupported && i.deciding():
		// Only a session can confirm the identity here. A refused role confirms it too. If no pod requests a role, there is
		// nothing to wait for: a new installation has no pods.
		i.done = sessions.Active == 0 || sessions.Refused > 0
		identity.Problem = fmt.Sprintf("the STS-compatible service has no GetCallerIdentity, and none of %d sessions could be fetched; check the keys of the broker and --sts-endpoint (aws.stsEndpoint), the log has each failure", sessions.Active)
	case identity.Problem == "":
		identity.Problem = "STS has not responded yet"
	}
	return unless(i.done, identity.Problem)
}

// noSessionYet is the problem of a broker whose first sessions are being fetched. It is not reported.
const noSessionYet = "the STS-compatible service has no GetCallerIdentity, and no session has been fetched yet"

const (
	// identityInterval is the time between two checks until the identity is confirmed.
	identityInterval = 5 * time.Second
	// identityChecks is how many checks in a row must find the same problem before it is reported: one lost call at the start
	// is normal.
	identityChecks = 3
	// identityRepeat is how often a lasting problem is reported again: an API server keeps an Event for an hour.
	identityRepeat = time.Hour + identityInterval
)

// run reports the problem that keeps this broker from being ready, until the check passes or ctx ends. report must not
// block.
func (i *identityCheck) run(ctx context.Context, report func(problem string)) error {
	ticker := time.NewTicker(identityInterval)
	defer ticker.Stop()
	var problem string
	var reported time.Time // when problem was reported last; zero: not yet
	for found := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		err := i.check()
		if err == nil {
			return nil
		}
		if found++; err.Error() != problem {
			problem, found, reported = err.Error(), 1, time.Time{}
		}
		if problem != noSessionYet && found >= identityChecks && time.Since(reported) >= identityRepeat {
			reported = time.Now()
			report(problem)
		}
	}
}

// watchAWS reports why this broker is not ready because of AWS, and when it is. Then it detects impairments until ctx ends.
func (p parts) watchAWS(ctx context.Context, identity *identityCheck) error {
	reported := false
	err := identity.run(ctx, func(problem string) {
		reported = true
		p.log.WarnContext(ctx, "This broker is not ready, STS has not confirmed its identity", "problem", problem)
		p.reportOwn(events.ReasonIdentity, "This broker is not ready: "+problem)
	})
	if err != nil || ctx.Err() != nil {
		return err
	}
	if reported {
		p.reportOwn(events.ReasonConfirmed, "STS has confirmed the identity of this broker")
	}
	return p.impaired.Run(ctx)
}

// reportOwn writes an Event on this broker's own pod. Outside a cluster there is none.
func (p parts) reportOwn(reason, note string) {
	if p.self.UID != "" {
		p.events.Own(p.self, reason, note, time.Time{}, 0)
	}
}

// maxWarmTime is how long a broker stays unready because it cannot fetch all sessions, when STS is slow or unavailable.
const maxWarmTime = 30 * time.Second

// warmthCheck checks that the sessions of the pods at the start are cached.
type warmthCheck struct {
	known    func() bool // whether the broker knows these pods
	pending  func() int  // how many of them prefetch must still look at
	progress func() (done, active int)

	mu    sync.Mutex
	since time.Time // when known was true first; guarded by mu
	done  bool      // guarded by mu
}

// check passes when all sessions are cached at the same time, or after maxWarmTime. Then it passes always: if STS fails
// later, this broker is no worse than any other.
func (w *warmthCheck) check() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return nil
	}
	if !w.known() {
		return errors.New("the broker does not know yet which sessions pods request")
	}
	if w.since.IsZero() {
		w.since = time.Now()
	}
	pending := w.pending()
	done, active := w.progress()
	w.done = pending == 0 && done == active || time.Since(w.since) >= maxWarmTime
	return unless(w.done, fmt.Sprintf("%d of %d are warm, and prefetch has not looked at %d pods", done, active, pending))
}

// unless returns nil if ok, and otherwise an error with that text.
func unless(ok bool, text string) error {
	if ok {
		return nil
	}
	return errors.New(text)
}
