package client

import (
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
	// lookupTimeout is shorter than the 5 s after which Go's resolver asks again, since there is something
	// better to do by then: to ask the brokers of the last call.
	lookupTimeout = 3 * time.Second
)

// addresses are those of the brokers.
type addresses struct {
	host   string
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	mu   sync.Mutex
	last []netip.Addr // of the last look-up that found any; guarded by mu, never changed in place
}

func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}

// find returns the addresses, at least one. They are current if they were looked up now: a DNS that is away is no
// reason not to ask brokers that are there.
func (a *addresses) find(ctx context.Context) (found []netip.Addr, current bool, err error) {
	if literal, err := netip.ParseAddr(a.host); err == nil {
		return []netip.Addr{literal}, true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	found, err = a.lookup(ctx, a.host)
	found = usable(found)
	if err == nil && len(found) == 0 {
		err = errors.New("there is none")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		a.last = found
		return found, true, nil
	}
	if len(a.last) > 0 {
		return a.last, false, nil
	}
	return nil, false, unreachable(fmt.Errorf("DNS gave no address of the broker's host %s: %w", a.host, err))
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
