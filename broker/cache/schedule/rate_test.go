package schedule_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/cache/schedule"
)

// respond makes the source end every fetch like this.
func (s *simulation) respond(outcome schedule.Outcome) {
	s.source = func(*key) schedule.Outcome { return outcome }
}

// addMany adds n keys whose sessions outlive the test.
func (s *simulation) addMany(n int) {
	for i := range n {
		s.add(fmt.Sprint(i), 1000*time.Hour)
	}
}

// fetchOne fetches one key more, which is queued at once.
func (s *simulation) fetchOne(t *testing.T) {
	t.Helper()
	before := len(s.fetches)
	s.add("one", 1000*time.Hour)
	s.run(t, 0)
	if len(s.fetches) == before {
		t.Fatalf("no fetch began: %+v", s.Stats())
	}
}

// wantRate checks the rate and its maximum.
func (s *simulation) wantRate(t *testing.T, rate, share float64) {
	t.Helper()
	if stats := s.Stats(); stats.Rate != rate || stats.Share != share {
		t.Errorf("the rate is %v of %v, want %v of %v", stats.Rate, stats.Share, rate, share)
	}
}

func TestRate(t *testing.T) {
	s := newSimulation(10, 4)
	s.addMany(104)
	s.run(t, 0)
	if n := len(s.fetches); n != 4 {
		t.Errorf("a burst of %d, want 4", n)
	}
	s.run(t, time.Minute)
	// 4 at once and 100 at 10 per second: neither faster nor slower.
	if took := s.fetches[103].at.Sub(start); took < 9999*time.Millisecond || took > 10001*time.Millisecond {
		t.Errorf("104 fetches took %s, want 10s", took)
	}
}

func TestUnlimitedRate(t *testing.T) {
	s := newSimulation(schedule.Unlimited, 1)
	s.ShareRate(s.now, 3)
	s.wantRate(t, schedule.Unlimited, schedule.Unlimited)
	s.respond(schedule.Throttled)
	s.addMany(1000)
	s.run(t, 0)
	if n := len(s.fetches); n != 1000 {
		t.Errorf("%d fetches, want 1000", n)
	}
	s.wantRate(t, schedule.Unlimited, schedule.Unlimited)
}

// A clock that is set back neither stops fetches nor lets more begin.
func TestRateWhileTheClockIsSetBack(t *testing.T) {
	s := newSimulation(10, 1)
	s.addMany(200)
	s.run(t, time.Second)
	s.now = s.now.Add(-time.Hour)
	before := len(s.fetches)
	for i := range 100 {
		s.enqueue(fmt.Sprint("later ", i), "")
	}
	s.run(t, 5*time.Second)
	if n := len(s.fetches) - before; n < 49 || n > 51 {
		t.Errorf("%d fetches in 5 s, want 50", n)
	}
}

// If the source accepts fewer calls than the rate, few calls are throttled, and every key is fetched in the end.
func TestRateFollowsThrottling(t *testing.T) {
	const accepts, keys = 100, 5000
	s := newSimulation(400, 64)
	tokens, filled, throttled := float64(accepts), start, 0
	s.source = func(*key) schedule.Outcome {
		tokens = min(tokens+accepts*s.now.Sub(filled).Seconds(), accepts)
		filled = s.now
		if tokens < 1 {
			throttled++
			return schedule.Throttled
		}
		tokens--
		return schedule.Responded
	}
	s.addMany(keys)
	s.run(t, 2*time.Minute)
	if n := len(s.fetches) - throttled; n != keys {
		t.Errorf("after two minutes %d of %d keys have a session", n, keys)
	}
	if throttled > keys/20 {
		t.Errorf("%d calls were throttled for %d keys", throttled, keys)
	}
}

func TestRateFallsAndRises(t *testing.T) {
	s := newSimulation(400, 64)
	s.respond(schedule.Throttled)
	s.fetchOne(t)
	s.wantRate(t, 200, 400)
	s.fetchOne(t) // within a second: it began at the old rate
	s.wantRate(t, 200, 400)
	s.run(t, time.Second)
	s.fetchOne(t)
	s.wantRate(t, 100, 400)
	s.respond(schedule.Responded)
	for _, want := range []float64{100, 120, 140, 160} { // steps of a twentieth, one per second
		s.wantRate(t, want, 400)
		s.run(t, time.Second)
		s.fetchOne(t)
		s.fetchOne(t)
	}
	for range 20 {
		s.run(t, time.Second)
		s.fetchOne(t)
	}
	s.wantRate(t, 400, 400)
}

// While the source is unavailable, few fetches begin. When it returns, they do not begin all at once, and soon all is as
// before.
func TestUnavailableSource(t *testing.T) {
	const keys = 5000
	s := newSimulation(400, 64)
	s.respond(schedule.Unavailable)
	s.addMany(keys)
	s.run(t, 25*time.Minute)
	if n := len(s.fetches); n > 25*60*15 {
		t.Errorf("%d calls in 25 minutes of an outage", n)
	}
	s.wantRate(t, 10, 400)
	back, before := s.now, len(s.fetches)
	s.respond(schedule.Responded)
	s.run(t, time.Minute)
	perSecond := make([]int, 61)
	for _, f := range s.fetches[before:] {
		perSecond[f.at.Sub(back)/time.Second]++
	}
	for second, n := range perSecond {
		// What the rate allows in a second, and the burst.
		if allowed := min(10<<min(second+1, 6), 400) + 64; n > allowed {
			t.Errorf("%d calls in second %d after the outage, want at most %d", n, second, allowed)
		}
	}
	if n := len(s.fetches) - before; n != keys {
		t.Errorf("a minute after the outage %d of %d keys have a session", n, keys)
	}
	s.wantRate(t, 400, 400)
}

// A key that fails by itself, however often, does not slow the others.
func TestOneBrokenKeySlowsNobody(t *testing.T) {
	s := newSimulation(400, 64)
	broken := s.add("broken", time.Hour).Value
	s.source = func(k *key) schedule.Outcome {
		if k == broken {
			return schedule.Unavailable
		}
		return schedule.Responded
	}
	for range 100 {
		s.run(t, 10*time.Second)
		s.fetchOne(t)
	}
	s.run(t, 15*time.Minute)
	if broken.failures < 50 {
		t.Errorf("the broken key failed only %d times", broken.failures)
	}
	s.wantRate(t, 400, 400)
}

// A response, a refusal included, shows that the source is available.
func TestResponsesEndAnOutage(t *testing.T) {
	s := newSimulation(400, 64)
	n := 0
	s.source = func(*key) schedule.Outcome {
		if n++; n%20 == 0 {
			return schedule.Responded
		}
		return schedule.Unavailable
	}
	for range 100 {
		s.fetchOne(t)
		s.now = s.now.Add(10 * time.Millisecond)
	}
	s.wantRate(t, 400, 400)
}

func TestShareRate(t *testing.T) {
	s := newSimulation(100, 10)
	s.wantRate(t, 100, 100)
	if !s.ShareRate(s.now, 4) || s.ShareRate(s.now, 4) {
		t.Error("ShareRate does not report the one change")
	}
	s.wantRate(t, 25, 25)
	s.now = s.now.Add(time.Second)
	s.addMany(253)
	s.run(t, 0)
	if n := len(s.fetches); n != 3 {
		t.Errorf("a quarter of a burst of 10 is %d, want 3", n)
	}
	s.run(t, 4*time.Second)
	if n := len(s.fetches); n < 102 || n > 104 {
		t.Errorf("%d fetches after 4 s at 25 per second", n)
	}
	s.ShareRate(s.now, -1) // alone again
	s.wantRate(t, 100, 100)
	s.run(t, 1600*time.Millisecond)
	if n := len(s.fetches); n != 253 {
		t.Errorf("%d fetches after 1.6 s more at 100 per second, want 253", n)
	}
}

// A rate that was lowered stays lowered, however many share it.
func TestShareOfALoweredRate(t *testing.T) {
	s := newSimulation(400, 64)
	s.respond(schedule.Throttled)
	for range 2 {
		s.fetchOne(t)
		s.run(t, time.Second)
	}
	s.wantRate(t, 100, 400)
	for _, share := range []struct {
		n    int
		full float64
	}{{2, 200}, {1, 400}, {2, 200}} {
		s.ShareRate(s.now, share.n)
		s.wantRate(t, 100, share.full)
	}
	s.respond(schedule.Responded)
	for range 3 {
		s.fetchOne(t)
		s.run(t, time.Second)
	}
	s.wantRate(t, 120, 200) // in steps of a twentieth of the new full rate
	for range 40 {
		s.fetchOne(t)
		s.run(t, time.Second)
	}
	s.wantRate(t, 200, 200)
	s.ShareRate(s.now, 8)
	s.wantRate(t, 50, 50)
}

// The rate rises to the new share and no further when the source returns.
func TestShareDuringAnOutage(t *testing.T) {
	for _, n := range []int{3, 50} {
		s := newSimulation(400, 64)
		s.respond(schedule.Unavailable)
		s.addMany(1000)
		s.run(t, time.Minute)
		s.wantRate(t, 10, 400)
		s.ShareRate(s.now, n)
		share := 400 / float64(n)
		s.wantRate(t, min(10, share), share)
		s.respond(schedule.Responded)
		for range 600 {
			s.run(t, 100*time.Millisecond)
			if stats := s.Stats(); stats.Rate > stats.Share {
				t.Fatalf("the rate is %v of %v", stats.Rate, stats.Share)
			}
		}
		s.wantRate(t, share, share)
	}
}

// All that share the rate call an unavailable source as often as one alone.
func TestShareOfTheMinimum(t *testing.T) {
	s := newSimulation(400, 64)
	s.respond(schedule.Unavailable)
	s.ShareRate(s.now, 20)
	s.addMany(100)
	s.run(t, 10*time.Minute)
	s.wantRate(t, 0.5, 20)
}
