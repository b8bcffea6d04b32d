package assume_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// TestClockSkew: the skew is learned from successful and failed responses. Its start and its end are logged.
func TestClockSkew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		server, sts := inMemory(t, ststest.Config{}, assume.Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		g := grant(t, nil)
		if skew, known := sts.ClockSkew(); known {
			t.Errorf("before the first response the skew is %v", skew)
		}
		for _, step := range []struct {
			ahead, want    time.Duration // want: to within the second that Date is cut to
			began, resumed int           // lines so far
		}{
			{0, 0, 0, 0},
			{29 * time.Second, 29 * time.Second, 0, 0},
			{32 * time.Second, 32 * time.Second, 1, 0},
			{10 * time.Minute, 10 * time.Minute, 1, 0},
			{25 * time.Second, 25 * time.Second, 1, 0}, // near, not yet right
			{32 * time.Second, 32 * time.Second, 1, 0},
			{-5 * time.Second, -5 * time.Second, 1, 1},
			{-10 * time.Minute, -10 * time.Minute, 2, 1},
			{0, 0, 2, 2},
		} {
			server.SetClock(step.ahead)
			// The first call is refused, because the date is wrong by more than five minutes. The second has the corrected date.
			for _, b := range []ststest.Behavior{{Latency: 2 * time.Second}, {Deny: true}, {Fault: ststest.Unavailable()}} {
				server.SetRole(roleARN, b)
				_, _ = sts.Credential(t.Context(), g)
				if skew, known := sts.ClockSkew(); !known || (skew-step.want).Abs() > 2*time.Second {
					t.Errorf("with AWS %v ahead, the skew is %v, %v", step.ahead, skew, known)
				}
				began, resumed := strings.Count(log.String(), "Detected clock skew"), strings.Count(log.String(), "Clock skew against AWS ended")
				if began != step.began || resumed != step.resumed {
					t.Errorf("with AWS %v ahead, %d and %d lines, want %d and %d:\n%s", step.ahead, began, resumed, step.began, step.resumed, &log)
				}
				time.Sleep(time.Minute)
			}
		}
		// A long exchange does not update the skew.
		server.SetClock(time.Hour)
		server.SetRole(roleARN, ststest.Behavior{Latency: 6 * time.Second})
		_, _ = sts.Credential(t.Context(), g)
		if skew, _ := sts.ClockSkew(); skew > 2*time.Second {
			t.Errorf("a response after six seconds gives skew %v", skew)
		}
	})
}

// TestWrongClockStillWorks: if AWS refuses signatures because of the clock, the call is repeated once with a corrected date.
func TestWrongClockStillWorks(t *testing.T) {
	for _, ahead := range []time.Duration{15 * time.Minute, -15 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			server, sts := inMemory(t, ststest.Config{}, assume.Config{})
			server.SetClock(ahead)
			for range 3 {
				if _, err := sts.Credential(t.Context(), grant(t, nil)); err != nil {
					t.Errorf("AWS %v ahead: %v", ahead, err)
				}
			}
			var codes []string
			for _, c := range server.Calls() {
				codes = append(codes, c.Code)
			}
			if diff := cmp.Diff([]string{"SignatureDoesNotMatch", "", "", ""}, codes); diff != "" {
				t.Errorf("AWS %v ahead: the calls (-want +got):\n%s", ahead, diff)
			}
		})
	}
}

// TestSkewDoesNotDelayRenewal: renewal follows Issued and Expiration on our clock: it is due when between 0.5 and 0.6 of the
// session duration is left on our clock. For each skew that signatures can be corrected for, at least 0.45 of the session must
// then really be left, and pods must never get an expiration later than AWS's.
func TestSkewDoesNotDelayRenewal(t *testing.T) {
	for _, ahead := range []time.Duration{-15 * time.Minute, -10 * time.Minute, -time.Minute, -10 * time.Second, 0, 10 * time.Second, time.Minute, 10 * time.Minute, 15 * time.Minute} {
		for _, duration := range []string{"15m", "1h", "12h"} {
			synctest.Test(t, func(t *testing.T) {
				server, sts := inMemory(t, ststest.Config{}, assume.Config{})
				server.SetClock(ahead)
				g := grant(t, map[policy.Key]string{policy.Duration: duration})
				what := fmt.Sprintf("AWS %v ahead, %s", ahead, duration)
				began := time.Now()
				cred, err := sts.Credential(t.Context(), g)
				asked := g.Duration()
				if -ahead >= asked {
					check(t, what, err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, []string{"already expired", "clock is 15m", "ahead of AWS's"})
					return
				}
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				really := began.Add(asked) // by our clock
				stated := really.Add(ahead)
				if cred.Expiration.After(stated) || !cred.Issued.Equal(began) {
					t.Errorf("%s: issued %v, until %v; AWS stated %v", what, cred.Issued, cred.Expiration, stated)
				}
				if ahead.Abs() <= assume.MaxSkew && !cred.Expiration.Equal(stated) {
					t.Errorf("%s: until %v, though AWS stated %v and the clock is good enough", what, cred.Expiration, stated)
				}
				latest := cred.Expiration.Add(-cred.Duration() / 2) // of renewal
				if left := float64(really.Sub(latest)) / float64(asked); left < 0.45 {
					t.Errorf("%s: %.2f of the session is left when it is renewed", what, left)
				}
			})
		}
	}
}

// TestExpiredResponse: without a date in responses, no skew is assumed. A session that has expired is refused nevertheless.
func TestExpiredResponse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, sts := inMemory(t, ststest.Config{SessionDuration: func(time.Duration) time.Duration { return -time.Minute }}, assume.Config{})
		err := call(t, sts, grant(t, nil), func() int { return server.Count("", "") })
		check(t, "expired", err, credential.ErrUnavailable, credential.ReasonSTSUnavailable, []string{"already expired", "STS-compatible service", roleARN})
	})
	// A session with a stated end in years counts as the requested duration.
	synctest.Test(t, func(t *testing.T) {
		_, sts := inMemory(t, ststest.Config{SessionDuration: func(time.Duration) time.Duration { return 1e5 * time.Hour }}, assume.Config{})
		cred, err := sts.Credential(t.Context(), grant(t, nil))
		if err != nil || cred.Duration() != time.Hour {
			t.Errorf("a session for years lives %v, %v", cred.Duration(), err)
		}
	})
}
