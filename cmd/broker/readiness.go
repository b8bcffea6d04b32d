package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/cache"
)

// readiness are the conditions under which this broker should be asked, until serving ends. prefetched is
// empty until the base ARN is known.
func (p parts) readiness(serving context.Context, prefetched *atomic.Pointer[broker.Prefetch]) ([]admin.Check, *proof) {
	known := func() bool { return prefetched.Load() != nil && p.directory.Synced() && p.placement.Known() }
	warmth := &warmth{known: known, pending: func() int { return prefetched.Load().Pending() }, settled: p.sessions.Settled}
	proof := &proof{
		of: p.sts.Identity, held: p.sessions.Stats,
		based: func() bool { return prefetched.Load() != nil }, warmed: func() bool { return warmth.check() == nil },
	}
	return []admin.Check{
		{Name: "shutdown", Err: func() error { return unless(serving.Err() == nil, "this broker was told to end") }},
		{Name: "certificate", Err: func() error {
			end := p.pair.NotAfter()
			return unless(time.Now().Before(end), "it expired at "+end.UTC().Format(time.RFC3339))
		}},
		{Name: "base ARN", Err: func() error {
			return unless(prefetched.Load() != nil, "STS has not said which account this is")
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
		{Name: "AWS identity", Err: proof.check},
		{Name: "sessions", Err: warmth.check},
	}, proof
}

// proof is whether this broker can do its job: STS has confirmed its identity, or it holds a session that pods want.
// Otherwise a broker with wrong keys would replace one that works.
type proof struct {
	of     func() assume.Identity
	held   func() cache.Stats
	based  func() bool // whether the base ARN is known
	warmed func() bool // whether the sessions that pods want at the start are held, or were waited for

	mu   sync.Mutex
	done bool // guarded by mu
}

// check passes once this broker has proved that it can, and from then on always: in an outage of STS a broker that serves
// its cached sessions is worth more than none.
func (i *proof) check() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.done {
		return nil
	}
	is, held := i.of(), i.held()
	switch {
	case is.Confirmed || held.Warm > 0:
		i.done = true
	case is.Unsupported && i.based() && !i.warmed():
		is.Problem = noSessionYet
	case is.Unsupported && i.based():
		// Nothing but a session can prove it there. A refused role does too, and if no pod wants one there is nothing to
		// wait for: a first installation has no pods.
		i.done = held.Active == 0 || held.Refused > 0
		is.Problem = fmt.Sprintf("the STS-compatible service has no GetCallerIdentity, and none of %d sessions could be fetched: check the keys of the broker and --sts-endpoint (aws.stsEndpoint); the log has each failure", held.Active)
	case is.Problem == "":
		is.Problem = "STS has not answered yet"
	}
	return unless(i.done, is.Problem)
}

// noSessionYet is what a broker waits for that is on its way.
const noSessionYet = "the STS-compatible service has no GetCallerIdentity, and no session has come yet"

const (
	// identityLook is how often the identity is looked at until it is confirmed.
	identityLook = 5 * time.Second
	// identityLooks is how many looks in a row must find the same problem before it is reported: a call that is lost at
	// the start is no news.
	identityLooks = 3
	// identityAgain is how often a problem that lasts is reported: an API server keeps an Event for an hour.
	identityAgain = time.Hour + identityLook
)

// run reports what keeps this broker from being ready, until nothing does or ctx ends. tell must not block.
func (i *proof) run(ctx context.Context, tell func(problem string)) error {
	ticker := time.NewTicker(identityLook)
	defer ticker.Stop()
	var last string
	var told time.Time // when last was
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
		if found++; err.Error() != last {
			last, found, told = err.Error(), 1, time.Time{}
		}
		if last != noSessionYet && found >= identityLooks && time.Since(told) >= identityAgain {
			told = time.Now()
			tell(last)
		}
	}
}

// reportIdentity has an Event on the broker's own pod say why it is not ready.
func (p parts) reportIdentity(problem string) {
	p.log.Warn("This broker is not ready, because STS has not confirmed who it is", "problem", problem)
	if p.own.UID != "" { // outside a cluster there is no pod to tell it of
		p.events.IdentityUnconfirmed(p.own, "This broker is not ready: "+problem)
	}
}

// warmTime is how long a broker that cannot warm all sessions, because STS is slow or away, stays unready.
const warmTime = 30 * time.Second

// warmth is whether the sessions of the pods that there were at the start are held.
type warmth struct {
	known   func() bool // which pods there are
	pending func() int  // how many have not been looked at
	settled func() (settled, kept int)

	mu    sync.Mutex
	since time.Time // when known held first; guarded by mu
	done  bool      // guarded by mu
}

// check passes once all sessions have been held at the same time, or have been waited for long enough. From then
// on it passes always: a broker that STS leaves alone later is no worse than any other.
func (w *warmth) check() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return nil
	}
	if !w.known() {
		return errors.New("it is not known yet which are wanted")
	}
	if w.since.IsZero() {
		w.since = time.Now()
	}
	pending := w.pending()
	settled, kept := w.settled()
	w.done = pending == 0 && settled == kept || time.Since(w.since) >= warmTime
	return unless(w.done, fmt.Sprintf("%d of %d are warm, and %d pods are not looked at", settled, kept, pending))
}

// unless is nil when ok, and otherwise an error of that text.
func unless(ok bool, text string) error {
	if ok {
		return nil
	}
	return errors.New(text)
}
