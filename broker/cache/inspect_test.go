package cache_test

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

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
)

func all(string) bool { return true }

func only(key string) func(string) bool { return func(k string) bool { return k == key } }

func stateOf(t *testing.T, c *cache.Cache[string], key string) cache.State[string] {
	t.Helper()
	states := c.States(only(key))
	if len(states) != 1 {
		t.Fatalf("%d states of %s", len(states), key)
	}
	return states[0]
}

func TestDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "active")
		first := mustGet(t, c, "active")
		mustGet(t, c, "requested")
		mustGet(t, c, "other")
		if n := c.Drop(func(key string) bool { return key != "other" }); n != 2 {
			t.Errorf("%d keys were dropped", n)
		}
		for _, key := range []string{"active", "requested"} {
			for _, state := range c.States(only(key)) {
				if state.AccessKeyID != "" {
					t.Errorf("%s still has session %s after Drop", key, state.AccessKeyID)
				}
			}
		}
		if stateOf(t, c, "other").AccessKeyID == "" {
			t.Error("Drop removed the session of a key that does not match")
		}
		// An active key is fetched again without a caller.
		time.Sleep(1100 * time.Millisecond)
		if again := mustGet(t, c, "active"); again.AccessKeyID == first.AccessKeyID || len(s.of("active")) != 2 {
			t.Errorf("after Drop Get returns %s, with %d fetches", again, len(s.of("active")))
		}
		if n := len(s.of("requested")); n != 1 {
			t.Errorf("an inactive key was fetched %d times", n)
		}
	})
}

func TestRenewServesTheCurrentSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		first := mustGet(t, c, "a")
		mustGet(t, c, "inactive")
		if n := c.Renew(all); n != 1 {
			t.Errorf("%d keys are renewed, want the active one", n)
		}
		synctest.Wait()
		if v := mustGet(t, c, "a"); v.AccessKeyID != first.AccessKeyID {
			t.Errorf("during the renewal Get returns %s", v)
		}
		time.Sleep(1100 * time.Millisecond)
		if v := mustGet(t, c, "a"); v.AccessKeyID == first.AccessKeyID {
			t.Error("the session was not renewed")
		}
	})
}

// The result of a fetch that was in flight when the role's sessions were revoked is not used.
func TestDropOutdatesFetchesInFlight(t *testing.T) {
	for name, again := range map[string]func(*cache.Cache[string]) int{
		"drop":  func(c *cache.Cache[string]) int { return c.Drop(all) },
		"renew": func(c *cache.Cache[string]) int { return c.Renew(all) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := new(source)
				s.answer = func(ctx context.Context, _ string) (credential.Credential, error) {
					issued := s.session(fullDuration) // and a slow response
					return issued, sleep(ctx, time.Second)
				}
				c := start(t, s, cache.Config[string]{})
				began := time.Now()
				var callers sync.WaitGroup
				for range 3 {
					callers.Go(func() {
						if v := mustGet(t, c, "a"); v.AccessKeyID != "ASIA2" {
							t.Errorf("a caller got %s, which is older than the revocation", v)
						}
						if took := time.Since(began); took != 2*time.Second {
							t.Errorf("a caller waited %s", took)
						}
					})
				}
				time.Sleep(500 * time.Millisecond)
				again(c)
				callers.Wait()
			})
		})
	}
}

// Nor is a session that was cached when its caller came.
func TestDropReachesWaitingCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		first := mustGet(t, c, "a")
		s.slow(time.Hour)
		time.Sleep(part(0.55)) // the caller waits for the renewal
		var caller sync.WaitGroup
		caller.Go(func() {
			v, err := c.Get(t.Context(), "a", "")
			if !errors.Is(err, credential.ErrUnavailable) || v.AccessKeyID == first.AccessKeyID {
				t.Errorf("the caller got %s, %v", v, err)
			}
		})
		time.Sleep(100 * time.Millisecond)
		c.Drop(all)
		caller.Wait()
	})
}

func TestRenewForgetsRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.fail(refusal())
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		synctest.Wait()
		if state := stateOf(t, c, "a"); !errors.Is(state.Failure, credential.ErrDenied) || state.Failures != 1 || !state.NotBefore.After(time.Now()) {
			t.Errorf("state %+v", state)
		}
		s.slow(time.Second) // the user fixed the cause, and does not want to wait
		c.Renew(all)
		mustGet(t, c, "a")
		if state := stateOf(t, c, "a"); state.Failure != nil || state.Failures != 0 {
			t.Errorf("state %+v", state)
		}
	})
}

func TestStatsAndStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{Concurrency: 1})
		want := func(want cache.Stats) {
			t.Helper()
			synctest.Wait()
			got := c.Stats()
			want.Rate, want.Share = cache.DefaultRate, cache.DefaultRate
			// Sessions are renewed after 0.45 of their durations on average.
			if demand := float64(want.Warm) / (0.45 * fullDuration.Seconds()); math.Abs(got.Demand-demand) > demand/1000 {
				t.Errorf("the demand of %[2]d sessions is %[1]v", got.Demand, want.Warm)
			}
			want.Demand = got.Demand
			if got != want {
				t.Errorf("stats are\n%+v, want\n%+v", got, want)
			}
		}
		want(cache.Stats{})
		retain(t, c, "cached")
		mustGet(t, c, "cached")
		want(cache.Stats{Entries: 1, Active: 1, Warm: 1, Stalest: fullDuration, StalestPart: 1, Misses: 1, Fetched: 1, ForCallers: 1})

		time.Sleep(time.Minute)
		s.fail(refusal())
		retain(t, c, "refused")
		want(cache.Stats{Entries: 2, Active: 2, Warm: 1, Refused: 1, Stalest: fullDuration - time.Minute, StalestPart: fractionAfter(time.Minute), Misses: 1, Fetched: 1, Failed: 1, ForCallers: 1, Prefetches: 1})
		if done, active := c.Progress(); done != 2 || active != 2 {
			t.Errorf("%d of %d need no fetch", done, active)
		}

		time.Sleep(time.Second)
		s.slow(time.Hour)
		var callers sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		for _, key := range []string{"hangs", "waits"} {
			callers.Go(func() { _, _ = c.Get(ctx, key, "shop") })
			synctest.Wait()
		}
		retain(t, c, "ahead")
		c.Renew(only("cached"))
		mustGet(t, c, "cached")
		want(cache.Stats{
			Entries: 5, Active: 3, Warm: 1, Refused: 1, Waiting: 1, Renewing: 1, Ahead: 1, InFlight: 1,
			Stalest: fullDuration - 61*time.Second, StalestPart: fractionAfter(61 * time.Second), Hits: 1, Misses: 3, Fetched: 1, Failed: 1, ForCallers: 2, Prefetches: 1,
		})
		if done, active := c.Progress(); done != 2 || active != 3 {
			t.Errorf("%d of %d need no fetch", done, active)
		}
		if state := stateOf(t, c, "waits"); !state.Fetching || state.Waiters != 1 || len(state.Tenants) != 1 || state.Tenants[0] != "shop" || !state.NextLook.IsZero() {
			t.Errorf("state %+v", state)
		}
		if state := stateOf(t, c, "cached"); state.AccessKeyID != "ASIA1" || state.Active != 1 || !state.Fetching {
			t.Errorf("state %+v", state)
		}
		if state := fmt.Sprintf("%+v", c.States(all)); strings.Contains(state, secretMarker) {
			t.Errorf("the states contain a secret: %s", state)
		}
		cancel()
		callers.Wait()
	})
}

// fractionAfter is the part of a session that is left after that time.
func fractionAfter(t time.Duration) float64 { return float64(fullDuration-t) / float64(fullDuration) }

// Stats shows overdue renewals, and why fetches began.
func TestStatsOfLateRenewals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{FetchTimeout: fullDuration})
		retain(t, c, "active")
		mustGet(t, c, "active")
		mustGet(t, c, "inactive")
		s.slow(part(0.3))
		time.Sleep(part(0.549))
		if stats := c.Stats(); stats.Late != 0 || stats.Renewals != 1 {
			t.Errorf("in time: %+v", stats)
		}
		time.Sleep(part(0.002))
		if stats := c.Stats(); stats.Late != 1 || stats.Warm != 1 {
			t.Errorf("late: %+v", stats)
		}
		mustGet(t, c, "inactive") // begins a renewal, and waits for a part of it
		time.Sleep(part(0.3))
		if stats := c.Stats(); stats.Late != 0 || stats.Renewals != 2 || stats.ForCallers+stats.Prefetches != 2 {
			t.Errorf("renewed: %+v", stats)
		}
		time.Sleep(part(2))
		c.Release("active", "")
		if stats := c.Stats(); stats.Demand != 0 || stats.Late != 0 {
			t.Errorf("released: %+v", stats)
		}
	})
}

func TestFetchHasTheFirstCallersValues(t *testing.T) {
	type name struct{}
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		var mu sync.Mutex
		var seen []string // guarded by mu
		s.answer = func(ctx context.Context, _ string) (credential.Credential, error) {
			value, _ := ctx.Value(name{}).(string)
			mu.Lock()
			seen = append(seen, value)
			mu.Unlock()
			if err := sleep(ctx, time.Second); err != nil {
				return credential.Credential{}, err
			}
			return s.session(fullDuration), nil
		}
		c := start(t, s, cache.Config[string]{Rate: rate.Inf})
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), name{}, "first"))
		var callers sync.WaitGroup
		callers.Go(func() { _, _ = c.Get(ctx, "a", "") })
		synctest.Wait()
		callers.Go(func() { mustGet(t, c, "a") })
		synctest.Wait()
		cancel() // The fetch continues.
		callers.Wait()
		retain(t, c, "b")
		time.Sleep(2 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		if got := strings.Join(seen, ","); got != "first," {
			t.Errorf("the fetches saw %q", got)
		}
	})
}

// Timers stop while a machine is suspended, and sessions expire. Sessions that are due then are renewed soon after.
func TestRenewalAfterASuspend(t *testing.T) {
	for _, duration := range []time.Duration{15 * time.Minute, time.Hour, 12 * time.Hour} {
		for _, part := range []float64{0.6, 1.5} { // after its renewal time, after its expiration
			t.Run(fmt.Sprintf("%s, for %v of it", duration, part), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := &source{}
					s.respond(func(context.Context, string) (credential.Credential, error) { return s.session(duration), nil })
					c := start(t, s, cache.Config[string]{})
					retain(t, c, "a")
					time.Sleep(10 * time.Second)
					synctest.Wait()
					if n := s.count(); n != 1 {
						t.Fatalf("%d fetches at the start", n)
					}
					c.Suspend(time.Duration(part * float64(duration)))
					time.Sleep(time.Minute)
					synctest.Wait()
					if n := s.count(); n != 2 {
						t.Errorf("%d fetches a minute after a suspend, want 2", n)
					}
				})
			})
		}
	}
}
