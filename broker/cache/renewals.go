package cache

import (
	"math/bits"
	"math/rand/v2"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// How renewals are kept even. Sessions that were made within minutes, after a start or when the source comes
// back, would be renewed within minutes too, cycle after cycle for hours. So the renewals of each slot of time are
// counted, and who finds a slot full is renewed when there is room: as late as may be, and earlier than usual
// only for that.
const (
	// slotWidth is short against the shortest window of renewals, 90 s for sessions of 15 minutes.
	slotWidth = 10 * time.Second
	// headroom is how many more than the average a slot takes. A whole cycle then fits into 0.45/1.2 of a life, which is
	// less than there is between earliest and latest, and what chance brings together mostly finds its slot open.
	headroom = 1.2
	// alwaysRoom is what a slot takes while all renewals together are fewer than that: one a second is no load, and few
	// sessions are best renewed late.
	alwaysRoom = 10
	// averageAge, as a fraction of the life, is when renewals begin on average, for what they take of the rate.
	averageAge = 1 - (renewLow+renewHigh)/2
	// earliestAge, as a fraction of the life, bounds how early a session is renewed.
	earliestAge = 0.05
	// mostTries bounds the slots that are looked at for one renewal: all of a session of 3 hours, and some of each part of
	// a longer one's.
	mostTries = 512
)

// slot is one slot of time for sessions of about the same life: up to a power of two. Each such octave is kept even by
// itself, and so the whole is. In common slots the long sessions, which are planned hours ahead, would leave the short
// ones no room.
type slot struct {
	octave int
	begin  int64 // in seconds since 1970
}

// renewals says when sessions are to be renewed. It goes by the wall clock, as expirations do. What it has counted it
// finds again by what each entry remembers, whatever the clock is set to meanwhile.
type renewals struct {
	planned map[slot]int // :: slot → renewals in it; never 0
	// demand is how many renewals each octave takes in a billion seconds. Whole numbers, so that what is added and taken
	// away leaves nothing behind.
	demand [64]int64
}

// renewal is what an entry has in renewals.
type renewal struct {
	octave int
	share  int64 // of the octave's demand; 0: not wanted
	slot   slot
	at     bool // whether it is counted in slot
}

func newRenewals() renewals { return renewals{planned: make(map[slot]int)} }

// want makes the demand have the renewals of one session of that life; 0: none.
func (r *renewals) want(e *renewal, life time.Duration) {
	r.demand[e.octave] -= e.share
	e.octave, e.share = octave(life), 0
	if life > 0 {
		// No more than one a second: a life of nanoseconds is a mistake, and must not overflow the sum.
		e.share = int64(1e9 / max(averageAge*life.Seconds(), 1))
	}
	r.demand[e.octave] += e.share
}

// plan returns when cred is to be renewed, and counts that.
func (r *renewals) plan(e *renewal, cred credential.Credential, now time.Time) time.Time {
	r.cancel(e)
	life := cred.Life()
	atAge := func(age float64) time.Time {
		return cred.Expiration.Add(-time.Duration(float64(life) * (1 - age))).Round(0)
	}
	now = now.Round(0)
	latest := atAge(1 - renewLow)
	first := later(now, atAge(1-renewHigh))
	if !first.Before(latest) {
		return latest // It is late already.
	}
	at := r.find(octave(life), between(first, latest), later(now, atAge(earliestAge)), latest)
	e.slot, e.at = slotOf(octave(life), at), true
	r.planned[e.slot]++
	return at
}

// find returns at if its slot has room, otherwise a time in the latest slot between earliest and latest that has, and at
// all the same if none has.
func (r *renewals) find(octave int, at, earliest, latest time.Time) time.Time {
	room := r.room(octave)
	open := func(t time.Time) (begin, end time.Time, ok bool) {
		begin = t.Truncate(slotWidth)
		end = begin.Add(slotWidth)
		begin = later(begin, earliest)
		if latest.Before(end) {
			end = latest
		}
		// Of a slot that may not be used to its end there is only that part, or it would take all in a moment.
		return begin, end, float64(r.planned[slotOf(octave, t)]+1) <= room*end.Sub(begin).Seconds()/slotWidth.Seconds()
	}
	if _, _, ok := open(at); ok {
		return at
	}
	step := max(slotWidth, latest.Sub(earliest)/mostTries)
	// Not from the latest itself: sessions of one moment would look at the same few slots.
	for t := between(latest.Add(-step), latest); !t.Before(earliest); t = t.Add(-step) {
		if begin, end, ok := open(t); ok {
			return between(begin, end)
		}
	}
	return at
}

// cancel takes back what plan counted for the entry.
func (r *renewals) cancel(e *renewal) {
	if !e.at {
		return
	}
	if r.planned[e.slot]--; r.planned[e.slot] == 0 {
		delete(r.planned, e.slot)
	}
	e.at = false
}

// room is how many renewals a slot of the octave takes.
func (r *renewals) room(octave int) float64 {
	average := perSecond(r.demand[octave]) * slotWidth.Seconds()
	room := max(headroom*average, average+1) // in whole renewals never less than the average
	if r.perSecond()*slotWidth.Seconds() < alwaysRoom {
		room = max(room, alwaysRoom)
	}
	return room
}

// perSecond is how many renewals a second there are on average.
func (r *renewals) perSecond() float64 {
	var all int64
	for _, demand := range r.demand {
		all += demand
	}
	return perSecond(all)
}

func perSecond(demand int64) float64 { return float64(demand) / 1e9 }

func octave(life time.Duration) int { return bits.Len64(uint64(max(life, 0))) }

func slotOf(octave int, t time.Time) slot { return slot{octave, t.Truncate(slotWidth).Unix()} }

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// between returns a random time from a on and before b.
func between(a, b time.Time) time.Time {
	if !a.Before(b) {
		return a
	}
	return a.Add(rand.N(b.Sub(a))) //nolint:gosec // Spreads load; nothing is kept secret by it.
}
