package cache_test

import (
	"context"
	"fmt"
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
