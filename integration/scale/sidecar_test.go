package scale

import (
	"container/heap"
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
)

// The sidecars of this file imitate broker/client (whom to ask, and when to turn to the next) and sidecar (when to ask
// again) in as few lines as that takes. Their times are those of the originals.
const (
	callTimeout    = 10 * time.Second
	hedgeAfter     = 250 * time.Millisecond
	laterAfter     = time.Second
	reluctantAfter = 2500 * time.Millisecond
	maxHedges      = 1
	hedgePart      = 4
)

// pod is an injected pod with its sidecar.
type pod struct {
	policy.Pod

	key     string
	spec    int
	node    int
	routing string
	gone    bool // guarded by fleet.mu

	// Used by the one call that is under way.
	ends     time.Time // of the session that it holds
	failures int       // in a row
	spent    int       // of its budget of hedges
	next     time.Time // when it asks again; guarded by fleet.mu while it is in fleet.due
}

// dueHeap orders pods by when they ask again. A pod is in it unless its call is under way.
type dueHeap []*pod

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].next.Before(h[j].next) }
func (h dueHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *dueHeap) Push(x any)        { *h = append(*h, x.(*pod)) }
func (h *dueHeap) Pop() any {
	old := *h
	last := len(old) - 1
	p := old[last]
	old[last] = nil
	*h = old[:last]
	return p
}

// asking lets pods ask until the fleet ends. A goroutine for each call is cheap; one for each pod would not be.
func (f *fleet) asking() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		f.mu.Lock()
		now, wait := time.Now(), time.Hour
		for len(f.due) > 0 {
			if wait = f.due[0].next.Sub(now); wait > 0 {
				break
			}
			p := heap.Pop(&f.due).(*pod)
			if !p.gone {
				f.running.Go(func() { f.ask(p) })
			}
			wait = time.Hour
		}
		f.mu.Unlock()
		timer.Reset(wait)
		select {
		case <-f.ctx.Done():
			return
		case <-f.wake:
		case <-timer.C:
		}
	}
}

// asksAt has the pod ask at a time.
func (f *fleet) asksAt(p *pod, at time.Time) {
	f.mu.Lock()
	p.next = at
	heap.Push(&f.due, p)
	first := f.due[0] == p
	f.mu.Unlock()
	if first {
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
}

// ask is one call of a sidecar, and what it makes of the answer.
func (f *fleet) ask(p *pod) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(f.ctx, callTimeout)
	answer, err := f.attempts(ctx, p)
	cancel()
	now := time.Now()
	f.mu.Lock()
	gone := p.gone
	f.mu.Unlock()
	if f.ctx.Err() != nil || gone {
		return
	}
	held := !p.ends.IsZero()
	if err != nil {
		p.failures++
		f.told(told{failed: true, without: held && !now.Before(p.ends), waited: now.Sub(began), err: err})
		f.asksAt(p, now.Add(min(time.Second<<min(p.failures, 5), 30*time.Second)))
		return
	}
	ends := answer.GetExpiration().AsTime()
	f.told(told{
		without: held && !now.Before(p.ends), waited: now.Sub(began), first: !held,
		left: float64(ends.Sub(now)) / float64(f.life),
	})
	p.ends, p.failures = ends, 0
	f.asksAt(p, now.Add(answer.GetRefreshAfter().AsDuration()))
}

type attempt struct {
	at     netip.Addr
	answer *brokerpb.GetCredentialsResponse
	err    error
}

// attempts asks brokers in their rank: the next one when one fails, or is silent for too long.
func (f *fleet) attempts(ctx context.Context, p *pod) (*brokerpb.GetCredentialsResponse, error) {
	ranked := placement.Rank(p.routing, f.resolve(p.node))
	if len(ranked) == 0 {
		return nil, credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "there is no broker")
	}
	came := make(chan attempt, len(ranked))
	silence := time.NewTimer(hedgeAfter)
	defer silence.Stop()
	count, most := 0, len(ranked)
	open := make(map[netip.Addr]bool) // :: who is silent → whether it has taken the call
	next := func() {
		if count == most {
			return
		}
		at := ranked[count]
		b := f.at(at)
		count++
		open[at] = b.how() == answers || b.how() == slow
		f.attempted()
		f.running.Go(func() {
			answer, err := b.get(ctx, p.key)
			came <- attempt{at, answer, err}
		})
	}
	var patience time.Duration
	hedged, reluctant := false, false
	listen := func() {
		patience, reluctant = hedgeAfter, false
		if count > 1 {
			patience = laterAfter
		}
		silence.Reset(patience)
	}
	next()
	var last error
	limited := false
	for len(open) > 0 {
		select {
		case a := <-came:
			if a.err == nil || !errors.Is(a.err, credential.ErrUnavailable) {
				if !hedged {
					p.spent = max(p.spent-1, 0)
				}
				return a.answer, a.err
			}
			delete(open, a.at)
			last = a.err
			switch reason := credential.ReasonOf(a.err); {
			case reason == credential.ReasonSTSThrottled:
				most = max(count, min(most, placement.Owners))
			case slices.Contains(shared, reason) && !limited:
				limited = true
				more := 0
				if len(ranked) > placement.Owners && p.hedge() {
					hedged, more = true, 1
				}
				most = max(count, min(most, placement.Owners+more))
			}
			next()
			listen()
		case <-silence.C:
			second := count < placement.Owners
			if !second && slices.Contains(slices.Collect(maps.Values(open)), true) {
				continue
			}
			if !reluctant && second && !p.hedge() {
				reluctant = true
				silence.Reset(reluctantAfter - patience)
				continue
			}
			hedged = hedged || second
			next()
			listen()
		case <-ctx.Done():
			return nil, credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "no answer in time")
		}
	}
	return nil, last
}

// attempted counts one broker asked.
func (f *fleet) attempted() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers.attempts++
}

// hedge takes a hedge of the pod's budget, if there is one.
func (p *pod) hedge() bool {
	if p.spent > (maxHedges-1)*hedgePart {
		return false
	}
	p.spent += hedgePart
	return true
}

// shared are reasons for which all but the owners are likely to fail alike.
var shared = []credential.Reason{
	credential.ReasonSTSThrottled, credential.ReasonSTSUnavailable, credential.ReasonBaseCredential, credential.ReasonAPIServerAway,
}
