package cache_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
)

func throttling() error {
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSThrottled, "STS throttles")
}

// The rate falls if the source throttles or is unavailable for many keys, not if it refuses or one key fails. It rises
// again when the source works.
func TestRateFollowsTheSource(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		keys int
		want float64 // after a minute
	}{
		"throttled":                  {throttling(), 1, cache.DefaultRate / 2},
		"unavailable":                {unavailable(), 100, 10},
		"unavailable for one key":    {unavailable(), 1, cache.DefaultRate},
		"refused":                    {refusal(), 100, cache.DefaultRate},
		"failed for another reason":  {context.Canceled, 100, cache.DefaultRate},
		"nothing has been requested": {unavailable(), 0, cache.DefaultRate},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := new(source)
				s.fail(tt.err)
				c := start(t, s, cache.Config[string]{})
				for i := range tt.keys {
					retain(t, c, fmt.Sprint(i))
				}
				wait := time.Minute
				if name == "throttled" {
					wait = 0 // before the first retry
				}
				time.Sleep(wait)
				synctest.Wait()
				if got := c.Stats().Rate; got != tt.want {
					t.Errorf("the rate is %v, want %v", got, tt.want)
				}
				s.respond(nil)
				for i := range 60 {
					time.Sleep(time.Second)
					mustGet(t, c, fmt.Sprint("working-", i))
				}
				if stats := c.Stats(); stats.Rate != cache.DefaultRate || stats.Warm != tt.keys {
					t.Errorf("a minute after the source works: %+v", stats)
				}
			})
		})
	}
}

// If the rate share grows, a fetch that waits long for its turn begins at once.
func TestShareRateWakesRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := new(source)
		c := start(t, s, cache.Config[string]{Rate: 10, Concurrency: 1})
		c.ShareRate(1000)
		if stats := c.Stats(); stats.Rate != 0.01 || stats.Share != 0.01 {
			t.Errorf("a thousandth of 10 is %v of %v", stats.Rate, stats.Share)
		}
		retain(t, c, "first")
		retain(t, c, "second")
		time.Sleep(time.Second)
		if s.count() != 1 {
			t.Errorf("%d fetches at one in 100 s", s.count())
		}
		c.ShareRate(1)
		time.Sleep(100 * time.Millisecond)
		if s.count() != 2 {
			t.Errorf("%d fetches at 10 per second", s.count())
		}
	})
}
