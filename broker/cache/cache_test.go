package cache_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
)

// fullDuration is the default duration of the sessions that a source returns.
const fullDuration = time.Hour

// secretMarker is the secret of every session. No log may contain it.
const secretMarker = "QZQZQZQZ"

// fetch is one call of a source.
type fetch struct {
	key string
	at  time.Time
}

// source is a credential.Source that records its calls.
type source struct {
	// answer handles each call, if set. Otherwise each call returns a session of duration fullDuration at once.
	answer func(ctx context.Context, key string) (credential.Credential, error)

	mu         sync.Mutex
	calls      []fetch
	running    map[string]int
	most       int // calls at a time
	mostPerKey int
	inFlight   int
	sessions   int
}

func (s *source) Credential(ctx context.Context, key string) (credential.Credential, error) {
	s.mu.Lock()
	s.calls = append(s.calls, fetch{key, time.Now()})
	if s.running == nil {
		s.running = map[string]int{}
	}
	s.running[key]++
	s.inFlight++
	s.most, s.mostPerKey = max(s.most, s.inFlight), max(s.mostPerKey, s.running[key])
	answer := s.answer
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.running[key]--
		s.inFlight--
	}()
	if answer == nil {
		return s.session(fullDuration), nil
	}
	return answer(ctx, key)
}

// session makes the next session, of the given duration.
func (s *source) session(duration time.Duration) credential.Credential {
	s.mu.Lock()
	s.sessions++
	id := fmt.Sprintf("ASIA%d", s.sessions)
	s.mu.Unlock()
	now := time.Now()
	return credential.Credential{
		AccessKeyID: id, SecretAccessKey: credential.NewSecret(secretMarker), SessionToken: credential.NewSecret(secretMarker),
		Issued: now, Expiration: now.Add(duration),
	}
}

// slow makes the source respond after d, or when the call's context ends.
func (s *source) slow(d time.Duration) *source {
	s.respond(func(ctx context.Context, _ string) (credential.Credential, error) {
		if err := sleep(ctx, d); err != nil {
			return credential.Credential{}, err
		}
		return s.session(fullDuration), nil
	})
	return s
}

// respond makes answer handle all calls from now on.
func (s *source) respond(answer func(context.Context, string) (credential.Credential, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

func (s *source) fail(err error) {
	s.respond(func(context.Context, string) (credential.Credential, error) { return credential.Credential{}, err })
}

func (s *source) recorded() []fetch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// maxAtOnce returns the maximum number of calls at a time, of all keys and of one key.
func (s *source) maxAtOnce() (all, perKey int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.most, s.mostPerKey
}

func (s *source) count() int { return len(s.recorded()) }

// of returns the times of one key's calls.
func (s *source) of(key string) (times []time.Time) {
	for _, call := range s.recorded() {
		if call.key == key {
			times = append(times, call.at)
		}
	}
	return times
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func unavailable() error {
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable, "STS is unavailable")
}

func refusal() error {
	return credential.Errorf(credential.ErrDenied, credential.ReasonSTSDenied, "STS refuses")
}

// start runs a cache over s until the test ends. cfg needs no Source and no Logger.
func start(t testing.TB, s *source, cfg cache.Config[string]) *cache.Cache[string] {
	t.Helper()
	c, stop := startStoppable(t, s, cfg)
	t.Cleanup(stop)
	return c
}

func startStoppable(t testing.TB, s *source, cfg cache.Config[string]) (c *cache.Cache[string], stop func()) {
	t.Helper()
	cfg.Source = s
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c, err := cache.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	return c, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run returned %v", err)
		}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		if _, n := s.maxAtOnce(); n > 1 {
			t.Errorf("%d fetches of one key ran at a time", n)
		}
	})
}

func mustGet(t *testing.T, c *cache.Cache[string], key string) cache.Value {
	t.Helper()
	v, err := c.Get(t.Context(), key, "")
	if err != nil {
		t.Fatalf("Get(%s): %v", key, err)
	}
	if !v.Valid(time.Now()) {
		t.Fatalf("Get(%s) returned a session that is not valid: %s", key, v)
	}
	return v
}

func retain(t testing.TB, c *cache.Cache[string], key string) {
	t.Helper()
	if err := c.Retain(key, ""); err != nil {
		t.Errorf("Retain(%s): %v", key, err)
	}
}

func within(d, low, high time.Duration) bool { return low <= d && d <= high }

func part(f float64) time.Duration { return time.Duration(f * float64(fullDuration)) }

func TestNew(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	for name, cfg := range map[string]cache.Config[string]{
		"zero":                 {},
		"no logger":            {Source: &source{}},
		"no source":            {Logger: logger},
		"negative concurrency": {Source: &source{}, Logger: logger, Concurrency: -1},
		"negative rate":        {Source: &source{}, Logger: logger, Rate: -1},
		"negative timeout":     {Source: &source{}, Logger: logger, FetchTimeout: -1},
	} {
		if c, err := cache.New(cfg); err == nil || c != nil {
			t.Errorf("%s: New returned %v, %v", name, c, err)
		}
	}
}

func TestOneFetchForManyCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(100 * time.Millisecond)
		c := start(t, s, cache.Config[string]{})
		var ids sync.Map
		var wg sync.WaitGroup
		for range 40 {
			wg.Go(func() { ids.Store(mustGet(t, c, "a").AccessKeyID, nil) })
		}
		wg.Wait()
		if n := s.count(); n != 1 {
			t.Errorf("40 callers made %d fetches", n)
		}
		ids.Range(func(id, _ any) bool {
			if id != "ASIA1" {
				t.Errorf("a caller got %s, want ASIA1", id)
			}
			return true
		})
	})
}

// A caller that gives up does not affect others.
func TestFirstCallerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{})
		began := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := c.Get(ctx, "a", "")
			if !errors.Is(err, credential.ErrUnavailable) || !errors.Is(err, context.Canceled) {
				t.Errorf("the caller that gave up got %v", err)
			}
			if took := time.Since(began); took != 100*time.Millisecond {
				t.Errorf("the caller that gave up after 100 ms got its error after %s", took)
			}
		})
		synctest.Wait()
		for range 5 {
			wg.Go(func() { mustGet(t, c, "a") })
		}
		time.Sleep(100 * time.Millisecond)
		cancel()
		wg.Wait()
		if took := time.Since(began); took != time.Second {
			t.Errorf("the others waited %s", took)
		}
		if n := s.count(); n != 1 {
			t.Errorf("%d fetches, want 1", n)
		}
	})
}

// A source that is slower than its callers' deadlines is not called again and again.
func TestFetchOutlivesDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(1500 * time.Millisecond)
		c := start(t, s, cache.Config[string]{})
		for try := range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, err := c.Get(ctx, "a", "")
			cancel()
			if (err == nil) != (try > 0) {
				t.Errorf("try %d: %v", try, err)
			}
			if try == 0 && (!errors.Is(err, credential.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded)) {
				t.Errorf("the first caller got %v", err)
			}
		}
		if n := s.count(); n != 1 {
			t.Errorf("%d fetches, want 1", n)
		}
	})
}

// The result of a fetch that lost all callers is there for the next caller.
func TestResultWithoutCallersIsCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := c.Get(ctx, "a", ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Get = %v", err)
		}
		time.Sleep(2 * time.Second)
		began := time.Now()
		mustGet(t, c, "a")
		if n := s.count(); n != 1 || time.Since(began) != 0 {
			t.Errorf("%d fetches, and the second caller waited %s", n, time.Since(began))
		}
	})
}

// A fetch that has not begun when its last caller gives up is dropped, unless the key is active: its callers have moved to
// another cache.
func TestQueuedFetchWithoutCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{Concurrency: 1})
		retain(t, c, "plug")
		retain(t, c, "active")
		synctest.Wait()
		var callers sync.WaitGroup
		for _, key := range []string{"active", "inactive", "inactive", "awaited"} {
			patience := 500 * time.Millisecond
			if key == "awaited" {
				patience = time.Minute
			}
			callers.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, _ = c.Get(ctx, key, "")
			})
		}
		callers.Wait()
		time.Sleep(time.Minute)
		var fetched []string
		for _, f := range s.recorded() {
			fetched = append(fetched, f.key)
		}
		if want := []string{"plug", "awaited", "active"}; !slices.Equal(fetched, want) {
			t.Errorf("fetched %q, want %q", fetched, want)
		}
	})
}

func TestRefreshAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var duration time.Duration
		s := new(source)
		s.answer = func(context.Context, string) (credential.Credential, error) { return s.session(duration), nil }
		c := start(t, s, cache.Config[string]{Rate: rate.Inf})
		for _, tt := range []struct{ duration, low, high time.Duration }{
			{time.Hour, 30 * time.Minute, 33 * time.Minute},
			{15 * time.Minute, 450 * time.Second, 495 * time.Second},
			{12 * time.Hour, time.Hour, time.Hour},                 // at most 1 h
			{30 * time.Second, 30 * time.Second, 30 * time.Second}, // at least 30 s
		} {
			duration = tt.duration
			seen := map[time.Duration]bool{}
			for i := range 100 {
				v := mustGet(t, c, fmt.Sprintf("%s/%d", tt.duration, i))
				seen[v.RefreshAfter] = true
				if !within(v.RefreshAfter, tt.low, tt.high) {
					t.Errorf("RefreshAfter of a new session of %s is %s", tt.duration, v.RefreshAfter)
				}
			}
			if tt.low != tt.high && len(seen) < 50 {
				t.Errorf("100 callers get %[2]d values of RefreshAfter for sessions of %[1]s", tt.duration, len(seen))
			}
		}
		// Later callers of the same session return no later than the first.
		duration = time.Hour
		mustGet(t, c, "a")
		time.Sleep(20 * time.Minute)
		for range 100 {
			v := mustGet(t, c, "a")
			if left := v.Remaining(time.Now()) - v.RefreshAfter; !within(left, part(0.45), part(0.50)) {
				t.Errorf("a caller returns when %s are left", left)
			}
		}
	})
}

// A caller that returns after RefreshAfter always gets the renewed session.
func TestReturningCallersGetRenewedSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(100 * time.Millisecond)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		v := mustGet(t, c, "a")
		for range 200 {
			time.Sleep(v.RefreshAfter)
			if left := v.Remaining(time.Now()); left < part(0.45) {
				t.Errorf("the caller serves a session with %s left", left)
			}
			next := mustGet(t, c, "a")
			if next.AccessKeyID == v.AccessKeyID || next.Remaining(time.Now()) < part(0.85) {
				t.Errorf("the caller gets %s after %s, with %s left", next, v, next.Remaining(time.Now()))
			}
			v = next
		}
	})
}

func TestFailedRenewalKeepsTheOldSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		first := mustGet(t, c, "a")
		s.fail(unavailable())
		for time.Now().Before(first.Expiration.Add(-time.Second)) {
			time.Sleep(time.Second)
			if v := mustGet(t, c, "a"); v.AccessKeyID != first.AccessKeyID {
				t.Fatalf("the old session was replaced by %s", v)
			}
		}
		if s.count() < 10 {
			t.Errorf("the renewal was tried only %d times", s.count())
		}
		time.Sleep(time.Second)
		if _, err := c.Get(t.Context(), "a", ""); !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonSTSUnavailable {
			t.Errorf("after the expiration Get returns %v", err)
		}
		if warm, active := c.Progress(); warm != 0 || active != 1 {
			t.Errorf("%d of %d keys are warm", warm, active)
		}
		s.respond(nil)
		time.Sleep(30 * time.Second) // the maximum wait between fetches
		calls := s.count()
		if v := mustGet(t, c, "a"); v.AccessKeyID == first.AccessKeyID || s.count() != calls {
			t.Errorf("after the outage Get returns %s, which it fetched itself: %v", v, s.count() != calls)
		}
		if warm, active := c.Progress(); warm != 1 || active != 1 {
			t.Errorf("%d of %d keys are warm", warm, active)
		}
	})
}

// waits returns the times between successive calls.
func waits(times []time.Time) (all []time.Duration) {
	for i := range len(times) - 1 {
		all = append(all, times[i+1].Sub(times[i]))
	}
	return all
}

func TestRetries(t *testing.T) {
	throttled := &credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "m", RetryAfter: 3 * time.Second}
	tooLong := &credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "m", RetryAfter: 24 * time.Hour}
	for name, tt := range map[string]struct {
		err                            error
		firstLow, firstHigh, low, high time.Duration
	}{
		"unavailable":         {unavailable(), 200 * time.Millisecond, 400 * time.Millisecond, 15 * time.Second, 30 * time.Second},
		"plain":               {errors.New("broken"), 200 * time.Millisecond, 400 * time.Millisecond, 15 * time.Second, 30 * time.Second},
		"refused":             {refusal(), 10 * time.Second, 20 * time.Second, 30 * time.Second, 60 * time.Second},
		"invalid":             {credential.Errorf(credential.ErrInvalid, credential.ReasonSTSRejected, "m"), 10 * time.Second, 20 * time.Second, 30 * time.Second, 60 * time.Second},
		"wait requested":      {throttled, 3 * time.Second, 6 * time.Second, 15 * time.Second, 30 * time.Second},
		"long wait requested": {tooLong, 30 * time.Second, 30 * time.Second, 30 * time.Second, 30 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			s.fail(tt.err)
			c := start(t, s, cache.Config[string]{})
			retain(t, c, "a")
			time.Sleep(time.Hour)
			all := waits(s.of("a"))
			if len(all) < 50 {
				t.Fatalf("%s: %d fetches in an hour", name, len(all)+1)
			}
			seen := map[time.Duration]bool{}
			for i, wait := range all {
				if i == 0 && !within(wait, tt.firstLow, tt.firstHigh) {
					t.Errorf("%s: the first wait is %s", name, wait)
				}
				if !within(wait, tt.firstLow, tt.high) || i > 10 && !within(wait, tt.low, tt.high) {
					t.Errorf("%s: wait %d is %s", name, i, wait)
				}
				seen[wait] = true
			}
			if tt.low != tt.high && len(seen) < len(all)/2 {
				t.Errorf("%s: %d waits have only %d lengths", name, len(all), len(seen))
			}
		})
	}
}

// A refusal is cached: callers get it without another call, with the time until the next fetch.
func TestRefusalsAreCached(t *testing.T) {
	for _, active := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			s.fail(refusal())
			c := start(t, s, cache.Config[string]{})
			if active {
				retain(t, c, "a")
			}
			// a sidecar that calls far too often
			for range 600 {
				_, err := c.Get(t.Context(), "a", "")
				e, ok := errors.AsType[*credential.Error](err)
				if !ok || !errors.Is(err, credential.ErrDenied) || e.Reason != credential.ReasonSTSDenied || e.Message != "STS refuses" {
					t.Fatalf("Get = %v", err)
				}
				if !within(e.RetryAfter, 0, 60*time.Second) {
					t.Errorf("RetryAfter is %s", e.RetryAfter)
				}
				time.Sleep(time.Second)
			}
			all := waits(s.of("a"))
			for i, wait := range all {
				low := 10 * time.Second
				if i >= 2 {
					low = 30 * time.Second
				}
				if !within(wait, low, 61*time.Second) {
					t.Errorf("active %v: wait %d is %s", active, i, wait)
				}
			}
			if len(all) < 9 {
				t.Errorf("active %v: %d waits in ten minutes", active, len(all))
			}
			// Once the cause is fixed, the key works within a minute.
			s.respond(nil)
			time.Sleep(60 * time.Second)
			mustGet(t, c, "a")
		})
	}
}

// Callers get a copy of a cached error with RetryAfter. The source's error does not change.
func TestCachedRefusalIsACopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		original := credential.Errorf(credential.ErrDenied, credential.ReasonSTSDenied, "m")
		s.fail(original)
		c := start(t, s, cache.Config[string]{})
		_, first := c.Get(t.Context(), "a", "")
		_, second := c.Get(t.Context(), "a", "")
		e, ok := errors.AsType[*credential.Error](second)
		if first == nil || !ok || e.RetryAfter < 10*time.Second || original.RetryAfter != 0 {
			t.Errorf("first %v, second %v, original %#v", first, second, original)
		}
		if s.count() != 1 {
			t.Errorf("%d fetches, want 1", s.count())
		}
		// An error of another type is returned as it is.
		s.fail(context.DeadlineExceeded)
		for range 2 {
			if _, err := c.Get(t.Context(), "b", ""); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Get = %v", err)
			}
		}
		if len(s.of("b")) != 1 {
			t.Errorf("%d fetches of b, want 1", len(s.of("b")))
		}
	})
}

func TestActiveKeysAreRenewedForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(50 * time.Millisecond)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		retain(t, c, "a")
		const week = 7 * 24 * time.Hour
		for range 7 * 24 * 6 {
			time.Sleep(10 * time.Minute)
			if warm, active := c.Progress(); warm != 1 || active != 1 {
				t.Fatalf("%d of %d keys are warm", warm, active)
			}
		}
		calls := s.count()
		if calls < int(week/part(0.5))-1 || calls > int(week/part(0.4))+1 {
			t.Errorf("%d fetches in a week", calls)
		}
		if v := mustGet(t, c, "a"); v.Remaining(time.Now()) < part(0.49) || s.count() != calls {
			t.Errorf("Get returns %s, with %s left", v, v.Remaining(time.Now()))
		}
		// It was retained twice. After one Release it is still active.
		c.Release("a", "")
		time.Sleep(week)
		if s.count() < calls+int(week/part(0.5))-1 {
			t.Errorf("%d fetches in two weeks", s.count())
		}
		c.Release("a", "")
		v := mustGet(t, c, "a")
		calls = s.count()
		time.Sleep(v.Remaining(time.Now()) - time.Second)
		if c.Len() != 1 {
			t.Error("the key was removed before its session expired")
		}
		time.Sleep(2 * time.Second)
		if c.Len() != 0 {
			t.Error("the key is still there after its session expired")
		}
		time.Sleep(week)
		if s.count() != calls {
			t.Errorf("%d fetches for an inactive key", s.count()-calls)
		}
		c.Release("a", "") // more often than retained: no effect
		c.Release("never seen", "")
		if c.Len() != 0 {
			t.Error("Release added an entry")
		}
	})
}

// Release of a key whose fetch is queued drops the fetch, unless a caller waits for it.
func TestReleaseWhileQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{Concurrency: 1})
		retain(t, c, "plug")
		synctest.Wait()
		retain(t, c, "unwanted")
		retain(t, c, "awaited")
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, "awaited") })
		synctest.Wait()
		c.Release("unwanted", "")
		c.Release("awaited", "")
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		time.Sleep(time.Minute)
		if n := len(s.of("unwanted")); n != 0 {
			t.Errorf("a released key was fetched %d times", n)
		}
		if n := len(s.of("awaited")); n != 1 {
			t.Errorf("a key with a caller was fetched %d times", n)
		}
		if c.Len() != 2 {
			t.Errorf("the cache has %d keys, want 2", c.Len())
		}
	})
}

// Failures of inactive keys are removed in the end.
func TestFailuresAreRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.fail(refusal())
		c := start(t, s, cache.Config[string]{})
		for i := range 100 {
			if _, err := c.Get(t.Context(), fmt.Sprint(i), ""); err == nil {
				t.Error("Get returns no error")
			}
		}
		time.Sleep(2 * time.Minute)
		if c.Len() != 0 || s.count() != 100 {
			t.Errorf("the cache has %d keys after %d fetches", c.Len(), s.count())
		}
	})
}

// A machine was suspended while a failure was kept, so the wall clock is far ahead of the monotonic clock. The failure is
// removed. If its entry were due again, Run would never return from it. Clocks in a bubble of synctest are not monotonic.
func TestFailureOfASuspendedMachine(t *testing.T) {
	s := new(source)
	s.fail(refusal())
	c, stop := startStoppable(t, s, cache.Config[string]{})
	if _, err := c.Get(t.Context(), "key", ""); err == nil {
		t.Error("Get returns no error")
	}
	stop()
	if err := c.RescheduleSuspended(time.Hour); err != nil {
		t.Error(err)
	}
	if c.Len() != 0 {
		t.Errorf("the cache has %d keys, want 0: the failure is an hour old", c.Len())
	}
}

// Thousands of sessions that begin together are renewed in time, with the broker's default limits.
func TestManyKeysFallDueTogether(t *testing.T) {
	for _, duration := range []time.Duration{2 * time.Minute, 15 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			const keys = 5000
			issued := time.Now().Add(time.Minute)
			s := new(source)
			// All first sessions begin and end at the same time, however long their fetches took.
			s.answer = func(ctx context.Context, _ string) (credential.Credential, error) {
				if err := sleep(ctx, 100*time.Millisecond); err != nil {
					return credential.Credential{}, err
				}
				cred := s.session(duration)
				if time.Now().Before(issued) {
					cred.Issued, cred.Expiration = issued, issued.Add(duration)
				}
				return cred, nil
			}
			c := start(t, s, cache.Config[string]{})
			for i := range keys {
				retain(t, c, fmt.Sprint(i))
			}
			time.Sleep(time.Until(issued))
			if warm, active := c.Progress(); warm != keys || active != keys || s.count() != keys {
				t.Fatalf("%d of %d keys are warm after %d fetches", warm, active, s.count())
			}
			time.Sleep(time.Duration(0.55 * float64(duration)))
			fetches := map[string]int{}
			for _, call := range s.recorded() {
				fetches[call.key]++
			}
			if len(fetches) != keys {
				t.Errorf("%d of %d keys were fetched", len(fetches), keys)
			}
			for key, n := range fetches {
				if n != 2 && n != 3 { // 3: the first renewal was early, to keep renewals even
					t.Errorf("with 0.45 of its session duration left, key %s had %d fetches", key, n)
				}
			}
			for i := range keys {
				if v := mustGet(t, c, fmt.Sprint(i)); v.Expiration.Equal(issued.Add(duration)) {
					t.Errorf("key %d still has its first session", i)
				}
			}
			if n, _ := s.maxAtOnce(); n > 64 {
				t.Errorf("%d fetches ran at a time", n)
			}
		})
	}
}

// The store puts each fetch into its place: those with waiting callers, then renewals by expiration, then prefetches.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		durations := map[string]time.Duration{"expires later": 20 * time.Minute, "dropped": 18 * time.Minute, "expires sooner": 9 * time.Minute}
		s.answer = func(ctx context.Context, key string) (credential.Credential, error) {
			if key == "plug" { // occupies the only fetch from minute 7 to minute 11
				if err := sleep(ctx, 4*time.Minute); err != nil {
					return credential.Credential{}, err
				}
			}
			return s.session(cmp.Or(durations[key], fullDuration)), nil
		}
		c := start(t, s, cache.Config[string]{Concurrency: 1, FetchTimeout: time.Hour})
		retain(t, c, "expires later") // renewed between minutes 8 and 10
		retain(t, c, "dropped")       // renewed between minutes 7.2 and 9
		time.Sleep(6 * time.Minute)
		retain(t, c, "expires sooner") // renewed after minute 9.6
		time.Sleep(time.Minute)
		retain(t, c, "plug")
		synctest.Wait()
		retain(t, c, "ahead 1")
		retain(t, c, "ahead, then awaited")
		retain(t, c, "ahead, then left")
		time.Sleep(220 * time.Second)
		var wg sync.WaitGroup
		get := func(key string, patience time.Duration) {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				_, _ = c.Get(ctx, key, "")
			})
			synctest.Wait()
		}
		get("ahead, then left", time.Second)
		get("ahead, then awaited", time.Minute)
		get("caller", time.Minute)
		c.Drop(only("dropped"))
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		time.Sleep(time.Second)
		var order []string
		for _, call := range s.recorded()[4:] {
			order = append(order, call.key)
		}
		if len(order) != 7 {
			t.Fatalf("the order is %q", order)
		}
		// Within the first and the last group the order does not matter.
		slices.Sort(order[:2])
		slices.Sort(order[4:])
		want := []string{"ahead, then awaited", "caller", "expires sooner", "expires later", "ahead 1", "ahead, then left", "dropped"}
		if !slices.Equal(order, want) {
			t.Errorf("the order is %q, want %q", order, want)
		}
	})
}

func TestConcurrencyBound(t *testing.T) {
	for _, bound := range []int{1, 8, 0} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(time.Second)
			c := start(t, s, cache.Config[string]{Concurrency: bound, Rate: rate.Inf})
			for i := range 200 {
				retain(t, c, fmt.Sprint(i))
			}
			want := bound
			if want == 0 {
				want = 64
			}
			time.Sleep(time.Duration(200/want+1)*time.Second + time.Millisecond)
			if n, _ := s.maxAtOnce(); n != want {
				t.Errorf("with a concurrency of %d, %d fetches ran at a time", bound, n)
			}
			if warm, _ := c.Progress(); warm != 200 {
				t.Errorf("%d of 200 keys are warm", warm)
			}
		})
	}
}

func TestFetchTimeout(t *testing.T) {
	for configured, want := range map[time.Duration]time.Duration{0: 30 * time.Second, time.Second: time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(fullDuration)
			c := start(t, s, cache.Config[string]{FetchTimeout: configured})
			began := time.Now()
			if _, err := c.Get(t.Context(), "a", ""); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Get = %v", err)
			}
			if took := time.Since(began); took != want {
				t.Errorf("a source that hangs was cut off after %s, want %s", took, want)
			}
		})
	}
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c, stop := startStoppable(t, s, cache.Config[string]{Concurrency: 1})
		mustGet(t, c, "cached")
		stale := mustGet(t, c, "stale")
		time.Sleep(part(0.55))
		mustGet(t, c, "fresh")
		s.slow(fullDuration)
		began := time.Now()
		var wg sync.WaitGroup
		for _, key := range []string{"running", "queued", "running", "queued"} {
			wg.Go(func() {
				_, err := c.Get(t.Context(), key, "")
				if !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonShuttingDown {
					t.Errorf("a caller that waits for %s got %v", key, err)
				}
				if took := time.Since(began); took != 100*time.Millisecond {
					t.Errorf("a caller that waits for %s got its error after %s", key, took)
				}
			})
			synctest.Wait()
		}
		wg.Go(func() {
			if v, err := c.Get(t.Context(), "stale", ""); err != nil || v.AccessKeyID != stale.AccessKeyID {
				t.Errorf("a caller that waits for a renewal got %s, %v", v, err)
			}
		})
		time.Sleep(100 * time.Millisecond)
		stop()
		wg.Wait()
		calls := s.count()
		for _, key := range []string{"fresh", "cached", "running", "unknown"} {
			if _, err := c.Get(t.Context(), key, ""); !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonShuttingDown {
				t.Errorf("after Run, Get(%s) = %v", key, err)
			}
		}
		retain(t, c, "late")
		c.Release("late", "")
		if s.count() != calls || time.Since(began) != 100*time.Millisecond {
			t.Errorf("after Run, %d fetches began in %s", s.count()-calls, time.Since(began))
		}
	})
}

// Run returns after the last fetch, so that nothing uses the source any more.
func TestRunWaitsForFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended atomic.Bool
		s := new(source)
		s.answer = func(ctx context.Context, _ string) (credential.Credential, error) {
			<-ctx.Done()
			time.Sleep(time.Second) // a slow HTTP client
			ended.Store(true)
			return credential.Credential{}, ctx.Err()
		}
		c, stop := startStoppable(t, s, cache.Config[string]{})
		retain(t, c, "a")
		synctest.Wait()
		stop()
		if !ended.Load() {
			t.Error("Run returned during a fetch")
		}
	})
}

// Before Run, callers wait until their context ends. They get a session once it runs.
func TestGetBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c, err := cache.New(cache.Config[string]{Source: s, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		retain(t, c, "active")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Get(ctx, "a", ""); !errors.Is(err, context.DeadlineExceeded) || s.count() != 0 {
			t.Errorf("Get = %v, after %d fetches", err, s.count())
		}
		var wg sync.WaitGroup
		wg.Go(func() { mustGet(t, c, "a") })
		ctx, stop := context.WithCancel(t.Context())
		wg.Go(func() { _ = c.Run(ctx) })
		time.Sleep(time.Second)
		stop()
		wg.Wait()
		if s.count() != 2 {
			t.Errorf("%d fetches, want 2", s.count())
		}
	})
}

func TestStaleSessions(t *testing.T) {
	const stale = 0.6 // of the session duration has passed
	for name, tt := range map[string]struct {
		become  func(s *source)
		renewed bool
		took    time.Duration
		calls   int // of the first two callers
	}{
		"renewed at once":       {func(s *source) { s.slow(100 * time.Millisecond) }, true, 100 * time.Millisecond, 1},
		"renewed after a while": {func(s *source) { s.slow(4900 * time.Millisecond) }, true, 4900 * time.Millisecond, 1},
		"the source fails":      {func(s *source) { s.fail(unavailable()) }, false, 0, 1},
		"the source refuses":    {func(s *source) { s.fail(refusal()) }, false, 0, 1},
		"the source hangs":      {func(s *source) { s.slow(10 * time.Second) }, false, 5 * time.Second, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			c := start(t, s, cache.Config[string]{})
			first := mustGet(t, c, "a")
			time.Sleep(part(0.49))
			mustGet(t, c, "a")
			if s.count() != 1 {
				t.Fatalf("%s: a session with more than half of its duration left was renewed", name)
			}
			time.Sleep(part(stale) - part(0.49))
			tt.become(s)
			began := time.Now()
			v := mustGet(t, c, "a")
			if took := time.Since(began); (v.AccessKeyID != first.AccessKeyID) != tt.renewed || took != tt.took {
				t.Errorf("%s: got %s instead of %s after %s", name, v, first, took)
			}
			if failed := tt.took == 0; (v.Failure != nil) != failed {
				t.Errorf("%s: Failure is %v", name, v.Failure)
			}
			if !tt.renewed && v.RefreshAfter != 30*time.Second {
				t.Errorf("%s: RefreshAfter of an old session is %s", name, v.RefreshAfter)
			}
			if s.count() != 1+tt.calls {
				t.Errorf("%s: %d fetches", name, s.count())
			}
			// The next caller makes no further call.
			mustGet(t, c, "a")
			if s.count() != 1+tt.calls {
				t.Errorf("%s: %d fetches for the next caller", name, s.count())
			}
		})
	}
	// A caller of an active key does not wait long for an overdue renewal.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{FetchTimeout: fullDuration})
		retain(t, c, "a")
		first := mustGet(t, c, "a")
		s.slow(fullDuration)
		time.Sleep(part(stale))
		began := time.Now()
		if v := mustGet(t, c, "a"); v.AccessKeyID != first.AccessKeyID || time.Since(began) != 200*time.Millisecond || s.count() != 2 {
			t.Errorf("got %s after %s and %d fetches", v, time.Since(began), s.count())
		}
	})
	// A caller is not forgotten if the key becomes inactive while it waits.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{Concurrency: 1})
		first := mustGet(t, c, "a")
		time.Sleep(part(stale))
		s.slow(time.Second)
		retain(t, c, "plug")
		synctest.Wait()
		var caller sync.WaitGroup
		caller.Go(func() {
			if v := mustGet(t, c, "a"); v.AccessKeyID == first.AccessKeyID {
				t.Error("the caller got the old session")
			}
		})
		synctest.Wait()
		retain(t, c, "a")
		c.Release("a", "")
		caller.Wait()
	})
	// A caller with a short deadline gets the current session at its deadline.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		first := mustGet(t, c, "a")
		time.Sleep(part(stale))
		s.slow(fullDuration)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if v, err := c.Get(ctx, "a", ""); err != nil || v.AccessKeyID != first.AccessKeyID {
			t.Errorf("Get = %s, %v", v, err)
		}
	})
	// A session that expires while its caller waits is not returned.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		first := mustGet(t, c, "a")
		time.Sleep(first.Remaining(time.Now()) - 100*time.Millisecond)
		s.slow(fullDuration)
		if v, err := c.Get(t.Context(), "a", ""); !errors.Is(err, credential.ErrUnavailable) {
			t.Errorf("Get = %s, %v", v, err)
		}
	})
}

// An unusable session counts as an outage: the current session stays, and the source is not called in a busy loop.
func TestUnusableSessions(t *testing.T) {
	for name, spoil := range map[string]func(*credential.Credential){
		"expired":         func(c *credential.Credential) { c.Expiration = time.Now().Add(-time.Hour) },
		"just expired":    func(c *credential.Credential) { c.Expiration = time.Now() },
		"zero":            func(c *credential.Credential) { *c = credential.Credential{} },
		"without a token": func(c *credential.Credential) { c.SessionToken = credential.Secret{} },
	} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			c := start(t, s, cache.Config[string]{})
			first := mustGet(t, c, "cached")
			retain(t, c, "cached")
			s.respond(func(context.Context, string) (credential.Credential, error) {
				cred := s.session(fullDuration)
				spoil(&cred)
				return cred, nil
			})
			v, err := c.Get(t.Context(), "a", "")
			if !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonSTSUnavailable || !strings.Contains(err.Error(), "clock") {
				t.Errorf("%s: Get = %s, %v", name, v, err)
			}
			time.Sleep(part(0.9))
			if v := mustGet(t, c, "cached"); v.AccessKeyID != first.AccessKeyID {
				t.Errorf("%s: the current session was replaced by %s", name, v)
			}
			if n := len(s.of("cached")); n < 2 || n > 200 {
				t.Errorf("%s: %d fetches in half an hour", name, n)
			}
		})
	}
}

// The log names the key and the reason, and contains no secret.
func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		s := new(source)
		c, stop := startStoppable(t, s, cache.Config[string]{Logger: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		retain(t, c, "the-key")
		mustGet(t, c, "the-key")
		s.fail(&credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "m", Cause: errors.New("the cause")})
		time.Sleep(part(0.6))
		stop()
		for _, want := range []string{"level=WARN", "key=the-key", "reason=STS_THROTTLED", "the cause", "retry_in=", "still_valid_for=", "waiters=0"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("the log lacks %q: %s", want, out.String())
			}
		}
		if strings.Contains(out.String(), secretMarker) {
			t.Errorf("the log contains a secret: %s", out.String())
		}
	})
}

// Random requests and failures for days: a valid session is never dropped, no key is lost or fetched twice at a time, and
// the bookkeeping stays consistent.
func TestRandomDays(t *testing.T) {
	for seed := range uint64(10) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			var mu sync.Mutex // guards random and best
			best := map[string]time.Time{}
			s := new(source)
			s.answer = func(ctx context.Context, key string) (credential.Credential, error) {
				mu.Lock()
				outcome, wait := random.IntN(10), time.Duration(random.Int64N(int64(2*time.Second)))
				mu.Unlock()
				if err := sleep(ctx, wait); err != nil {
					return credential.Credential{}, err
				}
				switch outcome {
				case 0, 1:
					return credential.Credential{}, unavailable()
				case 2:
					return credential.Credential{}, refusal()
				case 3:
					return credential.Credential{}, sleep(ctx, fullDuration) // hangs until its timeout
				}
				cred := s.session(fullDuration)
				mu.Lock()
				best[key] = cred.Expiration
				mu.Unlock()
				return cred, nil
			}
			c := start(t, s, cache.Config[string]{Concurrency: 3, Rate: 5})
			refs := map[string]int{}
			var callers sync.WaitGroup
			for range 3000 {
				mu.Lock()
				key, what, pause := fmt.Sprint(random.IntN(12)), random.IntN(10), time.Duration(random.Int64N(int64(2*time.Minute)))
				patience := time.Duration(random.Int64N(int64(3 * time.Second)))
				mu.Unlock()
				switch {
				case what < 2:
					retain(t, c, key)
					refs[key]++
				case what < 4 && refs[key] > 0:
					c.Release(key, "")
					refs[key]--
				default:
					callers.Go(func() {
						mu.Lock()
						until := best[key]
						mu.Unlock()
						ctx, cancel := context.WithTimeout(t.Context(), patience)
						defer cancel()
						v, err := c.Get(ctx, key, "")
						now := time.Now()
						if err == nil && !v.Valid(now) {
							t.Errorf("Get returned a session that is not valid: %s", v)
						}
						if err == nil && v.Expiration.Before(until) {
							t.Errorf("Get returned a session that expires at %s, although one that expires at %s was there before", v.Expiration, until)
						}
						if err != nil && now.Before(until) {
							t.Errorf("Get failed with %v, although a session is valid until %s", err, until)
						}
					})
				}
				time.Sleep(pause)
				if err := c.Check(); err != nil {
					t.Fatal(err)
				}
			}
			callers.Wait()
			// Once the source works, every active key becomes warm, and no other key stays.
			s.respond(nil)
			time.Sleep(2 * fullDuration)
			want := 0
			for _, n := range refs {
				want += min(n, 1)
			}
			if warm, n := c.Progress(); warm != want || n != want || c.Len() != want {
				t.Errorf("%d of %d active keys are warm, the cache has %d; want %d", warm, n, c.Len(), want)
			}
		})
	}
}

// The same with the real clock and the race detector, and with very short sessions.
func TestStress(t *testing.T) {
	const duration = 100 * time.Millisecond
	s := new(source)
	s.answer = func(context.Context, string) (credential.Credential, error) { return s.session(duration), nil }
	c, stop := startStoppable(t, s, cache.Config[string]{Concurrency: 4, Rate: rate.Inf})
	defer stop()
	var wg sync.WaitGroup
	var gets atomic.Int64
	for worker := range 8 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 2))
			for range 2000 {
				key := fmt.Sprint(random.IntN(20))
				switch random.IntN(4) {
				case 0:
					retain(t, c, key)
					defer c.Release(key, "")
				case 1:
					retain(t, c, key)
					c.Release(key, "")
				default:
					began := time.Now()
					v, err := c.Get(t.Context(), key, "")
					if err != nil || v.Expiration.Before(began) {
						t.Errorf("Get = %s, %v", v, err)
					}
					gets.Add(1)
				}
				if random.IntN(100) == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	wg.Go(func() {
		for range 200 {
			c.Progress()
			if err := c.Check(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if gets.Load() == 0 {
		t.Error("no caller called Get")
	}
	if warm, active := c.Progress(); active != 0 || warm != 0 {
		t.Errorf("%d keys are active after all were released", active)
	}
}

// No caller is left waiting if the cache shuts down under load.
func TestStressShutdown(t *testing.T) {
	for range 20 {
		s := new(source)
		c, stop := startStoppable(t, s, cache.Config[string]{Concurrency: 2, Rate: 500})
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				if _, err := c.Get(t.Context(), fmt.Sprint(i), ""); err != nil && credential.ReasonOf(err) != credential.ReasonShuttingDown {
					t.Errorf("Get = %v", err)
				}
			})
		}
		wg.Go(stop)
		wg.Wait()
	}
}

func BenchmarkGetWarm(b *testing.B) {
	s := new(source)
	c := start(b, s, cache.Config[string]{})
	if _, err := c.Get(b.Context(), "a", ""); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := c.Get(b.Context(), "a", ""); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func TestPanicIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		s.respond(func(context.Context, string) (credential.Credential, error) { panic("odd answer") })
		c := start(t, s, cache.Config[string]{})
		if _, err := c.Get(t.Context(), "a", ""); credential.ReasonOf(err) != credential.ReasonInternal {
			t.Errorf("Get returned %v", err)
		}
		s.respond(nil)
		time.Sleep(time.Minute)
		mustGet(t, c, "a")
	})
}
