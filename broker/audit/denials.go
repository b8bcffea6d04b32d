package audit

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/credential"
)

// Window is how often repeated denials are written: one line then stands for all that came in between.
const Window = 10 * time.Second

// Bounds of the denials that are counted.
const (
	// OtherPeers is the peer of the line that counts unauthenticated callers beyond maxPeers.
	OtherPeers = "other peers"
	// maxPeers is how many pairs of address and reason are told apart among unauthenticated callers. Each costs two lines
	// in a Window at most, of some 300 bytes: together 15 kB/s. So 50 MB of history last an hour, from however many
	// addresses calls come. The reasons of OtherPeers come on top; they are few and not the caller's choice.
	maxPeers = 256
	// podLines is how many denials of one pod and reason have a line of their own in a Window. A sidecar retries after 30 s;
	// only a program that calls the broker itself with the pod's token reaches this.
	podLines = 10
	// maxPods is how many pairs of pod and reason are counted so: 4 MB if every one repeats the longest message. A pod
	// beyond that has all its lines.
	maxPods = 1024
)

// source is who was denied, and why.
type source struct {
	who    string // the peer's address, or its /64; the UID of a verified pod
	pod    bool
	reason credential.Reason
}

// sourceOf returns the source of a denial. A caller whose token was not verified is known by its address alone: the
// port is its own choice, and so are the last 64 bits of an IPv6 address (RFC 4291, 2.5.1).
func sourceOf(e Entry) source {
	if e.PodUID != "" {
		return source{who: e.PodUID, pod: true, reason: e.Reason}
	}
	return source{who: network(e.Peer), reason: e.Reason}
}

// network is the address of peer without its port, or the /64 of an IPv6 address.
func network(peer string) string {
	p, err := netip.ParseAddrPort(peer)
	if err != nil {
		return peer // no TCP address, as in tests
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

// denials counts denials by source, so that a caller who repeats itself takes lines by the clock and not by the call.
// A denial that is counted is never lost. Its methods may be called concurrently.
type denials struct {
	mu      sync.Mutex
	sources map[source]*repeated // guarded by mu
	peers   int                  // sources that are no pod, without OtherPeers; guarded by mu
	pods    int                  // guarded by mu
}

// repeated is what one source did in the present window.
type repeated struct {
	lines int       // that it has had
	count int       // further denials, which have none
	since time.Time // of the first further denial
	last  Entry     // of the last further denial
}

func newDenials() *denials { return &denials{sources: make(map[source]*repeated)} }

// record has write queue the entry, unless its source has had its lines in this window or write has no room for it:
// then the entry is counted. It reports false if there is no room to count it either, which only pods beyond maxPods meet.
func (d *denials) record(e Entry, write func(Entry) bool) (recorded bool) {
	key := sourceOf(e)
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.sources[key]
	if r == nil && !key.pod && d.peers >= maxPeers {
		key.who, e.Peer = OtherPeers, OtherPeers
		r = d.sources[key]
	}
	allowed := 1
	switch {
	case key.pod:
		allowed = podLines
	case key.who == OtherPeers:
		allowed = 0 // A line of its own would name nobody.
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
	d.number(key, +1)
}

// number counts a source in or out. The caller holds mu.
func (d *denials) number(key source, n int) {
	switch {
	case key.pod:
		d.pods += n
	case key.who != OtherPeers:
		d.peers += n
	}
}

// end ends the window: it returns a line for each source with denials that have none, and forgets the others.
// A source that continues has no line of its own in the next window.
func (d *denials) end() (lines []Entry) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, r := range d.sources {
		if r.count == 0 {
			d.number(key, -1)
			delete(d.sources, key)
			continue
		}
		e := r.last
		e.Count, e.Since = r.count, r.since
		if !key.pod {
			e.Peer = key.who
		}
		if key.who == OtherPeers {
			e.Message = "" // It may quote one of many.
		}
		lines = append(lines, e)
		*r = repeated{lines: r.lines}
	}
	slices.SortFunc(lines, func(a, b Entry) int { return a.Since.Compare(b.Since) })
	return lines
}
