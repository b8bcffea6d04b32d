package scale

import (
	"fmt"
	"slices"
	"time"
)

// summary is what a fleet did in some time.
type summary struct {
	figures

	took      time.Duration
	calls     [causes]int // that STS took
	throttled int
	grants    int
	expected  float64 // the calls that renewals take in that time on average
	minutes   []int   // renewals in each minute, throttled ones included
	busiest   int     // calls in the busiest second
}

// measure collects what happens while do runs.
func (f *fleet) measure(do func()) summary {
	f.collect()
	from := time.Now()
	do()
	return f.since(from, f.collect())
}

// since is what STS was asked for since then, beside what pods were told.
func (f *fleet) since(from time.Time, told figures) summary {
	to := time.Now()
	s := summary{
		figures: told, took: to.Sub(from), grants: f.grants(),
		expected: f.perHour() * to.Sub(from).Hours(), minutes: make([]int, int(to.Sub(from)/time.Minute)),
	}
	all := f.sts.between(from, to)
	first := 0
	for i, c := range all {
		if c.throttled {
			s.throttled++
		} else {
			s.calls[c.cause]++
		}
		if m := int(c.at.Sub(from) / time.Minute); c.cause == renewal && m < len(s.minutes) {
			s.minutes[m]++
		}
		for c.at.Sub(all[first].at) >= time.Second {
			first++
		}
		s.busiest = max(s.busiest, i-first+1)
	}
	return s
}

func (s summary) all() (n int) {
	for _, calls := range s.calls {
		n += calls
	}
	return n
}

func (s summary) perHour() float64 { return float64(s.all()) / s.took.Hours() }

// extra is how many calls more than in the steady state there were, per grant.
func (s summary) extra() float64 { return (float64(s.all()) - s.expected) / float64(s.grants) }

// fetched is how many sessions per grant were fetched by brokers that held none.
func (s summary) fetched() float64 {
	return float64(s.calls[caller]+s.calls[prefetch]) / float64(s.grants)
}

// peak is the busiest minute of renewals, and the mean.
func (s summary) peak() (most int, mean float64) {
	total := 0
	for _, n := range s.minutes {
		total += n
	}
	return slices.Max(append(s.minutes, 0)), float64(total) / float64(max(len(s.minutes), 1))
}

// String is a line for who watches.
func (s summary) String() string {
	most, mean := s.peak()
	return fmt.Sprintf("%s: %d calls of STS (%.0f per hour; renewals %d, ahead %d, for callers %d, throttled %d), %+.3f extra and %.3f fetched per grant; "+
		"%d asks of %d brokers, %d failed, %d without a session, least %.3f, longest wait %s; renewals per minute at most %d, mean %.1f; %d calls in the busiest second",
		s.took.Round(time.Second), s.all(), s.perHour(), s.calls[renewal], s.calls[prefetch], s.calls[caller], s.throttled, s.extra(), s.fetched(),
		s.asks, s.attempts, s.failed, s.without, s.least, s.longest, most, mean, s.busiest)
}
