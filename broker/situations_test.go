package broker_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// The tests of this file are situations in which other brokers were measured; docs/performance.md has their results.

type cacheConfig = cache.Config[policy.Grant]

func slowly(d time.Duration) ststest.Config {
	return ststest.Config{Default: ststest.Behavior{Latency: d}}
}

func TestFortyColdCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, slowly(300*time.Millisecond), cacheConfig{})
		var callers sync.WaitGroup
		for i := range 40 {
			pod := e.pod("shop", fmt.Sprint(i), "role", "cart")
			callers.Go(func() { e.mustGet(pod) })
		}
		callers.Wait()
		if n := e.assumed(); n != 1 {
			t.Errorf("40 callers made %d STS calls", n)
		}
	})
}

// An SDK waits for a second, and tries three times.
func TestCallerLessPatientThanSTS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, slowly(1500*time.Millisecond), cacheConfig{})
		pod := e.pod("shop", "cart", "role", "cart")
		for try := range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, err := e.get(ctx, pod)
			cancel()
			if failed := err != nil; failed != (try == 0) {
				t.Errorf("try %d: %v", try, err)
			}
		}
		if n := e.assumed(); n != 1 {
			t.Errorf("%d STS calls", n)
		}
	})
}

func TestFirstOfSixCallersLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, slowly(300*time.Millisecond), cacheConfig{})
		var callers sync.WaitGroup
		ctx, leave := context.WithCancel(t.Context())
		first := e.pod("shop", "first", "role", "cart")
		callers.Go(func() {
			if _, err := e.get(ctx, first); !errors.Is(err, credential.ErrUnavailable) {
				t.Errorf("the caller that gave up got %v", err)
			}
		})
		synctest.Wait()
		for i := range 5 {
			pod := e.pod("shop", fmt.Sprint(i), "role", "cart")
			callers.Go(func() { e.mustGet(pod) })
		}
		time.Sleep(100 * time.Millisecond)
		leave()
		callers.Wait()
		if n := e.assumed(); n != 1 {
			t.Errorf("%d STS calls", n)
		}
	})
}

// Thousands of sessions without callers, fetched within seconds, are due together. The broker loses none, and renews none
// late.
func TestManyIdleGrantsFallDueTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const grants = 5000
		sts := &plainSTS{latency: 100 * time.Millisecond}
		e := newEngineOn(t, cacheConfig{Source: sts})
		for i := range grants {
			e.pod(fmt.Sprintf("ns-%d", i%20), fmt.Sprint(i), "role", fmt.Sprint("role-", i))
		}
		time.Sleep(time.Minute)
		if s := e.sessions.Stats(); s.Warm != grants {
			t.Fatalf("after a minute %d of %d are warm", s.Warm, grants)
		}
		least := life
		for began := time.Now(); time.Since(began) < life*3/4; time.Sleep(10 * time.Second) {
			s := e.sessions.Stats()
			if s.Warm != grants {
				t.Fatalf("after %s %d of %d are warm", time.Since(began), s.Warm, grants)
			}
			least = min(least, s.Stalest)
		}
		// One fetch of each, and renewals at the usual rate. The broker renews some early, to spread them.
		if n, limit := sts.count(), grants*27/10; n < 2*grants || n > limit {
			t.Errorf("%d STS calls for %d grants, want at least one renewal of each and at most %d calls", n, grants, limit)
		}
		t.Logf("least_remaining_seconds=%.0f", math.Floor(least.Seconds())) // read by make bench
		if least < life*45/100 {
			t.Errorf("a session had %s left, which is too little", least)
		}
		if n := sts.perSecond(); n > allowed(cacheConfig{}) {
			t.Errorf("%d STS calls within a second", n)
		}
	})
}

// STS throttles or is unavailable for 25 minutes, from just before or while sessions are due. Callers do not notice. When STS
// recovers, the broker does not call it for all sessions at once.
func TestLongOutageOfSTS(t *testing.T) {
	const (
		grants = 30
		outage = 25 * time.Minute
	)
	for _, tt := range []struct {
		name  string
		fault *ststest.Fault
		begin time.Duration // when the first sessions fall due is after 24 minutes
	}{
		{"throttles", ststest.Throttling(), 24 * time.Minute},
		{"is unavailable", ststest.Unavailable(), 24 * time.Minute},
		{"hangs up", ststest.Drop(), 33 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEngine(t, slowly(100*time.Millisecond), cacheConfig{})
				end := time.Now().Add(2 * time.Hour)
				var sidecars sync.WaitGroup
				for i := range grants {
					pod := e.pod("shop", fmt.Sprint(i), "role", fmt.Sprint("role-", i))
					sidecars.Go(func() {
						for time.Now().Before(end) {
							answer := e.mustGet(pod)
							if answer == nil {
								return
							}
							time.Sleep(answer.GetRefreshAfter().AsDuration())
							if left := time.Until(answer.GetExpiration().AsTime()); left <= 0 {
								t.Errorf("pod %s got a session that expired %s ago", pod, -left)
							}
						}
					})
				}
				time.Sleep(tt.begin)
				e.sts.SetDefault(ststest.Behavior{Latency: 100 * time.Millisecond, Fault: tt.fault})
				time.Sleep(outage)
				back := time.Now()
				e.sts.SetDefault(ststest.Behavior{Latency: 100 * time.Millisecond})
				time.Sleep(2 * time.Minute)
				if s := e.sessions.Stats(); s.Stalest < life*45/100 || s.Rate < cache.DefaultRate/2 {
					t.Errorf("two minutes after the recovery: %+v", s)
				}
				soon := 0
				for _, call := range e.sts.Calls() {
					if call.Action == "AssumeRole" && !call.Time.Before(back) && call.Time.Before(back.Add(time.Second)) {
						soon++
					}
				}
				if soon > grants/4 {
					t.Errorf("in the second of the recovery there were calls for %d of %d grants", soon, grants)
				}
				sidecars.Wait()
			})
		})
	}
}

func TestOneSlowRole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, slowly(100*time.Millisecond), cacheConfig{})
		e.sts.SetRole(arnOf("slow"), ststest.Behavior{Latency: 9 * time.Second})
		e.sts.SetRole(arnOf("too-slow"), ststest.Behavior{Latency: 10*time.Second + time.Millisecond})
		lost := e.pod("shop", "too-slow", "role", "too-slow")
		var callers sync.WaitGroup
		get := func(role string, within time.Duration) {
			pod := e.pod("shop", role, "role", role)
			callers.Go(func() {
				began := time.Now()
				e.mustGet(pod)
				if took := time.Since(began); took > within {
					t.Errorf("role %s took %s", role, took)
				}
			})
		}
		get("slow", 9*time.Second)
		callers.Go(func() { // the broker gives up an STS call after 10 s
			if _, err := e.get(t.Context(), lost); credential.ReasonOf(err) != credential.ReasonSTSUnavailable {
				t.Errorf("the pod of the slowest role got %v", err)
			}
		})
		synctest.Wait()
		for i := range 60 {
			get(fmt.Sprint("fast-", i), 100*time.Millisecond)
		}
		callers.Wait()
	})
}

func TestColdStart(t *testing.T) {
	const pods, namespaces = 5000, 20
	start := func(t *testing.T, cfg cacheConfig) (sts *plainSTS, took time.Duration) {
		sts = &plainSTS{latency: 100 * time.Millisecond}
		cfg.Source = sts
		e := newEngineOn(t, cfg)
		began := time.Now()
		for i := range pods {
			e.pod(fmt.Sprintf("ns-%d", i%namespaces), fmt.Sprint(i), "role", fmt.Sprint("role-", i))
		}
		for e.sessions.Stats().Warm < pods && time.Since(began) < time.Minute {
			time.Sleep(10 * time.Millisecond)
		}
		s := e.sessions.Stats()
		if s.Warm != pods || sts.count() != pods {
			t.Errorf("of %d pods %d are warm, after %d STS calls", pods, s.Warm, sts.count())
		}
		return sts, time.Since(began)
	}
	t.Run("limited", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			sts, _ := start(t, cacheConfig{MaxPerTenant: 500})
			if n := sts.perSecond(); n > allowed(cacheConfig{}) {
				t.Errorf("%d STS calls within a second", n)
			}
		})
	})
	t.Run("not limited", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			if _, took := start(t, cacheConfig{Rate: rate.Inf}); pods/took.Seconds() < 500 {
				t.Errorf("it took %s, which is %.0f roles per second", took, pods/took.Seconds())
			}
		})
	})
}

func TestPodsThatShareRoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pods, roles = 10_000, 500
		e := newEngine(t, slowly(100*time.Millisecond), cacheConfig{})
		for i := range pods {
			e.pod(fmt.Sprintf("ns-%d", i%20), fmt.Sprint(i), "role", fmt.Sprint("role-", i%roles))
		}
		time.Sleep(time.Minute)
		if s := e.sessions.Stats(); s.Warm != roles || e.assumed() != roles {
			t.Errorf("%d pods of %d roles: %d are warm, after %d STS calls", pods, roles, s.Warm, e.assumed())
		}
	})
}

// One namespace requests more distinct sessions than its maximum.
func TestGreedyNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 500
		e := newEngine(t, slowly(100*time.Millisecond), cacheConfig{MaxPerTenant: limit, Concurrency: 4})
		var greedy []string
		for i := range 10_000 {
			greedy = append(greedy, e.pod("greedy", fmt.Sprint(i), "role", "cart", "external-id", fmt.Sprint("id-", i)))
		}
		synctest.Wait()
		var callers sync.WaitGroup
		began := time.Now()
		modest := e.pod("modest", "cart", "role", "other")
		callers.Go(func() {
			e.mustGet(modest)
			// Its own STS call, and those that were in flight.
			if took := time.Since(began); took > 200*time.Millisecond {
				t.Errorf("the pod of another namespace waited %s", took)
			}
		})
		var mu sync.Mutex
		served, refused := 0, 0 // guarded by mu
		for _, pod := range greedy {
			callers.Go(func() {
				_, err := e.get(t.Context(), pod)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					served++
				case credential.ReasonOf(err) == credential.ReasonTooManyGrants && strings.Contains(err.Error(), `"greedy"`):
					refused++
				default:
					t.Errorf("a pod got %v", err)
				}
			})
		}
		callers.Wait()
		if served != limit || refused != len(greedy)-limit {
			t.Errorf("of %d pods %d were served, %d refused", len(greedy), served, refused)
		}
		if n := e.assumed(); n != limit+1 {
			t.Errorf("%d STS calls", n)
		}
		// A pod that is gone makes room.
		for _, pod := range greedy[:limit] {
			e.end(pod)
		}
		time.Sleep(time.Minute)
		if s := e.sessions.Stats(); s.Active != limit+1 { // with that of the other namespace
			t.Errorf("after pods are gone, %d sessions are active", s.Active)
		}
	})
}

// The broker does not renew the sessions of finished pods.
func TestFinishedJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const jobs = 2000
		e := newEngine(t, slowly(100*time.Millisecond), cacheConfig{})
		var pods []string
		for i := range jobs {
			pods = append(pods, e.pod("jobs", fmt.Sprint(i), "role", "job", "session-scope", "pod"))
		}
		time.Sleep(time.Minute)
		if n := e.assumed(); n != jobs {
			t.Fatalf("%d jobs made %d STS calls", jobs, n)
		}
		for _, pod := range pods {
			e.end(pod)
		}
		time.Sleep(5 * time.Hour)
		if n := e.assumed(); n != jobs {
			t.Errorf("after the end of all jobs there were %d more STS calls", n-jobs)
		}
		if s := e.sessions.Stats(); s.Entries != 0 {
			t.Errorf("%d sessions are still cached", s.Entries)
		}
	})
}

// The broker reports that a role was withdrawn before the pod's session expires.
func TestRefusedRenewalIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, ststest.Config{}, cacheConfig{})
		pod := e.pod("shop", "cart", "role", "cart")
		answer := e.mustGet(pod)
		e.sts.SetRole(arnOf("cart"), ststest.Behavior{Deny: true})
		time.Sleep(answer.GetRefreshAfter().AsDuration())
		e.mustGet(pod)
		e.mu.Lock()
		defer e.mu.Unlock()
		if len(e.refused) != 1 || e.refused[0].Reason != credential.ReasonSTSDenied {
			t.Errorf("reported %v, want one refusal by STS", e.refused)
		}
	})
}
