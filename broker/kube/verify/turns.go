package verify

import (
	"container/list"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// maxWaiting bounds how many tokens wait to be verified, at some 5 kB each beside the token, which the call holds
// anyway. An API server that takes 100 ms for a review gets through as many in 6 s; sidecars give up after 10.
const maxWaiting = 2048

// turns bounds how much is done at once for callers of whom nothing is proved yet. Those who wait take turns, so that
// no caller waits for the many calls of another.
//
// A caller shows three things: the address that it calls from, the namespace that its token claims, and the token.
// It cannot choose the first, is free to choose the second, and the third may have been verified before. So there are
// lanes for each address and for each claimed namespace, which are served alternately, one call of each lane in turn:
//   - a flood from few addresses leaves a caller at another address its turn after one call of each of them, whatever
//     the flood claims;
//   - pods of one namespace that start at once, each at its own address, leave a pod of another namespace its turn
//     after one call of each namespace.
//
// Tokens that were verified before have every second turn, shared by namespace, and some slots of their own: what takes
// long for worthless tokens, such as a webhook that the API server asks about them, does not hold them up. And tokens of pods that are known to be
// there have some. Neither ever has all: genuine tokens can be made in numbers too.
type turns struct {
	slots [numberOfSlots]int // how many there are

	mu      sync.Mutex
	taken   [numberOfSlots]int       // guarded by mu
	waiting int                      // guarded by mu
	turn    int                      // index into schedule; guarded by mu
	kinds   [numberOfKinds]laneGroup // guarded by mu
}

// slot is one of two kinds of them.
type slot int

const (
	forAll      slot = iota
	forVerified      // for tokens that were verified before
	numberOfSlots
)

// claimant is who waits for a turn.
type claimant struct {
	address   string // where the call comes from; "" if that is not known
	namespace string // as the token claims it
	verified  bool   // this very token was verified before
	expected  bool   // there is a pod as the token claims it
}

// The kinds of lanes. A waiter is in one lane of each kind that it qualifies for.
const (
	byVerified  = iota // verified tokens, by namespace
	byExpected         // tokens of pods that are there, by namespace
	byAddress          // all, by address
	byNamespace        // all, by claimed namespace
	numberOfKinds
)

// schedule is the order in which the kinds have turns. A kind in which nobody waits is passed over.
var schedule = [...]int{byVerified, byAddress, byVerified, byNamespace, byVerified, byExpected}

// waiter is a claimant without a slot.
type waiter struct {
	claimant
	slot   slot                         // the one that it gets; set before ready
	ready  chan error                   // one value: nil with a slot, or why there is none
	lanes  [numberOfKinds]*lane         // nil: in none of that kind
	places [numberOfKinds]*list.Element // in that lane
}

// laneGroup is the lanes of one kind, in the order of their turns.
type laneGroup struct {
	lanes map[string]*lane
	order list.List // of *lane
}

// lane is those who wait of one address or namespace, first come first served.
type lane struct {
	key     string
	place   *list.Element // in the order of its group
	waiters list.List     // of *waiter
}

// newTurns makes so many slots for all, and so many more for tokens that were verified before.
func newTurns(all, verified int) *turns {
	t := &turns{slots: [...]int{forAll: all, forVerified: verified}}
	for kind := range t.kinds {
		t.kinds[kind].lanes = make(map[string]*lane)
	}
	return t
}

// take waits for a slot, which must be given back by give. It returns the error of ctx if that ends first, and
// errBusy if too many wait and [turns.largest] gives this one up.
func (t *turns) take(ctx context.Context, who claimant) (slot, error) {
	t.mu.Lock()
	for s, most := range t.slots {
		if s := slot(s); t.taken[s] < most && (s == forAll || who.verified) {
			t.taken[s]++
			t.mu.Unlock()
			return s, nil
		}
	}
	w := &waiter{claimant: who, ready: make(chan error, 1)}
	t.add(w)
	if t.waiting > maxWaiting {
		drop := t.largest()
		t.remove(drop)
		drop.ready <- errBusy
	}
	t.mu.Unlock()
	select {
	case err := <-w.ready:
		return w.slot, err
	case <-ctx.Done():
	}
	t.mu.Lock()
	select {
	case err := <-w.ready: // It came meanwhile.
		t.mu.Unlock()
		if err == nil {
			t.give(w.slot)
		}
	default:
		t.remove(w)
		t.mu.Unlock()
	}
	return 0, ctx.Err()
}

// give gives a slot back: to the one who waits and whose turn it is.
func (t *turns) give(s slot) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var w *waiter
	if s == forVerified {
		w = t.kinds[byVerified].next()
	} else {
		w = t.next()
	}
	if w == nil {
		t.taken[s]--
		return
	}
	t.remove(w)
	w.slot = s
	w.ready <- nil
}

// state is how many slots are taken, and how many callers wait.
func (t *turns) state() (taken, waiting int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.taken[forAll] + t.taken[forVerified], t.waiting
}

// next returns whose turn it is; nil if nobody waits. The caller holds mu.
func (t *turns) next() *waiter {
	for range schedule {
		kind := schedule[t.turn]
		t.turn = (t.turn + 1) % len(schedule)
		if w := t.kinds[kind].next(); w != nil {
			return w
		}
	}
	return nil
}

// next returns the first of the lane whose turn it is; nil if nobody waits.
func (g *laneGroup) next() *waiter {
	first := g.order.Front()
	if first == nil {
		return nil
	}
	g.order.MoveToBack(first)
	return first.Value.(*lane).waiters.Front().Value.(*waiter)
}

// add lets w wait. The caller holds mu.
func (t *turns) add(w *waiter) {
	t.waiting++
	if w.verified {
		t.kinds[byVerified].add(w, byVerified, w.namespace)
	}
	if w.expected {
		t.kinds[byExpected].add(w, byExpected, w.namespace)
	}
	t.kinds[byAddress].add(w, byAddress, w.address)
	t.kinds[byNamespace].add(w, byNamespace, w.namespace)
}

func (g *laneGroup) add(w *waiter, kind int, key string) {
	l := g.lanes[key]
	if l == nil {
		l = &lane{key: key}
		l.place = g.order.PushBack(l)
		g.lanes[key] = l
	}
	w.lanes[kind], w.places[kind] = l, l.waiters.PushBack(w)
}

// remove takes w out of all its lanes. The caller holds mu.
func (t *turns) remove(w *waiter) {
	t.waiting--
	for kind, l := range w.lanes {
		if l == nil {
			continue
		}
		if l.waiters.Remove(w.places[kind]); l.waiters.Len() == 0 {
			t.kinds[kind].order.Remove(l.place)
			delete(t.kinds[kind].lanes, l.key)
		}
	}
}

// largest returns the one to give up when too many wait: the newest one with the largest share. A share is
// small if either the address or the namespace has few that wait, so that nobody can make that of another large by
// claiming its namespace. A token that was verified before is given up last. The caller holds mu.
//
// It looks at all who wait, some 20 µs, which is less than a call costs otherwise.
func (t *turns) largest() *waiter {
	var worst *waiter
	var most [3]int
	for place := t.kinds[byAddress].order.Front(); place != nil; place = place.Next() {
		l := place.Value.(*lane)
		for e := l.waiters.Front(); e != nil; e = e.Next() {
			w := e.Value.(*waiter)
			unverified := 0
			if !w.verified {
				unverified = 1
			}
			atAddress, ofNamespace := l.waiters.Len(), w.lanes[byNamespace].waiters.Len()
			share := [3]int{unverified, min(atAddress, ofNamespace), max(atAddress, ofNamespace)}
			if worst == nil || slices.Compare(share[:], most[:]) >= 0 {
				worst, most = w, share
			}
		}
	}
	return worst
}

// noTurn is the error of a caller that got none: errBusy, or that of its own context.
func noTurn(err error) error {
	if errors.Is(err, errBusy) {
		return err
	}
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonBrokerBusy, RetryAfter: time.Second, Cause: err,
		Message: "too many tokens wait to be verified; try again",
	}
}

// errBusy is the answer to those for whom there is no place to wait. Another broker may have one.
var errBusy = &credential.Error{
	Kind: credential.ErrUnavailable, Reason: credential.ReasonBrokerBusy, RetryAfter: time.Second,
	Message: "too many tokens wait to be verified, most of them of this namespace or address; try again",
}
