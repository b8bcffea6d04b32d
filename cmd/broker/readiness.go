package main

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/credence-iam/credence/broker/admin"
)

// readiness are the conditions under which this broker should be asked.
func (p parts) readiness(based *atomic.Bool) []admin.Check {
	return []admin.Check{
		{Name: "certificate", Err: func() error {
			end := p.pair.NotAfter()
			return unless(time.Now().Before(end), "it expired at "+end.UTC().Format(time.RFC3339))
		}},
		{Name: "base ARN", Err: func() error { return unless(based.Load(), "STS has not said which account this is") }},
		{Name: "informers", Err: func() error {
			return unless(p.directory.Synced(), "not all pods, namespaces and service accounts are listed yet")
		}},
		{Name: "token verification", Err: func() error {
			return unless(p.verifier.Ready(), "the API server has neither published keys nor reviewed a token yet")
		}},
		{Name: "sessions", Err: warm(p.sessions.Warm)},
	}
}

// warmTime is how long a broker that cannot warm all sessions, because STS refuses or is slow, stays
// unready.
const warmTime = 30 * time.Second

// warm is a check that every wanted session is held, for the first half minute.
func warm(count func() (warm, kept int)) func() error {
	started := time.Now()
	return func() error {
		if time.Since(started) > warmTime {
			return nil
		}
		warm, kept := count()
		return unless(warm == kept, fmt.Sprintf("%d of %d are warm", warm, kept))
	}
}

// unless is nil when ok, and otherwise an error of that text.
func unless(ok bool, text string) error {
	if ok {
		return nil
	}
	return errors.New(text)
}
