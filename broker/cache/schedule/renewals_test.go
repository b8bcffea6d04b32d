package schedule_test

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/cache/schedule"
)

// ages returns how old sessions were when they were renewed, as fractions of their durations.
func (s *simulation) ages() (all []float64) {
	last := map[*key]time.Time{}
	for _, f := range s.fetches {
		if before, ok := last[f.key]; ok {
			all = append(all, float64(f.at.Sub(before))/float64(f.key.duration))
		}
		last[f.key] = f.at
	}
	return all
}

// perMinute counts the fetches of each minute since from.
func (s *simulation) perMinute(from time.Time) []int {
	counts := make([]int, s.now.Sub(from)/time.Minute)
	for _, f := range s.fetches {
		if i := int(f.at.Sub(from) / time.Minute); !f.at.Before(from) && i < len(counts) {
			counts[i]++
		}
	}
	return counts
}

func sum(counts []int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// Sessions that begin within seconds are renewed evenly from the first time on, none overdue, and with no more calls in
// the long run.
func TestRenewalsAreEven(t *testing.T) {
	for name, tt := range map[string]struct {
		durations []time.Duration
		each      int           // keys per duration
		measured  time.Duration // since the start
		quiet     time.Duration // until the first renewals
		hourly    float64       // maximum of calls per key; 0: not checked
	}{
		"one duration":   {[]time.Duration{time.Hour}, 6000, 3 * time.Hour, 11 * time.Minute, 2.25},
		"many durations": {[]time.Duration{15 * time.Minute, time.Hour, 12 * time.Hour}, 1000, 7 * time.Hour, 16 * time.Minute, 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSimulation(400, 64)
			for n := range tt.each {
				for _, duration := range tt.durations {
					s.add(fmt.Sprint(n), duration)
				}
			}
			s.run(t, tt.measured)
			minutes := s.perMinute(start.Add(tt.quiet))
			mean := float64(sum(minutes)) / float64(len(minutes))
			if peak := slices.Max(minutes); float64(peak) > 1.3*mean {
				t.Errorf("minute %d has %d renewals, the average is %.0f", slices.Index(minutes, peak), peak, mean)
			}
			if latest := slices.Max(s.ages()); latest > 0.501 {
				t.Errorf("a session is renewed at %.3f of its duration", latest)
			}
			if tt.hourly > 0 {
				keys := float64(tt.each * len(tt.durations))
				if hourly := float64(sum(s.perMinute(start.Add(time.Hour)))) / keys / 2; hourly > tt.hourly {
					t.Errorf("a key needs %.3f calls per hour, want at most %v", hourly, tt.hourly)
				}
			}
		})
	}
}

// Few keys are never renewed early: their renewals are no load.
func TestFewRenewalsAreLate(t *testing.T) {
	for _, duration := range []time.Duration{15 * time.Minute, time.Hour, 12 * time.Hour} {
		s := newSimulation(400, 64)
		for n := range 30 {
			s.add(fmt.Sprint(n), duration)
		}
		s.run(t, 100*duration)
		ages := s.ages()
		if len(ages) < 30*100*2-60 {
			t.Errorf("%s: %d renewals", duration, len(ages))
		}
		if first, last := slices.Min(ages), slices.Max(ages); first < 0.4 || last > 0.501 {
			t.Errorf("%s: renewals happen at %.4f to %.4f of the duration", duration, first, last)
		}
	}
}

// Renewals use their whole window: with between 0.6 and 0.5 of the duration left.
func TestRenewalsAreSpread(t *testing.T) {
	s := newSimulation(schedule.Unlimited, 64)
	const keys = 300 // too few for early renewals
	for n := range keys {
		s.add(fmt.Sprint(n), time.Hour)
	}
	s.run(t, 33*time.Minute)
	var tenths [10]int
	for _, age := range s.ages() {
		if age < 0.4 || age > 0.5 {
			t.Errorf("a session is renewed at %.3f of its duration", age)
		}
		tenths[min(max(int((age-0.4)*100), 0), 9)]++
	}
	for n, count := range tenths {
		if count < keys/10/3 {
			t.Errorf("tenth %d of the window has %d of %d renewals: %d", n, count, keys, tenths)
		}
	}
}

// The demand is what the renewals of all sessions need on average.
func TestDemand(t *testing.T) {
	s := unlimited()
	hour, day := schedule.NewItem(&key{}), schedule.NewItem(&key{})
	s.SetDemand(hour, time.Hour)
	s.SetDemand(day, time.Hour)
	s.SetDemand(day, 24*time.Hour)
	want := 1/(0.45*3600) + 1/(0.45*24*3600)
	if got := s.Stats().Demand; math.Abs(got-want) > want/1000 {
		t.Errorf("the demand is %v, want %v", got, want)
	}
	s.SetDemand(hour, 0)
	s.SetDemand(day, 0)
	if got := s.Stats().Demand; got != 0 {
		t.Errorf("without sessions the demand is %v", got)
	}
}

// Whatever the clock is set to and whatever times a session has, its renewal has a time, is never later than usual, and
// can be taken back.
func TestRenewalsOfOddTimes(t *testing.T) {
	for _, duration := range []time.Duration{-time.Hour, 0, 1, time.Millisecond, 9 * time.Second, time.Hour, 36 * time.Hour, 1<<63 - 1} {
		clocks := []time.Time{
			{}, time.Unix(-1, 0), start.Add(-time.Hour), start, start.Add(duration / 2), start.Add(duration), start.AddDate(300, 0, 0),
		}
		for _, now := range clocks {
			s, i := unlimited(), schedule.NewItem(&key{})
			s.SetDemand(i, duration)
			s.Renew(i, start, start.Add(duration), now)
			if at, usual := s.DueAt(i), start.Add(duration-time.Duration(0.5*float64(duration))); at.After(usual) {
				t.Errorf("a session of %s is renewed at %s, after %s", duration, at, usual)
			}
			s.Cancel(i)
			s.SetDemand(i, 0)
			if err := s.Check([]*item{i}); err != nil || s.Stats().Demand != 0 {
				t.Errorf("a session of %s at %s leaves a count behind: %v, demand %v", duration, now, err, s.Stats().Demand)
			}
		}
	}
}
