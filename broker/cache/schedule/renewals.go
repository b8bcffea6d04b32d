package schedule

import (
	"math/bits"
	"math/rand/v2"
	"time"
)

// RenewLow is the fraction of the session duration that is left at the latest renewal.
const RenewLow = 0.50

// When sessions are renewed, as fractions of the session duration.
const (
	// renewHigh is left at the earliest renewal, except for those that are earlier to keep renewals even. Between
	// renewHigh and RenewLow the moment is random.
	renewHigh = 0.60
	// averageAge is when renewals begin on average. It determines how much of the rate they need.
	averageAge = 1 - (RenewLow+renewHigh)/2
	// earliestAge is how early a session may be renewed to keep renewals even.
	earliestAge = 0.05
)

// How renewals are kept even. Sessions that begin within minutes, after a start or an outage of the source, would be
// renewed within the same minutes for hours. So the renewals of each slot of time are counted. A renewal that finds its
// slot full moves to the latest earlier slot that has room.
const (
	// slotWidth is short compared with the shortest window between renewHigh and RenewLow, 90 s for sessions of 15 minutes.
	slotWidth = 10 * time.Second
	// headroom is how many times the average a slot takes. All renewals of a cycle then fit into 0.45/1.2 of a session
	// duration, which is less than the time between earliestAge and the latest renewal. Renewals that are random already
	// mostly find their slot open.
	headroom = 1.2
	// minRoom is what a slot takes while all renewals together are fewer than that: one per second is no load, and then
	// it is better to renew late.
	minRoom = 10
	// maxTries bounds the slots that one renewal tries: all slots of a session of 3 hours, and a part of those of a
	// longer session, evenly spread.
	maxTries = 512
)

// slot is a slot of time for sessions of similar duration: up to a power of two. Each such octave is even by
// itself, and so the whole is even. In common slots, long sessions, which are planned hours ahead, would leave no room for
// short ones.
type slot struct {
	octave int
	begin  int64 // in seconds since 1970
}

// renewals decides when sessions are renewed. It uses the wall clock, as expirations do. Each item remembers what was
// counted for it, so that the counts stay right if the clock is set.
type renewals struct {
	planned map[slot]int // :: slot → renewals in it; never 0
	// demand is how many renewals each octave needs in a billion seconds. Whole numbers leave no rest when they are
	// subtracted again.
	demand [64]int64
}

// renewal records how an item was counted.
type renewal struct {
	octave  int
	share   int64 // of the octave's demand; 0: none
	slot    slot
	planned bool // counted in slot
}

func newRenewals() renewals { return renewals{planned: make(map[slot]int)} }

// setDemand replaces e's share of the demand with that of one session of the given duration; 0 removes it.
func (r *renewals) setDemand(e *renewal, duration time.Duration) {
	r.demand[e.octave] -= e.share
	e.octave, e.share = octaveOf(duration), 0
	if duration > 0 {
		// At most one renewal per second: a duration of nanoseconds is a mistake, and must not overflow the sum.
		e.share = int64(1e9 / max(averageAge*duration.Seconds(), 1))
	}
	r.demand[e.octave] += e.share
}

// plan returns when a session is renewed, and counts it for e.
func (r *renewals) plan(e *renewal, issued, expiration, now time.Time) time.Time {
	r.cancel(e)
	duration := expiration.Sub(issued)
	atAge := func(age float64) time.Time {
		return expiration.Add(-time.Duration(float64(duration) * (1 - age))).Round(0)
	}
	now = now.Round(0)
	latest := atAge(1 - RenewLow)
	usual := later(now, atAge(1-renewHigh))
	if !usual.Before(latest) {
		return latest // It is overdue.
	}
	octave := octaveOf(duration)
	at := r.find(octave, between(usual, latest), later(now, atAge(earliestAge)), latest)
	e.slot, e.planned = slotOf(octave, at), true
	r.planned[e.slot]++
	return at
}

// find returns at if its slot has room, otherwise a time in the latest slot between earliest and latest that has room.
// If none has, it returns at.
func (r *renewals) find(octave int, at, earliest, latest time.Time) time.Time {
	room := r.room(octave)
	open := func(t time.Time) (begin, end time.Time, ok bool) {
		begin = t.Truncate(slotWidth)
		end = begin.Add(slotWidth)
		begin = later(begin, earliest)
		if latest.Before(end) {
			end = latest
		}
		// A slot of which only a part is usable has room for that part only.
		return begin, end, float64(r.planned[slotOf(octave, t)]+1) <= room*end.Sub(begin).Seconds()/slotWidth.Seconds()
	}
	if _, _, ok := open(at); ok {
		return at
	}
	step := max(slotWidth, latest.Sub(earliest)/maxTries)
	// The first slot is random, or sessions that begin at the same moment would try the same few slots.
	for t := between(latest.Add(-step), latest); !t.Before(earliest); t = t.Add(-step) {
		if begin, end, ok := open(t); ok {
			return between(begin, end)
		}
	}
	return at
}

// cancel undoes what plan counted for e.
func (r *renewals) cancel(e *renewal) {
	if !e.planned {
		return
	}
	if r.planned[e.slot]--; r.planned[e.slot] == 0 {
		delete(r.planned, e.slot)
	}
	e.planned = false
}

// room is how many renewals a slot of the octave takes.
func (r *renewals) room(octave int) float64 {
	average := perSecond(r.demand[octave]) * slotWidth.Seconds()
	room := max(headroom*average, average+1) // in whole renewals never less than the average
	if r.perSecond()*slotWidth.Seconds() < minRoom {
		room = max(room, minRoom)
	}
	return room
}

// perSecond is how many renewals per second all sessions need on average.
func (r *renewals) perSecond() float64 {
	var sum int64
	for _, demand := range r.demand {
		sum += demand
	}
	return perSecond(sum)
}

func perSecond(demand int64) float64 { return float64(demand) / 1e9 }

func octaveOf(duration time.Duration) int { return bits.Len64(uint64(max(duration, 0))) }

func slotOf(octave int, t time.Time) slot { return slot{octave, t.Truncate(slotWidth).Unix()} }

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// between returns a random time t with a ≤ t < b; a if there is none.
func between(a, b time.Time) time.Time {
	if !a.Before(b) {
		return a
	}
	return a.Add(rand.N(b.Sub(a))) //nolint:gosec // It spreads load and protects no secret.
}
