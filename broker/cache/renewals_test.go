package cache_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
)

// lifeOf is the length of the sessions of a key that begins with it, as in "1h/7".
func lifeOf(key string) time.Duration {
	length, _, _ := strings.Cut(key, "/")
	d, err := time.ParseDuration(length)
	if err != nil {
		panic(err)
	}
	return d
}

// byKey makes the sessions of the length that the key begins with.
func (s *source) byKey() *source {
	s.become(func(_ context.Context, key string) (credential.Credential, error) { return s.session(lifeOf(key)), nil })
	return s
}

// ages are how old sessions were when they were renewed, as parts of their lives.
func ages(fetches []fetch) (all []float64) {
	last := map[string]time.Time{}
	for _, f := range fetches {
		if before, ok := last[f.key]; ok {
			all = append(all, float64(f.at.Sub(before))/float64(lifeOf(f.key)))
		}
		last[f.key] = f.at
	}
	return all
}

// perMinute counts the fetches of each minute from one time to another.
func perMinute(fetches []fetch, from, to time.Time) []int {
	counts := make([]int, to.Sub(from)/time.Minute)
	for _, f := range fetches {
		if i := f.at.Sub(from) / time.Minute; !f.at.Before(from) && int(i) < len(counts) {
			counts[i]++
		}
	}
	return counts
}

// Sessions that were made within a minute are renewed evenly from the first time on, none late, and at no more calls
// in the long run.
func TestRenewalsAreEven(t *testing.T) {
	for name, tt := range map[string]struct {
		lives  []string
		each   int           // keys of each
		lasts  time.Duration // what is measured, from the end of the cold start
		quiet  time.Duration // before the first renewals can be expected
		hourly float64       // calls per key, at most; 0: not asked
	}{
		"one length":   {[]string{"1h"}, 6000, 3 * time.Hour, 10 * time.Minute, 2.25},
		"many lengths": {[]string{"15m", "1h", "12h"}, 1000, 7 * time.Hour, 15 * time.Minute, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := new(source).byKey()
				c := start(t, s, cache.Config[string]{})
				keys := tt.each * len(tt.lives)
				for i := range tt.each {
					for _, length := range tt.lives {
						keep(t, c, fmt.Sprintf("%s/%d", length, i))
					}
				}
				for s.count() < keys {
					time.Sleep(time.Second)
				}
				cold := time.Now()
				time.Sleep(tt.lasts)
				fetches := s.recorded()

				minutes := perMinute(fetches, cold.Add(tt.quiet), time.Now())
				sum := 0
				for _, n := range minutes {
					sum += n
				}
				mean := float64(sum) / float64(len(minutes))
				if most := slices.Max(minutes); float64(most) > 1.3*mean {
					t.Errorf("of renewals there are %.0f a minute, and in minute %d there are %d", mean, slices.Index(minutes, most), most)
				}
				if latest := slices.Max(ages(fetches)); latest > 0.55 {
					t.Errorf("a session is renewed at %.3f of its life", latest)
				}
				if warm, kept := c.Settled(); warm != keys || kept != keys {
					t.Errorf("%d of %d keys are warm", warm, kept)
				}
				if tt.hourly == 0 {
					return
				}
				calls := 0
				for _, n := range perMinute(fetches, cold.Add(time.Hour), cold.Add(3*time.Hour)) {
					calls += n
				}
				if perKey := float64(calls) / float64(keys) / 2; perKey > tt.hourly {
					t.Errorf("a key takes %.3f calls an hour", perKey)
				}
			})
		})
	}
}

// Few keys are left alone: they are never renewed early.
func TestFewRenewalsAreLate(t *testing.T) {
	for _, length := range []string{"15m", "1h", "12h"} {
		synctest.Test(t, func(t *testing.T) {
			s := new(source).byKey()
			c := start(t, s, cache.Config[string]{})
			for i := range 30 {
				keep(t, c, fmt.Sprintf("%s/%d", length, i))
			}
			time.Sleep(100 * lifeOf(length))
			all := ages(s.recorded())
			if len(all) < 30*100*2-60 {
				t.Errorf("%s: %d renewals", length, len(all))
			}
			// Half a second for the rest of a burst at the rate limit.
			if first, last := slices.Min(all), slices.Max(all); first < 0.4 || last > 0.501 {
				t.Errorf("%s: renewals come at %.4f to %.4f of a life", length, first, last)
			}
		})
	}
}

// What is counted of renewals is taken back, whatever becomes of a key.
func TestRenewalsLeaveNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		s := new(source).byKey()
		c := start(t, s, cache.Config[string]{Rate: rate.Inf, MaxPerTenant: 150})
		lives := []string{"30s", "15m", "1h", "12h"}
		kept := map[string]int{}
		for i := range 5_000 {
			key := fmt.Sprintf("%s/%d", lives[random.IntN(len(lives))], random.IntN(50))
			one := only(key)
			switch what := random.IntN(20); {
			case what < 7:
				if c.Retain(key, "") == nil {
					kept[key]++
				}
			case what < 14 && kept[key] > 0:
				c.Release(key, "")
				kept[key]--
			case what == 14:
				c.Renew(one)
			case what == 15:
				c.Drop(one)
			case what == 16 && random.IntN(2) == 0:
				s.fail(refusal())
			case what == 16:
				s.byKey()
			default:
				_, _ = c.Get(t.Context(), key, "")
			}
			time.Sleep(time.Duration(random.Int64N(int64(4 * time.Second))))
			if i%100 == 0 {
				if err := c.Check(); err != nil {
					t.Fatal(err)
				}
			}
		}
		s.byKey()
		time.Sleep(2 * time.Minute)
		want := 0
		for _, n := range kept {
			want += min(n, 1)
		}
		if n, _ := c.Planned(); n != want || want == 0 {
			t.Errorf("%d renewals are planned, of %d keys", n, want)
		}
		for key, n := range kept {
			for range n {
				c.Release(key, "")
			}
		}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		if n, slots := c.Planned(); n != 0 || slots != 0 {
			t.Errorf("%d renewals are planned in %d slots of keys that nobody keeps", n, slots)
		}
	})
}

// Whatever the clock is set to and whatever times a session has, its renewal has a time, never after what is usual, and
// can be taken back.
func TestRenewalsOfOddTimes(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for _, length := range []time.Duration{-time.Hour, 0, 1, time.Millisecond, 9 * time.Second, time.Hour, 36 * time.Hour, 1<<63 - 1} {
		for _, clock := range []time.Time{{}, time.Unix(-1, 0), now.Add(-time.Hour), now, now.Add(length / 2), now.Add(length), now.AddDate(300, 0, 0)} {
			at, left := cache.PlanRenewal(credential.Credential{Issued: now, Expiration: now.Add(length)}, clock)
			if usual := now.Add(length - time.Duration(0.5*float64(length))); at.After(usual) || left != 0 {
				t.Errorf("a session of %s at %s: renewed at %s, %d counts are left", length, clock, at, left)
			}
		}
	}
}
