package cache_test

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
)

func throttling() error {
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSThrottled, "STS throttles")
}

// perSecond counts the fetches of each second since the given time.
func (s *source) perSecond(from time.Time, seconds int) []int {
	counts := make([]int, seconds)
	for _, f := range s.recorded() {
		if i := int(f.at.Sub(from) / time.Second); f.at.After(from) && i < seconds {
			counts[i]++
		}
	}
	return counts
}

// A source that takes fewer calls than we may make is soon asked hardly more often than it takes, and every
// key is fetched in the end.
func TestRateFollowsThrottling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const takes, keys = 100, 5000
		bucket := rate.NewLimiter(takes, takes)
		refused := 0
		s := new(source)
		s.answer = func(context.Context, string) (credential.Credential, error) {
			if !bucket.AllowN(time.Now(), 1) {
				refused++
				return credential.Credential{}, throttling()
			}
			return s.session(life), nil
		}
		c := start(t, s, cache.Config[string]{})
		for i := range keys {
			keep(t, c, fmt.Sprint(i))
		}
		time.Sleep(2 * time.Minute)
		if stats := c.Stats(); stats.Warm != keys {
			t.Errorf("after two minutes %d of %d keys are warm: %+v", stats.Warm, keys, stats)
		}
		if refused > keys/20 {
			t.Errorf("%d calls were throttled to fetch %d keys", refused, keys)
		}
	})
}

func TestRateRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{})
		s.fail(throttling())
		keep(t, c, "a")
		synctest.Wait()
		if got := c.Stats().Rate; got != cache.DefaultRate/2 {
			t.Errorf("throttled once, the rate is %v", got)
		}
		s.become(nil)
		// Successes, for as long as it takes in the small steps that follow a throttled call.
		for i := range 40 {
			time.Sleep(time.Second)
			mustGet(t, c, fmt.Sprint(i))
		}
		if got := c.Stats().Rate; got != cache.DefaultRate {
			t.Errorf("afterwards the rate is %v", got)
		}
	})
}

// While everything fails, few tries are made; when the source is back, it is not met by all at once, and
// soon all is as before.
func TestSourceIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keys = 5000
		s := new(source)
		s.fail(away())
		c := start(t, s, cache.Config[string]{})
		for i := range keys {
			keep(t, c, fmt.Sprint(i))
		}
		time.Sleep(25 * time.Minute)
		if n := s.count(); n > 25*60*15 {
			t.Errorf("in 25 minutes a source that is away was asked %d times", n)
		}
		back := time.Now()
		s.become(nil)
		time.Sleep(time.Minute)
		if stats := c.Stats(); stats.Warm != keys || stats.Rate != cache.DefaultRate {
			t.Errorf("a minute after its return: %+v", stats)
		}
		for second, n := range s.perSecond(back, 60) {
			// What the limit lets through in a second, and the burst that had gathered.
			if allowed := min(10<<min(second+1, 6), 400) + 64; n > allowed {
				t.Errorf("in second %d after its return it was asked %d times", second, n)
			}
		}
	})
}

// A key that fails for itself does not slow down the others.
func TestOneBrokenKeySlowsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.answer = func(_ context.Context, key string) (credential.Credential, error) {
			if key == "broken" {
				return credential.Credential{}, away()
			}
			return s.session(life), nil
		}
		c := start(t, s, cache.Config[string]{})
		keep(t, c, "broken")
		for i := range 100 {
			time.Sleep(10 * time.Second)
			mustGet(t, c, fmt.Sprint(i))
		}
		time.Sleep(15 * time.Minute) // in which nothing else is fetched
		if got := c.Stats().Rate; got != cache.DefaultRate {
			t.Errorf("the rate is %v", got)
		}
	})
}

// rates fails the test unless the cache has that rate and that share of the whole.
func rates(t *testing.T, c *cache.Cache[string], at, share float64) {
	t.Helper()
	if stats := c.Stats(); stats.Rate != at || stats.Share != share {
		t.Errorf("the rate is %v of %v, want %v of %v", stats.Rate, stats.Share, at, share)
	}
}

func TestShareRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c, err := cache.New(cache.Config[string]{Source: s, Logger: slog.New(slog.DiscardHandler), Rate: 100, Concurrency: 10})
		if err != nil {
			t.Fatal(err)
		}
		rates(t, c, 100, 100)
		c.ShareRate(4) // before Run
		rates(t, c, 25, 25)
		for i := range 253 {
			keep(t, c, fmt.Sprint(i))
		}
		began := time.Now()
		ctx, stop := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = c.Run(ctx) })
		synctest.Wait()
		if n := s.count(); n != 3 {
			t.Errorf("a fourth of a burst of 10 is %d", n)
		}
		time.Sleep(4 * time.Second)
		for range 1000 {
			c.ShareRate(4)
		}
		if n := s.count(); !within(time.Duration(n), 102, 104) {
			t.Errorf("after 4 s at 25 a second there were %d fetches", n)
		}
		c.ShareRate(-1) // the only one
		rates(t, c, 100, 100)
		time.Sleep(1600 * time.Millisecond)
		if last := s.recorded()[s.count()-1]; s.count() != 253 || !within(last.at.Sub(began), 5400*time.Millisecond, 5600*time.Millisecond) {
			t.Errorf("there were %d fetches, the last after %s", s.count(), last.at.Sub(began))
		}
		stop()
		run.Wait()
	})
}

// Who waits long for its turn has it as soon as there is more to share.
func TestShareRateWakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{Rate: 10, Concurrency: 1})
		c.ShareRate(1000)
		keep(t, c, "first")
		keep(t, c, "second")
		time.Sleep(time.Second)
		if s.count() != 1 {
			t.Errorf("%d fetches at one in 100 s", s.count())
		}
		c.ShareRate(1)
		time.Sleep(100 * time.Millisecond)
		if s.count() != 2 {
			t.Errorf("%d fetches at 10 a second", s.count())
		}
	})
}

// A rate that was lowered stays lowered, whoever comes and goes.
func TestShareRateWhileThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.fail(throttling())
		c := start(t, s, cache.Config[string]{})
		for i := range 2 { // throttled twice
			_, _ = c.Get(t.Context(), fmt.Sprint("throttled-", i), "")
			time.Sleep(time.Second)
		}
		rates(t, c, 100, 400)
		c.ShareRate(2)
		rates(t, c, 100, 200)
		c.ShareRate(1)
		rates(t, c, 100, 400)
		c.ShareRate(2)
		s.become(nil)
		for i := range 40 {
			mustGet(t, c, fmt.Sprint(i))
			if stats := c.Stats(); i == 2 && stats.Rate > 130 {
				t.Errorf("after two steps up the rate is %v", stats.Rate)
			}
			time.Sleep(time.Second)
		}
		rates(t, c, 200, 200)
		c.ShareRate(8)
		rates(t, c, 50, 50)
	})
}

// Nor does it rise above the new share, when the source comes back or at once.
func TestShareRateWhileAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.fail(away())
		c := start(t, s, cache.Config[string]{})
		for i := range 100 {
			keep(t, c, fmt.Sprint(i))
		}
		time.Sleep(time.Minute)
		rates(t, c, 10, 400)
		c.ShareRate(50)
		rates(t, c, 8, 8)
		s.become(nil)
		for range 60 {
			time.Sleep(time.Second)
			if stats := c.Stats(); stats.Rate > 8 {
				t.Fatalf("the rate is %v", stats.Rate)
			}
		}
		rates(t, c, 8, 8)
	})
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.fail(away())
		c := start(t, s, cache.Config[string]{})
		for i := range 1000 {
			keep(t, c, fmt.Sprint(i))
		}
		time.Sleep(time.Minute)
		c.ShareRate(3)
		s.become(nil)
		for range 600 {
			time.Sleep(100 * time.Millisecond)
			if stats := c.Stats(); stats.Rate > stats.Share {
				t.Fatalf("the rate is %v of %v", stats.Rate, stats.Share)
			}
		}
		rates(t, c, 400./3, 400./3)
	})
}

// All who share the rate ask a source that is away as often as one would.
func TestShareOfTheLeastRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		s.fail(away())
		c := start(t, s, cache.Config[string]{})
		c.ShareRate(20)
		for i := range 100 {
			keep(t, c, fmt.Sprint(i))
		}
		time.Sleep(10 * time.Minute)
		rates(t, c, 0.5, 20)
	})
}

func TestShareOfNoLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{Rate: rate.Inf})
		c.ShareRate(3)
		rates(t, c, float64(rate.Inf), float64(rate.Inf))
		for i := range 1000 {
			keep(t, c, fmt.Sprint(i))
		}
		synctest.Wait()
		if s.count() != 1000 {
			t.Errorf("%d fetches", s.count())
		}
	})
}
