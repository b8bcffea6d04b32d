package main

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/cache"
)

// A broker for which no pod requests a role is ready only after it has looked at all pods.
func TestIdentityCheckWaitsUntilPodsAreKnown(t *testing.T) {
	var (
		sessions       cache.Stats
		deciding, warm bool
	)
	i := &identityCheck{
		identity: func() assume.Identity { return assume.Identity{Unsupported: true, Problem: "set --base-arn"} },
		sessions: func() cache.Stats { return sessions },
		deciding: func() bool { return deciding }, warm: func() bool { return warm },
	}
	check := func(when, want string) {
		t.Helper()
		if err := i.check(); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", when, err, want)
		}
	}
	check("without a base ARN", "set --base-arn")
	deciding = true
	check("before pods are known", noSessionYet)
	sessions.Active, warm = 2, true
	check("without a session for them", "none of 2 sessions")
	sessions.Refused = 1
	check("when STS has refused a role", "")
	sessions = cache.Stats{Active: 2}
	check("later", "")
}

func TestWarmth(t *testing.T) {
	// A look is what the broker knows at one check, and whether it is ready then.
	type look struct {
		after                 time.Duration
		known                 bool
		pending, done, active int
		ready                 bool
	}
	for name, looks := range map[string][]look{
		"all warm":                            {{0, true, 0, 3, 3, true}},
		"no pod requests a role":              {{0, true, 0, 0, 0, true}},
		"prefetch has not looked at the pods": {{0, true, 7, 0, 0, false}, {time.Second, true, 0, 7, 7, true}},
		"never goes back":                     {{0, true, 0, 3, 3, true}, {time.Hour, true, 5, 0, 9, true}},
		"waits no longer than half a minute":  {{0, true, 0, 1, 3, false}, {29 * time.Second, true, 0, 2, 3, false}, {time.Second, true, 0, 2, 3, true}},
		// STS or the API server may be unavailable for long at the start. The half minute begins after that.
		"the time begins when the pods are known": {
			{0, false, 0, 0, 0, false}, {time.Hour, false, 0, 0, 0, false}, {0, true, 0, 0, 5, false},
			{29 * time.Second, true, 0, 4, 5, false}, {time.Second, true, 0, 5, 5, true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var now look
				w := warmthCheck{
					known:    func() bool { return now.known },
					pending:  func() int { return now.pending },
					progress: func() (int, int) { return now.done, now.active },
				}
				for i, l := range looks {
					now = l
					time.Sleep(now.after)
					if err := w.check(); (err == nil) != now.ready {
						t.Errorf("look %d %+v: %v", i, now, err)
					} else if err != nil && now.known && !strings.Contains(err.Error(), "are warm") {
						t.Errorf("look %d says %q", i, err)
					}
				}
			})
		})
	}
}
