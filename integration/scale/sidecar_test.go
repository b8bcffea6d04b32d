package scale

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/placement"
)

// The sidecars here imitate broker/client (which broker to call, and when to call the next) and sidecar (when to call
// again) in as few lines as possible. Their times are those of the originals.
const (
	callTimeout    = 10 * time.Second
	hedgeAfter     = 250 * time.Millisecond
	laterAfter     = time.Second
	reluctantAfter = 2500 * time.Millisecond
	maxHedges      = 1
	hedgePart      = 4
)

// callAfter makes a pod call after some time.
func (f *fleet) callAfter(p *pod, after time.Duration) {
	time.AfterFunc(after, func() {
		if !f.over(p) {
			f.call(p)
		}
	})
}

func (f *fleet) over(p *pod) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return p.gone || f.ctx.Err() != nil
}

// call is one call of a sidecar, which records the result and plans the next call.
func (f *fleet) call(p *pod) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(f.ctx, callTimeout)
	response, attempts, err := f.attempts(ctx, p)
	cancel()
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.results.attempts += attempts
	if p.gone || f.ctx.Err() != nil {
		return
	}
	r := &f.results
	r.calls++
	if !p.ends.IsZero() && !now.Before(p.ends) {
		r.without++
	}
	r.longest = max(r.longest, now.Sub(began))
	if err != nil {
		if r.failed++; r.failure == nil {
			r.failure = err
		}
		p.failures++
		f.callAfter(p, min(time.Second<<min(p.failures, 5), 30*time.Second))
		return
	}
	p.ends, p.failures = response.GetExpiration().AsTime(), 0
	r.least = min(r.least, float64(p.ends.Sub(now))/float64(f.duration))
	f.callAfter(p, response.GetRefreshAfter().AsDuration())
}

type attempt struct {
	at       netip.Addr
	response *brokerpb.GetCredentialsResponse
	err      error
}

// attempts calls brokers in their rank: the next one if a broker fails, or does not respond for too long. It returns the
// number of brokers that it called.
func (f *fleet) attempts(ctx context.Context, p *pod) (_ *brokerpb.GetCredentialsResponse, count int, _ error) {
	f.mu.RLock()
	ranked := placement.Rank(p.routing, f.resolvers[p.node].addresses)
	f.mu.RUnlock()
	results := make(chan attempt, len(ranked))
	timer := time.NewTimer(hedgeAfter)
	defer timer.Stop()
	limit := len(ranked)
	open := make(map[netip.Addr]bool) // :: called broker → whether it accepted the call
	next := func() {
		if count == limit {
			return
		}
		at := ranked[count]
		f.mu.RLock()
		b := f.instances[at]
		open[at] = b.how == responds || b.how == slow
		f.mu.RUnlock()
		count++
		go func() {
			response, err := b.get(ctx, p.key)
			results <- attempt{at, response, err}
		}()
	}
	var patience time.Duration
	hedged, reluctant, limited := false, false, false
	listen := func() {
		patience, reluctant = hedgeAfter, false
		if count > 1 {
			patience = laterAfter
		}
		timer.Reset(patience)
	}
	next()
	last := unavailable("there is no broker")
	for len(open) > 0 {
		select {
		case a := <-results:
			if a.err == nil || !errors.Is(a.err, credential.ErrUnavailable) {
				if !hedged {
					p.spent = max(p.spent-1, 0)
				}
				return a.response, count, a.err
			}
			delete(open, a.at)
			last = a.err
			switch reason := credential.ReasonOf(a.err); {
			case reason == credential.ReasonSTSThrottled:
				limit = max(count, min(limit, placement.Owners))
			case slices.Contains(shared, reason) && !limited:
				limited = true
				more := 0
				if len(ranked) > placement.Owners && p.hedge() {
					hedged, more = true, 1
				}
				limit = max(count, min(limit, placement.Owners+more))
			}
			next()
			listen()
		case <-timer.C:
			second := count < placement.Owners
			if !second && slices.Contains(slices.Collect(maps.Values(open)), true) {
				continue
			}
			if !reluctant && second && !p.hedge() {
				reluctant = true
				timer.Reset(reluctantAfter - patience)
				continue
			}
			hedged = hedged || second
			next()
			listen()
		case <-ctx.Done():
			return nil, count, unavailable("no response in time")
		}
	}
	return nil, count, last
}

// hedge takes a hedge from the pod's budget, if there is one.
func (p *pod) hedge() bool {
	if p.spent > (maxHedges-1)*hedgePart {
		return false
	}
	p.spent += hedgePart
	return true
}

// shared are reasons for which all brokers but the owners would probably fail too.
var shared = []credential.Reason{
	credential.ReasonSTSThrottled, credential.ReasonSTSUnavailable, credential.ReasonBrokerCredentials, credential.ReasonAPIServerUnavailable,
}
