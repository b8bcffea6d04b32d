package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
)

// readiness are the conditions under which this broker should be asked.
func readiness(directory *kube.Directory, verifier *kube.JWKS, sessions *cache.Cache[policy.Grant]) []admin.Check {
	return []admin.Check{
		{Name: "informers", Err: func() error {
			return unless(directory.Synced(), "not all pods, namespaces and service accounts are listed yet")
		}},
		{Name: "signing keys", Err: func() error { return unless(verifier.Ready(), "not fetched yet") }},
		{Name: "sessions", Err: warm(sessions.Warm)},
	}
}

// warmTime is how long a broker that cannot warm all sessions, because STS refuses or is slow, stays
// unready.
const warmTime = 30 * time.Second

// warm is a check that every wanted session is held, for the first half minute.
func warm(count func() (warm, kept int)) func() error {
	started := time.Now()
	return func() error {
		warm, kept := count()
		return unless(warm == kept || time.Since(started) > warmTime, fmt.Sprintf("%d of %d are warm", warm, kept))
	}
}

// unless is nil when ok, and otherwise an error of that text.
func unless(ok bool, text string) error {
	if ok {
		return nil
	}
	return errors.New(text)
}
