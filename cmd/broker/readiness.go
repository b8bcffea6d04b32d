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
)

// readiness are the conditions under which this broker should be asked, until serving ends. prefetched is
// empty until the base ARN is known.
func (p parts) readiness(serving context.Context, prefetched *atomic.Pointer[broker.Prefetch]) []admin.Check {
	known := func() bool { return prefetched.Load() != nil && p.directory.Synced() && p.placement.Known() }
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
		{Name: "sessions", Err: (&warmth{known: known, pending: func() int { return prefetched.Load().Pending() }, settled: p.sessions.Settled}).check},
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
