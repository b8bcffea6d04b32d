package cache_test

import (
	"bytes"
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

// life is the duration of the sessions that a source issues unless told otherwise.
const life = time.Hour

// secretMarker is the secret of every session. It must be found in no log.
const secretMarker = "QZQZQZQZ"

// fetch is one call that a source got.
type fetch struct {
	key string
	at  time.Time
}

// source is a credential.Source that remembers its calls.
type source struct {
	// answer is asked for each call, if set. Otherwise sessions of duration life come at once.
	answer func(ctx context.Context, key string) (credential.Credential, error)

	mu          sync.Mutex
	calls       []fetch
	running     map[string]int
	most        int // fetches at once
	mostPerKey  int
	underWay    int
	successions int
}

func (s *source) Credential(ctx context.Context, key string) (credential.Credential, error) {
	s.mu.Lock()
	s.calls = append(s.calls, fetch{key, time.Now()})
	if s.running == nil {
		s.running = map[string]int{}
	}
	s.running[key]++
	s.underWay++
	s.most, s.mostPerKey = max(s.most, s.underWay), max(s.mostPerKey, s.running[key])
	answer := s.answer
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.running[key]--
		s.underWay--
	}()
	if answer == nil {
		return s.session(life), nil
	}
	return answer(ctx, key)
}

// session makes the next session, of the given duration.
func (s *source) session(duration time.Duration) credential.Credential {
	s.mu.Lock()
	s.successions++
	id := fmt.Sprintf("ASIA%d", s.successions)
	s.mu.Unlock()
	now := time.Now()
	return credential.Credential{
		AccessKeyID: id, SecretAccessKey: credential.NewSecret(secretMarker), SessionToken: credential.NewSecret(secretMarker),
		Issued: now, Expiration: now.Add(duration),
	}
}

// slow makes the source answer after d, or when the call's context ends.
func (s *source) slow(d time.Duration) *source {
	s.respond(func(ctx context.Context, _ string) (credential.Credential, error) {
		if err := sleep(ctx, d); err != nil {
			return credential.Credential{}, err
		}
		return s.session(life), nil
	})
	return s
}

// become changes what the source answers from now on.
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

// atOnce returns how many fetches ran at once at most, in all and for any one key.
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
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable, "STS is away")
}

func refusal() error {
	return credential.Errorf(credential.ErrDenied, credential.ReasonSTSDenied, "STS refuses")
}

// start runs a cache over s until the test ends. cfg's Source and Logger may be left out.
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
			t.Errorf("Run ended with %v", err)
		}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		if _, n := s.maxAtOnce(); n > 1 {
			t.Errorf("%d fetches of one key ran at once", n)
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
		t.Fatalf("Get(%s) gives a session that is not valid: %s", key, v)
	}
	return v
}

func retain(t testing.TB, c *cache.Cache[string], key string) {
	t.Helper()
	if err := c.Retain(key, ""); err != nil {
		t.Errorf("Keep(%s): %v", key, err)
	}
}

func within(d, low, high time.Duration) bool { return low <= d && d <= high }

func part(f float64) time.Duration { return time.Duration(f * float64(life)) }

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
			t.Errorf("%s: New gives %v, %v", name, c, err)
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
				t.Errorf("a caller got %s", id)
			}
			return true
		})
	})
}

// A caller who leaves takes nothing from the others.
func TestFirstCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{})
		began := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := c.Get(ctx, "a", "")
			if !errors.Is(err, credential.ErrUnavailable) || !errors.Is(err, context.Canceled) {
				t.Errorf("the one who left is told %v", err)
			}
			if took := time.Since(began); took != 100*time.Millisecond {
				t.Errorf("the one who left after 100 ms is answered after %s", took)
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
			t.Errorf("%d fetches were made", n)
		}
	})
}

// A source that is slower than its callers' patience is not asked again and again.
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
				t.Errorf("the first is told %v", err)
			}
		}
		if n := s.count(); n != 1 {
			t.Errorf("%d fetches were made", n)
		}
	})
}

// Even if nobody waits any more, the answer of a fetch that has begun is there for the next one.
func TestAbandonedFetchIsKept(t *testing.T) {
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

// What has not begun when its last caller leaves is fetched only where it is kept: callers turn to another cache then.
func TestAbandonedInTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(time.Second)
		c := start(t, s, cache.Config[string]{Concurrency: 1})
		retain(t, c, "plug")
		retain(t, c, "kept")
		synctest.Wait()
		var callers sync.WaitGroup
		for _, key := range []string{"kept", "not kept", "not kept", "waited for"} {
			patience := 500 * time.Millisecond
			if key == "waited for" {
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
		if want := []string{"plug", "waited for", "kept"}; !slices.Equal(fetched, want) {
			t.Errorf("fetched %q, want %q", fetched, want)
		}
	})
}

// The renewal of a single key begins within the window, to the moment.
func TestRenewalWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		time.Sleep(1000 * time.Hour)
		times := s.of("a")
		for i := range len(times) - 1 {
			if remaining := life - times[i+1].Sub(times[i]); !within(remaining, part(0.50), part(0.60)) {
				t.Errorf("a renewal began with %s left", remaining)
			}
		}
		if len(times) < 1000 {
			t.Errorf("%d fetches in 1000 hours", len(times))
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
			{12 * time.Hour, time.Hour, time.Hour},                 // never over 1 h
			{30 * time.Second, 30 * time.Second, 30 * time.Second}, // never under 30 s
		} {
			duration = tt.duration
			seen := map[time.Duration]bool{}
			for i := range 100 {
				v := mustGet(t, c, fmt.Sprintf("%s/%d", tt.duration, i))
				seen[v.RefreshAfter] = true
				if !within(v.RefreshAfter, tt.low, tt.high) {
					t.Errorf("a new session of %s is to be refreshed after %s", tt.duration, v.RefreshAfter)
				}
			}
			if tt.low != tt.high && len(seen) < 50 {
				t.Errorf("100 holders of sessions of %s come back at %d different times", tt.duration, len(seen))
			}
		}
		// Later holders of the same session come back no later than the first.
		duration = time.Hour
		mustGet(t, c, "a")
		time.Sleep(20 * time.Minute)
		for range 100 {
			v := mustGet(t, c, "a")
			if left := v.Remaining(time.Now()) - v.RefreshAfter; !within(left, part(0.45), part(0.50)) {
				t.Errorf("a holder comes back when %s are left", left)
			}
		}
	})
}

// A holder who comes back when told meets the renewed session, for ever.
func TestHoldersMeetRenewedSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(100 * time.Millisecond)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		v := mustGet(t, c, "a")
		for range 200 {
			time.Sleep(v.RefreshAfter)
			if left := v.Remaining(time.Now()); left < part(0.45) {
				t.Errorf("the holder is left with %s", left)
			}
			next := mustGet(t, c, "a")
			if next.AccessKeyID == v.AccessKeyID || next.Remaining(time.Now()) < part(0.85) {
				t.Errorf("the holder meets %s after %s, with %s left", next, v, next.Remaining(time.Now()))
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
		held := mustGet(t, c, "a")
		s.fail(unavailable())
		for time.Now().Before(held.Expiration.Add(-time.Second)) {
			time.Sleep(time.Second)
			if v := mustGet(t, c, "a"); v.AccessKeyID != held.AccessKeyID {
				t.Fatalf("the old session gave way to %s", v)
			}
		}
		if s.count() < 10 {
			t.Errorf("the renewal was tried %d times only", s.count())
		}
		time.Sleep(time.Second)
		if _, err := c.Get(t.Context(), "a", ""); !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonSTSUnavailable {
			t.Errorf("at its expiration Get gives %v", err)
		}
		if warm, kept := c.Settled(); warm != 0 || kept != 1 {
			t.Errorf("%d of %d are warm", warm, kept)
		}
		s.respond(nil)
		time.Sleep(30 * time.Second) // the longest wait between tries
		calls := s.count()
		if v := mustGet(t, c, "a"); v.AccessKeyID == held.AccessKeyID || s.count() != calls {
			t.Errorf("after the recovery Get gives %s, by itself: %v", v, s.count() != calls)
		}
		if warm, kept := c.Settled(); warm != 1 || kept != 1 {
			t.Errorf("%d of %d are warm", warm, kept)
		}
	})
}

// waits are the times between successive calls for a key.
func waits(times []time.Time) (all []time.Duration) {
	for i := range len(times) - 1 {
		all = append(all, times[i+1].Sub(times[i]))
	}
	return all
}

func TestRetries(t *testing.T) {
	throttled := &credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "m", RetryAfter: 3 * time.Second}
	rude := &credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "m", RetryAfter: 24 * time.Hour}
	for name, tt := range map[string]struct {
		err                            error
		firstLow, firstHigh, low, high time.Duration
	}{
		"away":          {unavailable(), 200 * time.Millisecond, 400 * time.Millisecond, 15 * time.Second, 30 * time.Second},
		"plain":         {errors.New("broken"), 200 * time.Millisecond, 400 * time.Millisecond, 15 * time.Second, 30 * time.Second},
		"refused":       {refusal(), 10 * time.Second, 20 * time.Second, 30 * time.Second, 60 * time.Second},
		"invalid":       {credential.Errorf(credential.ErrInvalid, credential.ReasonSTSRejected, "m"), 10 * time.Second, 20 * time.Second, 30 * time.Second, 60 * time.Second},
		"asks to wait":  {throttled, 3 * time.Second, 6 * time.Second, 15 * time.Second, 30 * time.Second},
		"asks for ever": {rude, 30 * time.Second, 30 * time.Second, 30 * time.Second, 30 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			s.fail(tt.err)
			c := start(t, s, cache.Config[string]{})
			retain(t, c, "a")
			time.Sleep(time.Hour)
			all := waits(s.of("a"))
			if len(all) < 50 {
				t.Fatalf("%s: tried %d times in an hour", name, len(all))
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
				t.Errorf("%s: %d waits of %d lengths are not spread", name, len(all), len(seen))
			}
		})
	}
}

// A refusal is given again to those who ask, without another call, and the time until that changes.
func TestRefusalsAreCached(t *testing.T) {
	for _, kept := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			s.fail(refusal())
			c := start(t, s, cache.Config[string]{})
			if kept {
				retain(t, c, "a")
			}
			// A sidecar that asks far too often.
			for range 600 {
				_, err := c.Get(t.Context(), "a", "")
				e, ok := errors.AsType[*credential.Error](err)
				if !ok || !errors.Is(err, credential.ErrDenied) || e.Reason != credential.ReasonSTSDenied || e.Message != "STS refuses" {
					t.Fatalf("Get = %v", err)
				}
				if !within(e.RetryAfter, 0, 60*time.Second) {
					t.Errorf("the caller is to wait %s", e.RetryAfter)
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
					t.Errorf("kept %v: wait %d is %s", kept, i, wait)
				}
			}
			if len(all) < 9 {
				t.Errorf("kept %v: %d waits in ten minutes", kept, len(all))
			}
			// Mended, it works within a minute.
			s.respond(nil)
			time.Sleep(60 * time.Second)
			mustGet(t, c, "a")
		})
	}
}

// The error that is handed out again is the caller's own: it says when to come back, and the
// source's error stays as it was.
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
			t.Errorf("%d fetches were made", s.count())
		}
		// An error of another type is handed out as it is.
		s.fail(context.DeadlineExceeded)
		for range 2 {
			if _, err := c.Get(t.Context(), "b", ""); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Get = %v", err)
			}
		}
		if len(s.of("b")) != 1 {
			t.Errorf("%d fetches were made of b", len(s.of("b")))
		}
	})
}

func TestKeptKeysAreRenewedForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source).slow(50 * time.Millisecond)
		c := start(t, s, cache.Config[string]{})
		retain(t, c, "a")
		retain(t, c, "a")
		const week = 7 * 24 * time.Hour
		for range 7 * 24 * 6 {
			time.Sleep(10 * time.Minute)
			if warm, kept := c.Settled(); warm != 1 || kept != 1 {
				t.Fatalf("%d of %d keys are warm", warm, kept)
			}
		}
		calls := s.count()
		if calls < int(week/part(0.5))-1 || calls > int(week/part(0.4))+1 {
			t.Errorf("%d fetches in a week", calls)
		}
		if v := mustGet(t, c, "a"); v.Remaining(time.Now()) < part(0.49) || s.count() != calls {
			t.Errorf("Get gives %s, with %s left", v, v.Remaining(time.Now()))
		}
		// Two kept it; when one lets go, the other still does.
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
			t.Error("the key was forgotten before its session expired")
		}
		time.Sleep(2 * time.Second)
		if c.Len() != 0 {
			t.Error("the key is remembered after its session expired")
		}
		time.Sleep(week)
		if s.count() != calls {
			t.Errorf("%d fetches were made for a key that nobody keeps", s.count()-calls)
		}
		c.Release("a", "") // more than were kept: no harm
		c.Release("never seen", "")
		if c.Len() != 0 {
			t.Error("Release made an entry")
		}
	})
}

// Release of a key whose fetch waits in the queue takes it out; one that has a caller stays.
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
			t.Errorf("an awaited key was fetched %d times", n)
		}
		if c.Len() != 2 {
			t.Errorf("%d keys are remembered", c.Len())
		}
	})
}

// Failures of keys that nobody keeps do not stay for ever.
func TestFailuresAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.fail(refusal())
		c := start(t, s, cache.Config[string]{})
		for i := range 100 {
			if _, err := c.Get(t.Context(), fmt.Sprint(i), ""); err == nil {
				t.Error("Get gives no error")
			}
		}
		time.Sleep(2 * time.Minute)
		if c.Len() != 0 || s.count() != 100 {
			t.Errorf("%d keys are remembered, after %d fetches", c.Len(), s.count())
		}
	})
}

// Thousands of sessions that were made together are renewed in time, with the bounds that the broker
// has by default.
func TestManyKeysFallDueTogether(t *testing.T) {
	for _, duration := range []time.Duration{2 * time.Minute, 15 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			const keys = 5000
			issued := time.Now().Add(time.Minute)
			s := new(source)
			// All first sessions have the same times, however long it took to get them.
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
			if warm, kept := c.Settled(); warm != keys || kept != keys || s.count() != keys {
				t.Fatalf("%d of %d keys are warm after %d fetches", warm, kept, s.count())
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
				if n != 2 && n != 3 { // 3: the first renewal was an early one, to keep them even
					t.Errorf("with 0.45 of its session left, key %s had %d fetches", key, n)
				}
			}
			for i := range keys {
				if v := mustGet(t, c, fmt.Sprint(i)); v.Expiration.Equal(issued.Add(duration)) {
					t.Errorf("key %d still has its first session", i)
				}
			}
			if n, _ := s.maxAtOnce(); n > 64 {
				t.Errorf("%d fetches ran at once", n)
			}
		})
	}
}

// The order of the queue: callers who wait, then what expires first, then what nobody needs yet.
func TestPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		lengths := map[string]time.Duration{"expires later": 10 * time.Minute, "expires sooner": 9 * time.Minute, "plug": 20 * time.Hour}
		s.answer = func(ctx context.Context, key string) (credential.Credential, error) {
			d := time.Millisecond
			if key == "plug" {
				d = 2 * time.Minute
			}
			if err := sleep(ctx, d); err != nil {
				return credential.Credential{}, err
			}
			duration, ok := lengths[key]
			if !ok {
				duration = life
			}
			return s.session(duration), nil
		}
		c := start(t, s, cache.Config[string]{Concurrency: 1, FetchTimeout: time.Hour})
		retain(t, c, "expires later")
		retain(t, c, "expires sooner")
		time.Sleep(210 * time.Second) // before either is due
		retain(t, c, "plug")
		time.Sleep(100 * time.Second) // after both are
		retain(t, c, "ahead 1")
		retain(t, c, "ahead, then awaited")
		retain(t, c, "ahead, then left")
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
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		time.Sleep(time.Second)
		var order []string
		for _, call := range s.recorded()[3:] {
			order = append(order, call.key)
		}
		if len(order) != 6 {
			t.Fatalf("the order is %q", order)
		}
		// Within the first and the last group the order does not matter.
		slices.Sort(order[:2])
		slices.Sort(order[4:])
		want := []string{"ahead, then awaited", "caller", "expires sooner", "expires later", "ahead 1", "ahead, then left"}
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
				t.Errorf("with a bound of %d, %d fetches ran at once", bound, n)
			}
			if warm, _ := c.Settled(); warm != 200 {
				t.Errorf("%d of 200 keys are warm", warm)
			}
		})
	}
}

func TestFetchTimeout(t *testing.T) {
	for configured, want := range map[time.Duration]time.Duration{0: 30 * time.Second, time.Second: time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).slow(life)
			c := start(t, s, cache.Config[string]{FetchTimeout: configured})
			began := time.Now()
			if _, err := c.Get(t.Context(), "a", ""); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Get = %v", err)
			}
			if took := time.Since(began); took != want {
				t.Errorf("a source that hangs was given up after %s", took)
			}
		})
	}
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c, stop := startStoppable(t, s, cache.Config[string]{Concurrency: 1})
		mustGet(t, c, "held")
		stale := mustGet(t, c, "stale")
		time.Sleep(part(0.55))
		mustGet(t, c, "fresh")
		s.slow(life)
		began := time.Now()
		var wg sync.WaitGroup
		for _, key := range []string{"running", "queued", "running", "queued"} {
			wg.Go(func() {
				_, err := c.Get(t.Context(), key, "")
				if !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonShuttingDown {
					t.Errorf("who waits for %s is told %v", key, err)
				}
				if took := time.Since(began); took != 100*time.Millisecond {
					t.Errorf("who waits for %s is told after %s", key, took)
				}
			})
			synctest.Wait()
		}
		wg.Go(func() {
			if v, err := c.Get(t.Context(), "stale", ""); err != nil || v.AccessKeyID != stale.AccessKeyID {
				t.Errorf("who has waited for a renewal gets %s, %v", v, err)
			}
		})
		time.Sleep(100 * time.Millisecond)
		stop()
		wg.Wait()
		calls := s.count()
		for _, key := range []string{"fresh", "held", "running", "unknown"} {
			if _, err := c.Get(t.Context(), key, ""); !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonShuttingDown {
				t.Errorf("after the end, Get(%s) = %v", key, err)
			}
		}
		retain(t, c, "late")
		c.Release("late", "")
		if s.count() != calls || time.Since(began) != 100*time.Millisecond {
			t.Errorf("after the end, %d fetches were made in %s", s.count()-calls, time.Since(began))
		}
	})
}

// Run returns when the last fetch has, so that nothing of the source is used after it.
func TestRunWaitsForFetches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended atomic.Bool
		s := new(source)
		s.answer = func(ctx context.Context, _ string) (credential.Credential, error) {
			<-ctx.Done()
			time.Sleep(time.Second) // an HTTP client that takes its time
			ended.Store(true)
			return credential.Credential{}, ctx.Err()
		}
		c, stop := startStoppable(t, s, cache.Config[string]{})
		retain(t, c, "a")
		synctest.Wait()
		stop()
		if !ended.Load() {
			t.Error("Run returned while a fetch was under way")
		}
	})
}

// Before Run, callers wait as long as they like, and are answered once it runs.
func TestGetBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c, err := cache.New(cache.Config[string]{Source: s, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		retain(t, c, "kept")
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
			t.Errorf("%d fetches were made", s.count())
		}
	})
}

func TestStaleSessions(t *testing.T) {
	const stale = 0.6 // of the life has passed
	for name, tt := range map[string]struct {
		become  func(s *source)
		renewed bool
		took    time.Duration
		calls   int // for the first two callers
	}{
		"renewed before the answer":      {func(s *source) { s.slow(100 * time.Millisecond) }, true, 100 * time.Millisecond, 1},
		"renewed after a while":          {func(s *source) { s.slow(4900 * time.Millisecond) }, true, 4900 * time.Millisecond, 1},
		"the old where the source fails": {func(s *source) { s.fail(unavailable()) }, false, 0, 1},
		"the old where it refuses":       {func(s *source) { s.fail(refusal()) }, false, 0, 1},
		"the old where the source hangs": {func(s *source) { s.slow(10 * time.Second) }, false, 5 * time.Second, 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			c := start(t, s, cache.Config[string]{})
			held := mustGet(t, c, "a")
			time.Sleep(part(0.49))
			mustGet(t, c, "a")
			if s.count() != 1 {
				t.Fatalf("%s: a session with more than half of its life left was renewed", name)
			}
			time.Sleep(part(stale) - part(0.49))
			tt.become(s)
			began := time.Now()
			v := mustGet(t, c, "a")
			if took := time.Since(began); (v.AccessKeyID != held.AccessKeyID) != tt.renewed || took != tt.took {
				t.Errorf("%s: got %s instead of %s after %s", name, v, held, took)
			}
			if failed := tt.took == 0; (v.Failure != nil) != failed {
				t.Errorf("%s: it is told that the renewal failed with %v", name, v.Failure)
			}
			if !tt.renewed && v.RefreshAfter != 30*time.Second {
				t.Errorf("%s: the holder of an old session is to come back after %s", name, v.RefreshAfter)
			}
			if s.count() != 1+tt.calls {
				t.Errorf("%s: %d fetches", name, s.count())
			}
			// The next caller, right behind, makes no further call.
			mustGet(t, c, "a")
			if s.count() != 1+tt.calls {
				t.Errorf("%s: %d fetches for the next caller", name, s.count())
			}
		})
	}
	// Who asks for a key that is kept does not wait out why its renewal is late.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{FetchTimeout: life})
		retain(t, c, "a")
		held := mustGet(t, c, "a")
		s.slow(life)
		time.Sleep(part(stale))
		began := time.Now()
		if v := mustGet(t, c, "a"); v.AccessKeyID != held.AccessKeyID || time.Since(began) != 200*time.Millisecond || s.count() != 2 {
			t.Errorf("got %s after %s and %d fetches", v, time.Since(began), s.count())
		}
	})
	// Nor does one wait in vain for a key whose last keeper lets go of it meanwhile.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{Concurrency: 1})
		held := mustGet(t, c, "a")
		time.Sleep(part(stale))
		s.slow(time.Second)
		retain(t, c, "plug")
		synctest.Wait()
		var caller sync.WaitGroup
		caller.Go(func() {
			if v := mustGet(t, c, "a"); v.AccessKeyID == held.AccessKeyID {
				t.Error("the caller is given the old session")
			}
		})
		synctest.Wait()
		retain(t, c, "a")
		c.Release("a", "")
		caller.Wait()
	})
	// A caller in a hurry is given what is held when its time is up.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		held := mustGet(t, c, "a")
		time.Sleep(part(stale))
		s.slow(life)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if v, err := c.Get(ctx, "a", ""); err != nil || v.AccessKeyID != held.AccessKeyID {
			t.Errorf("Get = %s, %v", v, err)
		}
	})
	// One that expires while its caller waits is not given out.
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		held := mustGet(t, c, "a")
		time.Sleep(held.Remaining(time.Now()) - 100*time.Millisecond)
		s.slow(life)
		if v, err := c.Get(t.Context(), "a", ""); !errors.Is(err, credential.ErrUnavailable) {
			t.Errorf("Get = %s, %v", v, err)
		}
	})
}

// What a source yields must be usable; otherwise it is an outage, whatever is held stays, and the
// source is not asked in a busy loop.
func TestUnusableAnswers(t *testing.T) {
	for name, spoil := range map[string]func(*credential.Credential){
		"expired":         func(c *credential.Credential) { c.Expiration = time.Now().Add(-time.Hour) },
		"just expired":    func(c *credential.Credential) { c.Expiration = time.Now() },
		"zero":            func(c *credential.Credential) { *c = credential.Credential{} },
		"without a token": func(c *credential.Credential) { c.SessionToken = credential.Secret{} },
	} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source)
			c := start(t, s, cache.Config[string]{})
			held := mustGet(t, c, "held")
			retain(t, c, "held")
			s.respond(func(context.Context, string) (credential.Credential, error) {
				cred := s.session(life)
				spoil(&cred)
				return cred, nil
			})
			v, err := c.Get(t.Context(), "a", "")
			if !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonSTSUnavailable || !strings.Contains(err.Error(), "clock") {
				t.Errorf("%s: Get = %s, %v", name, v, err)
			}
			time.Sleep(part(0.9))
			if v := mustGet(t, c, "held"); v.AccessKeyID != held.AccessKeyID {
				t.Errorf("%s: the session held gave way to %s", name, v)
			}
			if n := len(s.of("held")); n < 2 || n > 200 {
				t.Errorf("%s: %d tries in half an hour", name, n)
			}
		})
	}
}

// What is logged names the key and the reason, and no secret.
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
			t.Errorf("the log holds a secret: %s", out.String())
		}
	})
}

// Random callers, keepers and failures, for days: what is valid is never dropped, no key is forgotten
// or fetched twice at once, and the bookkeeping stays whole.
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
					return credential.Credential{}, sleep(ctx, life) // hangs, until the fetch is given up
				}
				cred := s.session(life)
				mu.Lock()
				best[key] = cred.Expiration
				mu.Unlock()
				return cred, nil
			}
			c := start(t, s, cache.Config[string]{Concurrency: 3, Rate: 5})
			kept := map[string]int{}
			var callers sync.WaitGroup
			for range 3000 {
				mu.Lock()
				key, what, pause := fmt.Sprint(random.IntN(12)), random.IntN(10), time.Duration(random.Int64N(int64(2*time.Minute)))
				patience := time.Duration(random.Int64N(int64(3 * time.Second)))
				mu.Unlock()
				switch {
				case what < 2:
					retain(t, c, key)
					kept[key]++
				case what < 4 && kept[key] > 0:
					c.Release(key, "")
					kept[key]--
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
							t.Errorf("Get gives a session that is not valid: %s", v)
						}
						if err == nil && v.Expiration.Before(until) {
							t.Errorf("Get gives a session of %s, and one of %s was there before", v.Expiration, until)
						}
						if err != nil && now.Before(until) {
							t.Errorf("Get fails (%v) while a valid session is there until %s", err, until)
						}
					})
				}
				time.Sleep(pause)
				if err := c.Check(); err != nil {
					t.Fatal(err)
				}
			}
			callers.Wait()
			// Once the source works, every kept key becomes warm, and nothing else stays.
			s.respond(nil)
			time.Sleep(2 * life)
			want := 0
			for _, n := range kept {
				want += min(n, 1)
			}
			if warm, n := c.Settled(); warm != want || n != want || c.Len() != want {
				t.Errorf("%d of %d keys are warm, %d are remembered, %d are kept", warm, n, c.Len(), want)
			}
		})
	}
}

// The same under the real clock and the race detector, with sessions that live for moments.
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
			c.Settled()
			if err := c.Check(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if gets.Load() == 0 {
		t.Error("nobody asked")
	}
	if warm, kept := c.Settled(); kept != 0 || warm != 0 {
		t.Errorf("%d keys are kept after all were released", kept)
	}
}

// Shutting down while many ask must leave nobody waiting.
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

// TestOldTenantsAreNotStarved: after an outage that outlasted a session, its callers wait no longer
// than those who came with new keys before them, however many keep coming.
func TestOldTenantsAreNotStarved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		c := start(t, s, cache.Config[string]{Rate: 10, Concurrency: 1})
		retain(t, c, "old")
		mustGet(t, c, "old")
		s.fail(unavailable())
		time.Sleep(life + time.Minute)
		s.respond(nil)

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var flood sync.WaitGroup
		flood.Go(func() { // twice as many new keys as may be fetched
			for i := 0; ctx.Err() == nil; i++ {
				flood.Go(func() { _, _ = c.Get(ctx, fmt.Sprint("new", i), "") })
				_ = sleep(ctx, 50*time.Millisecond)
			}
		})
		// The wait after the last failure is up to 30 s, and as long is the queue of those who came then.
		recovered := time.Now()
		for {
			attempt, stop := context.WithTimeout(ctx, 3*time.Minute)
			_, err := c.Get(attempt, "old", "")
			stop()
			if err == nil {
				break
			}
			if time.Since(recovered) > 2*time.Minute {
				t.Error("the caller of an old key still waits behind new ones")
				break
			}
			time.Sleep(time.Second)
		}
		cancel()
		flood.Wait()
	})
}

func TestPanicIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{}
		s.respond(func(context.Context, string) (credential.Credential, error) { panic("odd answer") })
		c := start(t, s, cache.Config[string]{})
		if _, err := c.Get(t.Context(), "a", ""); credential.ReasonOf(err) != credential.ReasonInternal {
			t.Errorf("answered %v", err)
		}
		s.respond(nil)
		time.Sleep(time.Minute)
		mustGet(t, c, "a")
	})
}
