package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/placement"
)

const (
	// maxAddresses limits how many addresses of a DNS response are kept. The largest cluster needs fewer brokers.
	maxAddresses = 64
	// maxLookup limits a look-up, which may outlive its call. Go's resolver repeats a query without response after 5 s, so
	// three search domains can take 15 s.
	maxLookup = 30 * time.Second
	// maxFullName is the part of maxLookup after which the next name is looked up. A query for a full name with a wrong
	// domain leaves the cluster. A server there may respond with an error, or not at all.
	maxFullName = maxLookup / 2
	// knownAfter is how long a call waits for a look-up if it knows addresses of an earlier one.
	knownAfter = 3 * time.Second
	// unusedFor is how long the result of a look-up counts as current if no call waited for it. It covers the pause
	// between two calls of a starting pod.
	unusedFor = 30 * time.Second
	// ipv6After is how long the A query may take before AAAA is queried too. A cluster's DNS responds within milliseconds.
	ipv6After = 300 * time.Millisecond
	// graceAfter is how long the A query may still take after AAAA records have arrived.
	graceAfter = time.Second
	// repeatAfter is how long both queries may take before they are sent again, because a packet may be lost. The pauses
	// after that are 1, 2, 4 and 8 s. A resolver that responds in 1.1 s is not queried twice.
	repeatAfter = 2 * time.Second
)

// addresses looks up the brokers' addresses.
type addresses struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu      sync.Mutex // guards what follows
	names   []string   // of the brokers: the next one is looked up if one does not exist
	last    []netip.Addr
	pending *pendingLookup // nil if none runs
	foundAt time.Time      // when a look-up found last; zero if a call has used it
}

// pendingLookup is one look-up, for which several calls may wait. found and err are set when done is closed.
type pendingLookup struct {
	done    chan struct{}
	waiting int // number of calls; guarded by addresses.mu
	found   []netip.Addr
	err     error
}

// find returns at least one address. The addresses are current if a look-up has just found them. If DNS does not respond,
// find returns the result of the last successful look-up, because brokers can be called without DNS. If a look-up takes
// longer than the call, it continues, and the next call uses its result.
func (a *addresses) find(ctx context.Context) (found []netip.Addr, current bool, err error) {
	a.mu.Lock()
	if literal, err := netip.ParseAddr(a.names[0]); err == nil {
		a.mu.Unlock()
		return []netip.Addr{literal}, true, nil
	}
	previous := a.last
	if !a.foundAt.IsZero() && time.Since(a.foundAt) < unusedFor {
		a.foundAt = time.Time{}
		a.mu.Unlock()
		return previous, false, nil
	}
	name, p := a.names[0], a.pending
	if p == nil {
		p = &pendingLookup{done: make(chan struct{})}
		a.pending = p
		go a.runLookup(context.WithoutCancel(ctx), p)
	}
	p.waiting++
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		p.waiting--
		a.mu.Unlock()
	}()

	var timeout <-chan time.Time
	if len(previous) > 0 {
		timer := time.NewTimer(knownAfter)
		defer timer.Stop()
		timeout = timer.C
	}
	err = errors.New("no response in time")
	select {
	case <-p.done:
		if p.err == nil {
			return p.found, true, nil
		}
		err = p.err
	case <-timeout:
	case <-ctx.Done():
	}
	if len(previous) > 0 {
		return previous, false, nil
	}
	return nil, false, unreachable(fmt.Errorf("DNS has no address for the broker's host %s: %w", name, err))
}

// runLookup looks the brokers up, and publishes the result in p.
func (a *addresses) runLookup(ctx context.Context, p *pendingLookup) {
	ctx, cancel := context.WithTimeout(ctx, maxLookup)
	defer cancel()
	a.mu.Lock()
	names := a.names
	a.mu.Unlock()
	var (
		found []netip.Addr
		err   error
	)
	for at, name := range names {
		limit := maxLookup
		if at < len(names)-1 {
			limit = maxFullName
		}
		var failure error
		if found, failure = a.lookupName(ctx, name, limit); failure == nil {
			names, err = names[:at+1], nil
			break
		}
		if err == nil || isNotFound(err) {
			err = failure // All names but one are expected not to exist, so another error is more useful.
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pending = nil
	p.found, p.err = found, err
	if err == nil {
		a.last = found
		a.names = names // The names after this one are not needed, even if this one disappears for a while.
		if p.waiting == 0 {
			a.foundAt = time.Now()
		}
	}
	close(p.done)
}

// family has the records of one address family of a name.
type family struct {
	network  string // "ip4" or "ip6", as in [net.Resolver.LookupNetIP]
	inFlight int    // running queries
	started  bool
	found    []netip.Addr
	err      error // of the last query that found no address; final if it is a not-found error
}

// failed reports whether no query of the family can find an address any more.
func (f *family) failed() bool {
	return isNotFound(f.err) || f.started && f.inFlight == 0 && f.err != nil
}

// lookupName looks one name up, for at most limit. It returns the A records as soon as they arrive, and otherwise the
// AAAA records. It does not use LookupNetIP for both families, which waits for both responses and fails if one is missing
// (golang/go#43398).
func (a *addresses) lookupName(ctx context.Context, name string, limit time.Duration) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	type response struct {
		family *family
		found  []netip.Addr
		err    error
	}
	v4, v6 := &family{network: "ip4"}, &family{network: "ip6"}
	responses := make(chan response)
	start := func(f *family) {
		f.started = true
		f.inFlight++
		go func() {
			found, err := a.lookup(ctx, f.network, name)
			found = normalize(found)
			if err == nil && len(found) == 0 {
				err = &net.DNSError{Err: "no such record", Name: name, IsNotFound: true}
			}
			select {
			case responses <- response{f, found, err}:
			case <-ctx.Done():
			}
		}()
	}
	start(v4)
	var (
		second, repeat = time.NewTimer(ipv6After), time.NewTimer(repeatAfter)
		grace          <-chan time.Time
		pause          = repeatAfter / 2
	)
	defer second.Stop()
	defer repeat.Stop()
	for {
		select {
		case r := <-responses:
			r.family.inFlight--
			if r.err == nil {
				r.family.found = r.found
			} else if !isNotFound(r.family.err) {
				r.family.err = r.err
			}
		case <-second.C:
			if !v6.started {
				start(v6)
			}
		case <-repeat.C:
			for _, f := range []*family{v4, v6} {
				if f.started && f.found == nil && !isNotFound(f.err) {
					start(f)
				}
			}
			repeat.Reset(pause)
			pause *= 2
		case <-grace:
			return v6.found, nil
		case <-ctx.Done():
			return nil, cmp.Or(v4.err, v6.err, ctx.Err())
		}
		switch {
		case v4.found != nil:
			return v4.found, nil
		case v4.failed() && !v6.started:
			start(v6)
		case v4.failed() && v6.found != nil:
			return v6.found, nil
		case v4.failed() && v6.failed():
			if isNotFound(v4.err) {
				return nil, v6.err // Either the name does not exist, or this is why that is unknown.
			}
			return nil, v4.err
		case v6.found != nil && grace == nil:
			timer := time.NewTimer(graceAfter)
			defer timer.Stop()
			grace = timer.C
		}
	}
}

// isNotFound reports whether err says that a name has no such record. err may be nil.
func isNotFound(err error) bool {
	e, ok := errors.AsType[*net.DNSError](err)
	return ok && e.IsNotFound
}

// lookup uses Go's resolver. One [net.Resolver] merges look-ups of the same name, so it would not send a lost query again.
// So each look-up has its own resolver.
func lookup(ctx context.Context, network, host string) ([]netip.Addr, error) {
	return new(net.Resolver).LookupNetIP(ctx, network, host)
}

// normalize returns the addresses of a DNS response in a fixed form, whatever their order. All sidecars and brokers must
// compute the same owners of a key. If there are IPv4 addresses, normalize drops IPv6: a broker with two addresses could
// own a key with one of them, and be called twice.
func normalize(found []netip.Addr) []netip.Addr {
	var all []netip.Addr
	for _, a := range found {
		all = append(all, a.Unmap())
	}
	if slices.ContainsFunc(all, netip.Addr.Is4) {
		all = slices.DeleteFunc(all, netip.Addr.Is6)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	all = slices.Compact(all)
	return slices.Clip(all[:min(len(all), maxAddresses)])
}

// order returns the addresses in the order in which to call them.
func (c *Client) order(found []netip.Addr) []netip.Addr {
	if c.key != "" {
		return placement.Rank(string(c.key), found)
	}
	shuffled := slices.Clone(found)
	rand.Shuffle(len(shuffled), func(i, j int) { //nolint:gosec // G404: spreads load, guards nothing
		shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
	})
	return shuffled
}
