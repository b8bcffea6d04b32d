package cache_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
)

// durationOf returns the session duration with which a key begins, as in "1h/7".
func durationOf(key string) time.Duration {
	duration, _, _ := strings.Cut(key, "/")
	d, err := time.ParseDuration(duration)
	if err != nil {
		panic(err)
	}
	return d
}

// byKey makes the source return sessions of the duration with which the key begins.
func (s *source) byKey() *source {
	s.respond(func(_ context.Context, key string) (credential.Credential, error) {
		return s.session(durationOf(key)), nil
	})
	return s
}

// Whatever happens to a key, nothing of it stays in the schedule, and active keys stay due.
func TestScheduleFollowsTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		s := new(source).byKey()
		c := start(t, s, cache.Config[string]{Rate: rate.Inf, MaxPerTenant: 150})
		durations := []string{"30s", "15m", "1h", "12h"}
		refs := map[string]int{}
		for i := range 5_000 {
			key := fmt.Sprintf("%s/%d", durations[random.IntN(len(durations))], random.IntN(50))
			one := only(key)
			switch what := random.IntN(20); {
			case what < 7:
				if c.Retain(key, "") == nil {
					refs[key]++
				}
			case what < 14 && refs[key] > 0:
				c.Release(key, "")
				refs[key]--
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
		for _, n := range refs {
			want += min(n, 1)
		}
		if stats := c.Stats(); stats.Warm != want || stats.Active != want || want == 0 || stats.Demand == 0 {
			t.Errorf("%d keys are active; %+v", want, stats)
		}
		for key, n := range refs {
			for range n {
				c.Release(key, "")
			}
		}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
		if stats := c.Stats(); stats.Active != 0 || stats.Demand != 0 {
			t.Errorf("after all keys were released: %+v", stats)
		}
	})
}
