// Package schedule decides which fetch begins when. It keeps the times at which sessions must be fetched, a queue of
// fetches that are due, and the rate at which fetches may begin.
//
// It guarantees: fetches with waiting callers come first, then renewals by expiration, then prefetches; tenants take
// turns among fetches with waiting callers and among prefetches; no more fetches begin than the rate and the
// concurrency allow; the rate falls while the source throttles or is unavailable; many renewals are spread evenly.
//
// It is a plain data structure: the caller passes the time, serializes all calls and runs the fetches. It holds no
// session and starts nothing.
package schedule

import (
	"math"
	"time"
)

// Schedule decides which fetch begins when. The zero value is not usable; see [New].
//
// Each item is in one state: idle, due at a time ([Schedule.At], [Schedule.Renew]), queued ([Schedule.Enqueue]) or
// running ([Schedule.Begin]).
type Schedule[T any] struct {
	concurrency int
	running     int
	due         dueHeap[T]
	queue       queue[T]
	renewals    renewals
	rate        rateControl
}

// Item is one key's place in a [Schedule]. Make it with [NewItem]. All fields but Value belong to the Schedule.
type Item[T any] struct {
	Value T // the caller's

	at         time.Time   // when the item is due
	dueIndex   int         // in Schedule.due; none if it is not there
	queueIndex int         // in Schedule.queue; none if it is not there
	expiration time.Time   // of the cached session; zero without one
	waiting    bool        // callers wait for the fetch
	turns      [kinds]turn // of the current fetch, one of each kind; zero: none yet
	renewal    renewal
}

// none is the index of an item that is not in a heap.
const none = -1

// NewItem returns an idle item.
func NewItem[T any](value T) *Item[T] {
	return &Item[T]{Value: value, dueIndex: none, queueIndex: none}
}

// New returns an empty schedule. At most concurrency fetches run at a time, and at most perSecond begin per second, with
// bursts of concurrency; [Unlimited] lifts the rate. Both must be positive.
func New[T any](perSecond float64, concurrency int) *Schedule[T] {
	return &Schedule[T]{
		concurrency: concurrency,
		renewals:    newRenewals(),
		rate:        newRateControl(perSecond, concurrency),
	}
}

// At makes i due at t, and at no other time. i must be neither queued nor running.
func (s *Schedule[T]) At(i *Item[T], t time.Time) {
	s.Cancel(i)
	s.setDue(i, t)
}

// Renew makes i due when its session must be renewed: with between 0.5 and 0.6 of its duration left, or earlier if too
// many renewals would fall into the same time. i must be neither queued nor running.
func (s *Schedule[T]) Renew(i *Item[T], issued, expiration, now time.Time) {
	s.Cancel(i)
	s.setDue(i, s.renewals.plan(&i.renewal, issued, expiration, now))
}

func (s *Schedule[T]) setDue(i *Item[T], t time.Time) {
	// By the wall clock, as expirations are: an order of mixed clocks would break when one is set.
	i.at = t.Round(0)
	s.due.push(i)
}

// Cancel makes i not due.
func (s *Schedule[T]) Cancel(i *Item[T]) {
	s.due.remove(i)
	s.renewals.cancel(&i.renewal)
}

// SetDemand replaces i's share of the demand with that of one session of the given duration; 0 removes it.
func (s *Schedule[T]) SetDemand(i *Item[T], duration time.Duration) {
	s.renewals.setDemand(&i.renewal, duration)
}

// DueAt returns when i is due; zero if it is not.
func (s *Schedule[T]) DueAt(i *Item[T]) time.Time {
	if i.dueIndex == none {
		return time.Time{}
	}
	return i.at
}

// Due removes and returns the item that has been due for the longest time. It returns nil if none is due at now.
func (s *Schedule[T]) Due(now time.Time) *Item[T] {
	if len(s.due) == 0 || s.due[0].at.After(now) {
		return nil
	}
	i := s.due[0]
	s.Cancel(i)
	return i
}

// Enqueue queues a new fetch for i, which must be idle or due. expiration is that of the cached session, zero without
// one. The fetch takes a turn of tenant among prefetches.
func (s *Schedule[T]) Enqueue(i *Item[T], tenant string, expiration time.Time) {
	s.Cancel(i)
	i.expiration, i.waiting, i.turns = expiration, false, [kinds]turn{}
	s.queue.takeTurn(i, prefetching, tenant)
	s.queue.push(i)
}

// Requeue queues i again after its fetch has finished. The fetch keeps its turns.
func (s *Schedule[T]) Requeue(i *Item[T]) { s.queue.push(i) }

// SetWaiting notes that callers wait for i's fetch. If it is queued, the fetch takes a turn of tenant among those that
// callers wait for, unless it had one before: a caller that returns keeps its place.
func (s *Schedule[T]) SetWaiting(i *Item[T], tenant string) {
	if i.queueIndex != none && !i.waiting {
		s.queue.takeTurn(i, waiting, tenant)
	}
	i.waiting = true
	s.queue.fix(i)
}

// ClearWaiting notes that no caller waits for i's fetch any more.
func (s *Schedule[T]) ClearWaiting(i *Item[T]) {
	i.waiting = false
	s.queue.fix(i)
}

// ForgetSession notes that i has no session any more: its fetch is no renewal now.
func (s *Schedule[T]) ForgetSession(i *Item[T]) {
	i.expiration = time.Time{}
	s.queue.fix(i)
}

// Queued reports whether i's fetch is queued: it has not begun.
func (s *Schedule[T]) Queued(i *Item[T]) bool { return i.queueIndex != none }

// Dequeue removes i from the queue, if it is there.
func (s *Schedule[T]) Dequeue(i *Item[T]) { s.queue.remove(i) }

// Begin removes and returns the item whose fetch begins at now. It returns nil if none may begin.
func (s *Schedule[T]) Begin(now time.Time) *Item[T] {
	if s.queue.empty() || s.running >= s.concurrency || s.rate.take(now) > 0 {
		return nil
	}
	s.running++
	return s.queue.pop()
}

// Finish notes how a fetch ended that Begin returned. failedBefore says that the same key's previous fetch failed too.
func (s *Schedule[T]) Finish(now time.Time, outcome Outcome, failedBefore bool) {
	s.running--
	s.rate.adapt(now, outcome, failedBefore)
}

// Wait returns how long until Due or Begin may return an item, unless another method is called first. It returns
// the longest time.Duration if only another method can change that.
func (s *Schedule[T]) Wait(now time.Time) time.Duration {
	wait := forever
	if len(s.due) > 0 {
		wait = max(s.due[0].at.Sub(now), 0)
	}
	if !s.queue.empty() && s.running < s.concurrency {
		wait = min(wait, s.rate.wait(now))
	}
	return wait
}

// forever is the result of [Schedule.Wait] if nothing is due or queued.
const forever time.Duration = math.MaxInt64

// ShareRate makes the rate and the burst one of n equal shares, and reports whether that changes them. Less than 1
// counts as 1.
func (s *Schedule[T]) ShareRate(now time.Time, n int) (changed bool) { return s.rate.share(now, n) }

// Stats describes a schedule in numbers.
type Stats struct {
	// Due, Queued and Running are the items in these states.
	Due, Queued, Running int
	// Rate is how many fetches may begin per second at present. Share is its maximum: this schedule's share of the whole.
	// Demand is how many renewals per second all sessions need on average.
	Rate, Share, Demand float64
}

// Stats returns the numbers of this moment.
func (s *Schedule[T]) Stats() Stats {
	return Stats{
		Due: len(s.due), Queued: len(s.queue.heap), Running: s.running,
		Rate: s.rate.perSecond(), Share: s.rate.full.rate, Demand: s.renewals.perSecond(),
	}
}
