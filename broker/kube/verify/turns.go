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

// maxWaiting bounds the tokens that wait to be verified, at about 5 kB each besides the token, which its call holds anyway.
// An API server that takes 100 ms for a review reviews as many in 6 s; sidecars give up after 10.
const maxWaiting = 2048

// turns bounds concurrent work for unauthenticated callers. Callers that wait take turns, so that no caller waits for many
// calls of another caller.
//
// A caller has three properties: its address, the namespace that its token claims, and the token. It cannot choose its
// address, can claim any namespace, and its token may have been verified before. So each address has a lane and each claimed
// namespace has a lane. Both kinds of lanes are served alternately, one call of each lane per turn:
//   - If few addresses send a flood, a caller at another address waits for one call of each of them, whatever namespaces the
//     flood claims.
//   - If many pods of one namespace start at once, each at its own address, a pod of another namespace waits for one call of
//     each namespace.
//
// Tokens that were verified before get every second turn, by namespace, and some slots of their own. So work that takes long
// for worthless tokens, such as an API server's call of its webhook, does not delay them. Tokens of pods that exist get some
// turns too. Neither gets all turns, because genuine tokens can be created in large numbers too.
type turns struct {
	slots [numberOfSlots]int // the limits

	mu      sync.Mutex
	taken   [numberOfSlots]int       // guarded by mu
	waiting int                      // guarded by mu
	turn    int                      // index into schedule; guarded by mu
	kinds   [numberOfKinds]laneGroup // guarded by mu
}

// slot is a kind of slot.
type slot int

const (
	forAll      slot = iota
	forVerified      // for tokens that were verified before
	numberOfSlots
)

// caller is a caller that requests a turn.
type caller struct {
	address   string // the source of the call; "" if unknown
	namespace string // as the token claims
	verified  bool   // this token was verified before
	expected  bool   // the pod that the token claims exists
}

// The kinds of lanes. A caller waits in one lane of each kind that fits.
const (
	byVerified  = iota // verified tokens, by namespace
	byExpected         // tokens of pods that exist, by namespace
	byAddress          // all, by address
	byNamespace        // all, by claimed namespace
	numberOfKinds
)

// schedule is the order of the kinds' turns. A kind without waiting callers is skipped.
var schedule = [...]int{byVerified, byAddress, byVerified, byNamespace, byVerified, byExpected}

// waiter is a caller without a slot.
type waiter struct {
	caller
	slot   slot                         // the granted slot; set before ready
	ready  chan error                   // one value: nil with a slot, or why there is none
	lanes  [numberOfKinds]*lane         // nil: in no lane of that kind
	places [numberOfKinds]*list.Element // in that lane
}

// laneGroup contains the lanes of one kind, in the order of their turns.
type laneGroup struct {
	lanes map[string]*lane
	order list.List // of *lane
}

// lane contains the waiters of one address or namespace, in order of arrival.
type lane struct {
	key     string
	place   *list.Element // in the order of its group
	waiters list.List     // of *waiter
}

// newTurns returns turns with all slots for all callers, and verified more for tokens that were verified before.
func newTurns(all, verified int) *turns {
	t := &turns{slots: [...]int{forAll: all, forVerified: verified}}
	for kind := range t.kinds {
		t.kinds[kind].lanes = make(map[string]*lane)
	}
	return t
}

// take waits for a slot, which the caller must release. It returns ctx's error if ctx ends first. If too many callers wait, it
// returns errBusy to the one that [turns.largest] chooses.
func (t *turns) take(ctx context.Context, c caller) (slot, error) {
	t.mu.Lock()
	for s, limit := range t.slots {
		if s := slot(s); t.taken[s] < limit && (s == forAll || c.verified) {
			t.taken[s]++
			t.mu.Unlock()
			return s, nil
		}
	}
	w := &waiter{caller: c, ready: make(chan error, 1)}
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
	case err := <-w.ready: // The result arrived at the same time.
		t.mu.Unlock()
		if err == nil {
			t.release(w.slot)
		}
	default:
		t.remove(w)
		t.mu.Unlock()
	}
	return 0, ctx.Err()
}

// release passes a slot on to the waiter whose turn it is, or makes it free.
func (t *turns) release(s slot) {
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

// state returns the number of taken slots and of waiting callers.
func (t *turns) state() (taken, waiting int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.taken[forAll] + t.taken[forVerified], t.waiting
}

// next returns the waiter whose turn it is; nil if there is none. The caller holds mu.
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

// next returns the first waiter of the lane whose turn it is; nil if there is none.
func (g *laneGroup) next() *waiter {
	first := g.order.Front()
	if first == nil {
		return nil
	}
	g.order.MoveToBack(first)
	return first.Value.(*lane).waiters.Front().Value.(*waiter)
}

// add adds w to all lanes that fit. The caller holds mu.
func (t *turns) add(w *waiter) {
	t.waiting++
	if w.verified {
		t.enter(w, byVerified, w.namespace)
	}
	if w.expected {
		t.enter(w, byExpected, w.namespace)
	}
	t.enter(w, byAddress, w.address)
	t.enter(w, byNamespace, w.namespace)
}

// enter appends w to one lane, and creates the lane if there is none. The caller holds mu.
func (t *turns) enter(w *waiter, kind int, key string) {
	g := &t.kinds[kind]
	l := g.lanes[key]
	if l == nil {
		l = &lane{key: key}
		l.place = g.order.PushBack(l)
		g.lanes[key] = l
	}
	w.lanes[kind], w.places[kind] = l, l.waiters.PushBack(w)
}

// remove removes w from all its lanes. The caller holds mu.
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

// largest returns the waiter to drop when too many wait: the newest one with the largest share. A share is small if
// either the address or the namespace has few waiters. So no caller can make another caller's share large by claiming its
// namespace. A token that was verified before is dropped last. The caller holds mu.
//
// It visits all waiters, which takes about 20 µs, less than a call costs otherwise.
func (t *turns) largest() *waiter {
	var worst *waiter
	var worstShare [3]int
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
			if worst == nil || slices.Compare(share[:], worstShare[:]) >= 0 {
				worst, worstShare = w, share
			}
		}
	}
	return worst
}

// errBusy is for callers that find the queue full. Another broker may have room.
var errBusy = busy("too many tokens wait to be verified, most of them of this namespace or address; try again", nil)

// noTurn returns the error for a caller without a turn: errBusy, or an error with the caller's context error as cause.
func noTurn(err error) error {
	if errors.Is(err, errBusy) {
		return err
	}
	return busy("too many tokens wait to be verified; try again", err)
}

func busy(message string, cause error) error {
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonBrokerBusy, RetryAfter: time.Second, Message: message, Cause: cause,
	}
}
