package scale

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/credence-iam/credence/broker/placement"
)

// How long news of brokers takes.
const (
	// published is how often changes of endpoints are written: those of a moment together.
	published = time.Second
	// A watch is told within seconds. A node's DNS has an answer for 5 s more, which is CoreDNS's time to live.
	leastDelay = time.Second
	watchDelay = 3 * time.Second
	dnsDelay   = 8 * time.Second
)

// state is what Kubernetes knows of a broker's pod.
type state int

const (
	starting state = iota
	ready
	unready // lost, and not answering its probes
	ending
)

// news is what there was of brokers at one time.
type news struct {
	version int
	states  map[netip.Addr]state
}

// members is what a broker makes of it, as package kube does.
func (n news) members(self netip.Addr) placement.Members {
	m := placement.Members{Self: self}
	for a, s := range n.states {
		switch s {
		case ready:
			m.Ready = append(m.Ready, a)
		case starting, unready:
			m.Starting = append(m.Starting, a)
		case ending:
			m.Ending = m.Ending || a == self
		}
	}
	return m
}

// resolver is the DNS of one node of the cluster.
type resolver struct {
	version   int          // guarded by fleet.mu
	addresses []netip.Addr // guarded by fleet.mu
}

// setState changes what Kubernetes knows of a broker; known false: the broker is gone. It is told with the next
// publication.
func (f *fleet) setState(a netip.Addr, s state, known bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if known {
		f.states[a] = s
	} else {
		delete(f.states, a)
	}
	if !f.publishing {
		f.publishing = true
		time.AfterFunc(published, f.publish)
	}
}

// latest is the news as the API server would tell it now.
func (f *fleet) latest() news {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.news
}

// publish tells brokers and the DNS of nodes, each after a while.
func (f *fleet) publish() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.publishing = false
	states := make(map[netip.Addr]state, len(f.states))
	var addresses []netip.Addr
	for a, s := range f.states {
		states[a] = s
		if s == ready {
			addresses = append(addresses, a)
		}
	}
	f.news = news{f.news.version + 1, states}
	n := f.news
	for _, b := range f.instances {
		time.AfterFunc(within(leastDelay, watchDelay), func() { b.hear(n) })
	}
	for i := range f.resolvers {
		time.AfterFunc(within(leastDelay, dnsDelay), func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if r := &f.resolvers[i]; r.version < n.version {
				r.version, r.addresses = n.version, addresses
			}
		})
	}
}

func (f *fleet) resolve(node int) []netip.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.resolvers[node].addresses
}

// within returns a random time.
func within(least, most time.Duration) time.Duration {
	if most <= least {
		return least
	}
	return least + rand.N(most-least)
}
