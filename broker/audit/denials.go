package audit

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// denialWindow is the window in which repeated denials are counted. At its end, one line stands for all of them.
const denialWindow = 10 * time.Second

// Limits of the denials that are counted.
const (
	// otherPeers is the peer of the line that counts unauthenticated callers beyond maxPeers.
	otherPeers = "other peers"
	// maxPeers is how many pairs of address and reason are counted separately among unauthenticated callers. Each takes at
	// most two lines per window, of some 300 bytes: 15 kB/s in all. So 50 MB of history last an hour, however many
	// addresses call. The reasons of otherPeers are few, and the caller does not choose them.
	maxPeers = 256
	// podLines is how many denials of one pod and reason have their own line per window. A sidecar retries after 30 s, so
	// only a program that calls the broker itself with the pod's token reaches this limit.
	podLines = 10
	// maxPods is how many pairs of pod and reason are counted: 4 MB if each repeats the longest message. Each denial of
	// further pods has its own line.
	maxPods = 1024
)

// source is the caller that was denied, and the reason.
type source struct {
	caller string // the peer's address, or its /64; the UID of a verified pod
	pod    bool
	reason credential.Reason
}

// sourceOf returns the source of a denial. A caller whose token was not verified is known by its address alone. It can
// choose its port freely, and the last 64 bits of an IPv6 address (RFC 4291, 2.5.1).
func sourceOf(e Entry) source {
	if e.PodUID != "" {
		return source{caller: e.PodUID, pod: true, reason: e.Reason}
	}
	return source{caller: network(e.Peer), reason: e.Reason}
}

// network returns the address of peer without its port, or the /64 of an IPv6 address.
func network(peer string) string {
	p, err := netip.ParseAddrPort(peer)
	if err != nil {
		return peer // not a TCP address, as in tests
	}
	addr := p.Addr().Unmap().WithZone("")
	if addr.Is4() {
		return addr.String()
	}
	prefix, err := addr.Prefix(64)
	if err != nil {
		return peer
	}
	return prefix.String()
}

// denials counts denials by source, so that a caller that repeats itself takes lines by time and not by call. A counted
// denial is never lost. Its methods are safe for concurrent use.
type denials struct {
	mu      sync.Mutex
	sources map[source]*repeated // guarded by mu
	peers   int                  // sources that are no pods, without otherPeers; guarded by mu
	pods    int                  // guarded by mu
}

// repeated counts the denials of one source in the current window.
type repeated struct {
	lines int       // written for it
	count int       // further denials, without a line
	since time.Time // of the first further denial
	last  Entry     // of the last further denial
}

func newDenials() *denials { return &denials{sources: make(map[source]*repeated)} }

// record lets write queue the entry, unless its source has had its lines in this window or write has no space. Then the
// entry is counted. It reports false if it cannot be counted either, which happens only to pods beyond maxPods.
func (d *denials) record(e Entry, write func(Entry) bool) (recorded bool) {
	key := sourceOf(e)
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.sources[key]
	if r == nil && !key.pod && d.peers >= maxPeers {
		key.caller, e.Peer = otherPeers, otherPeers
		r = d.sources[key]
	}
	allowed := 1
	switch {
	case key.pod:
		allowed = podLines
	case key.caller == otherPeers:
		allowed = 0 // A line of its own would name no caller.
	}
	if r == nil {
		if key.pod && d.pods >= maxPods {
			return write(e)
		}
		r = new(repeated)
		d.add(key, r)
	}
	if r.lines < allowed && write(e) {
		r.lines++
		return true
	}
	if r.count == 0 {
		r.since = e.Time
	}
	r.count++
	r.last = e
	return true
}

func (d *denials) add(key source, r *repeated) {
	d.sources[key] = r
	d.countSource(key, +1)
}

// countSource counts a source in or out. The caller holds mu.
func (d *denials) countSource(key source, n int) {
	switch {
	case key.pod:
		d.pods += n
	case key.caller != otherPeers:
		d.peers += n
	}
}

// end ends the window. It returns a line for each source with counted denials, and forgets the other sources. A source
// that continues gets no line of its own in the next window.
func (d *denials) end() (lines []Entry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, r := range d.sources {
		if r.count == 0 {
			d.countSource(key, -1)
			delete(d.sources, key)
			continue
		}
		e := r.last
		e.Count, e.Since = r.count, r.since
		if !key.pod {
			e.Peer = key.caller
		}
		if key.caller == otherPeers {
			e.Message = "" // It may quote one of many callers.
		}
		lines = append(lines, e)
		*r = repeated{lines: r.lines}
	}
	slices.SortFunc(lines, func(a, b Entry) int { return a.Since.Compare(b.Since) })
	return lines
}
