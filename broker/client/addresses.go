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
	// maxAddresses bounds what is taken of an answer, which is kept: more brokers than the largest cluster
	// has use for.
	maxAddresses = 64
	// maxLookup bounds a look-up, which may outlive the call that began it. Go's resolver sends a query that got no
	// answer again after 5 s, and three search domains then take it 15 s.
	maxLookup = 30 * time.Second
	// maxFullName is the part of maxLookup after which the next name is looked up. A query for a full name with a wrong
	// domain leaves the cluster, and a server there may respond with an error or not at all.
	maxFullName = maxLookup / 2
	// knownAfter is how long a call waits for a look-up if it knows the addresses of an earlier one.
	knownAfter = 3 * time.Second
	// unusedFor is how long the result of a look-up that no call waited for counts as current. It covers the pause
	// between two calls of a pod that starts.
	unusedFor = 30 * time.Second
	// familyAfter is how long the A record may take before AAAA is looked up as well. A cluster's DNS answers within
	// milliseconds.
	familyAfter = 300 * time.Millisecond
	// graceAfter is how long the A record may take once AAAA is there.
	graceAfter = time.Second
	// againAfter is how long both may take before they are looked up again, because a query or its answer was lost. The
	// pauses after that are 1, 2, 4 and 8 s. A resolver that takes 1.1 s per answer is not asked twice.
	againAfter = 2 * time.Second
)

// addresses finds the brokers' addresses.
type addresses struct {
	lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)

	mu      sync.Mutex // guards what follows
	names   []string   // of the brokers, in the order in which they are looked up: the next one if one does not exist
	last    []netip.Addr
	flight  *flight   // the look-up under way, nil without one
	foundAt time.Time // when last was found, if no call has used it since
}

// flight is one look-up, which several calls may wait for. found and err are set once done is closed.
type flight struct {
	done    chan struct{}
	waiting int // calls; guarded by the mu of its addresses
	found   []netip.Addr
	err     error
}

// find returns the addresses, at least one. They are current if a look-up has just found them. If DNS does not answer,
// find returns those of the last look-up that found any: brokers can be called without DNS. A look-up that takes longer
// than the call continues, and its result serves the next call.
func (a *addresses) find(ctx context.Context) (found []netip.Addr, current bool, err error) {
	a.mu.Lock()
	if literal, err := netip.ParseAddr(a.names[0]); err == nil {
		a.mu.Unlock()
		return []netip.Addr{literal}, true, nil
	}
	known := a.last
	if !a.foundAt.IsZero() && time.Since(a.foundAt) < unusedFor {
		a.foundAt = time.Time{}
		a.mu.Unlock()
		return known, false, nil
	}
	name, f := a.names[0], a.flight
	if f == nil {
		f = &flight{done: make(chan struct{})}
		a.flight = f
		go a.fly(context.WithoutCancel(ctx), f)
	}
	f.waiting++
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		f.waiting--
		a.mu.Unlock()
	}()

	var patience <-chan time.Time
	if len(known) > 0 {
		timer := time.NewTimer(knownAfter)
		defer timer.Stop()
		patience = timer.C
	}
	err = errors.New("no answer in time")
	select {
	case <-f.done:
		if f.err == nil {
			return f.found, true, nil
		}
		err = f.err
	case <-patience:
	case <-ctx.Done():
	}
	if len(known) > 0 {
		return known, false, nil
	}
	return nil, false, unreachable(fmt.Errorf("DNS gave no address of the broker's host %s: %w", name, err))
}

// fly looks the brokers up, and publishes the result.
func (a *addresses) fly(ctx context.Context, f *flight) {
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
		var failed error
		if found, failed = a.race(ctx, name, limit); failed == nil {
			names, err = names[:at+1], nil
			break
		}
		if err == nil || isNotFound(err) {
			err = failed // The one that tells more: that a name does not exist is expected of all but one.
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.flight = nil
	f.found, f.err = found, err
	if err == nil {
		a.last = found
		a.names = names // If this one is gone for a while, the ones behind it are not needed.
		if f.waiting == 0 {
			a.foundAt = time.Now()
		}
	}
	close(f.done)
}

// family holds the known records of one type of a name.
type family struct {
	network string // as [net.Resolver.LookupNetIP] has it
	open    int    // look-ups under way
	asked   bool
	found   []netip.Addr
	err     error // of the last look-up that ended without an address; it is final if no such record exists
}

// ended reports whether no look-up of the family can bring an address any more.
func (f *family) ended() bool { return isNotFound(f.err) || f.asked && f.open == 0 && f.err != nil }

// race looks one name up, for as long as limit. It returns the addresses of the A record as soon as it is there, and otherwise those of AAAA.
// It does not use LookupNetIP of both families at once, which waits for both answers, and fails if one is missing
// (golang/go#43398).
func (a *addresses) race(ctx context.Context, name string, limit time.Duration) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	type answer struct {
		of    *family
		found []netip.Addr
		err   error
	}
	v4, v6 := &family{network: "ip4"}, &family{network: "ip6"}
	answers := make(chan answer)
	ask := func(f *family) {
		f.asked = true
		f.open++
		go func() {
			found, err := a.lookup(ctx, f.network, name)
			found = usable(found)
			if err == nil && len(found) == 0 {
				err = &net.DNSError{Err: "there is none", Name: name, IsNotFound: true}
			}
			select {
			case answers <- answer{f, found, err}:
			case <-ctx.Done():
			}
		}()
	}
	ask(v4)
	var (
		second, again = time.NewTimer(familyAfter), time.NewTimer(againAfter)
		grace         <-chan time.Time
		pause         = againAfter / 2
	)
	defer second.Stop()
	defer again.Stop()
	for {
		select {
		case got := <-answers:
			got.of.open--
			if got.err == nil {
				got.of.found = got.found
			} else if !isNotFound(got.of.err) {
				got.of.err = got.err
			}
		case <-second.C:
			if !v6.asked {
				ask(v6)
			}
		case <-again.C:
			for _, f := range []*family{v4, v6} {
				if f.asked && f.found == nil && !isNotFound(f.err) {
					ask(f)
				}
			}
			again.Reset(pause)
			pause *= 2
		case <-grace:
			return v6.found, nil
		case <-ctx.Done():
			return nil, cmp.Or(v4.err, v6.err, ctx.Err())
		}
		switch {
		case v4.found != nil:
			return v4.found, nil
		case v4.ended() && !v6.asked:
			ask(v6)
		case v4.ended() && v6.found != nil:
			return v6.found, nil
		case v4.ended() && v6.ended():
			if isNotFound(v4.err) {
				return nil, v6.err // Not found, or why that is not certain.
			}
			return nil, v4.err
		case v6.found != nil && grace == nil:
			timer := time.NewTimer(graceAfter)
			defer timer.Stop()
			grace = timer.C
		}
	}
}

// isNotFound reports whether err says that a name has no such record. It is nil safe.
func isNotFound(err error) bool {
	e, ok := errors.AsType[*net.DNSError](err)
	return ok && e.IsNotFound
}

// lookup asks Go's resolver. One [net.Resolver] joins look-ups of the same name, so that a query that got lost would not
// be sent again: each look-up has its own.
func lookup(ctx context.Context, network, host string) ([]netip.Addr, error) {
	return new(net.Resolver).LookupNetIP(ctx, network, host)
}

// usable makes one set of what DNS said, the same in every sidecar and broker whatever the order: the owners of
// a key must not depend on who asked. Two families would be two addresses of one broker, which may own
// a key by one of them and be asked for it twice.
func usable(found []netip.Addr) []netip.Addr {
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

// order returns the addresses in the order in which to ask them.
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
