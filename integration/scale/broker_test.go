package scale

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	// begins is how long a broker's pod is listed before its program has listed all pods.
	begins = 2 * time.Second
	// probes is the period of the chart's readiness probe, and warmTime how long the program waits for its sessions.
	probes   = 2 * time.Second
	warmTime = 30 * time.Second
	// lingers is the chart's preStop pause, after which the broker accepts no call. Its pod ends after leaves.
	lingers = 5 * time.Second
	leaves  = 2 * time.Second
	// noticed is when a lost node becomes not ready: its last heartbeat is up to 10 s old, and Kubernetes waits 50 s.
	noticed = 45 * time.Second
	// evicted is when the pods of a lost node are replaced: they tolerate the loss for 300 s.
	evicted = noticed + 5*time.Minute
	// restarts is how long the kubelet takes to restart a program after its first crash.
	restarts = 2 * time.Second
	// maxGrants is the program's default.
	maxGrants = 500
	// slowness is how long a slow broker takes for a response: longer than sidecars wait before they hedge.
	slowness = 400 * time.Millisecond
)

// behavior is how a broker's address behaves.
type behavior int

const (
	responds behavior = iota
	refuses           // no program listens there
	slow              // responses take slowness
	silent            // the node is lost, and all packets with it
)

// instance is one broker.
type instance struct {
	fleet  *fleet
	addr   netip.Addr
	number int // by start
	zone   int

	sessions  *cache.Cache[policy.Grant]
	placement *placement.Placement
	prefetch  *broker.Prefetch
	server    *broker.Broker
	cancel    context.CancelFunc

	how  behavior // guarded by fleet.mu
	done bool     // it shuts down or is lost; guarded by fleet.mu

	updating sync.Mutex // orders updates of placement; locked before fleet.mu
	heard    int        // the version of the newest update; guarded by updating
}

// start starts a broker in a zone. It becomes ready when it is warm.
func (f *fleet) start(zone int) {
	f.mu.Lock()
	f.started++
	n := f.started
	f.mu.Unlock()
	f.startAt(netip.AddrFrom4([4]byte{10, byte(zone), byte(n / 250), byte(n%250 + 1)}), n, zone)
}

func (f *fleet) startAt(addr netip.Addr, number, zone int) {
	b := &instance{fleet: f, addr: addr, number: number, zone: zone, how: refuses}
	b.build()
	var ctx context.Context
	ctx, b.cancel = context.WithCancel(f.ctx)
	f.mu.Lock()
	f.instances[addr] = b
	f.mu.Unlock()
	f.setState(addr, isStarting)
	go func() {
		if !pause(ctx, begins) {
			return
		}
		b.set(responds, false)
		f.mu.RLock()
		latest := f.news
		f.mu.RUnlock()
		b.hear(latest)
		b.prefetch.Changed(f.podKeys()...)
		for _, run := range []func(context.Context) error{
			b.sessions.Run, func(ctx context.Context) error { return b.prefetch.Run(ctx, f.rules) }, b.placement.Run,
		} {
			go func() { _ = run(ctx) }()
		}
		b.warm(ctx)
	}()
}

// build makes the parts of the program.
func (b *instance) build() {
	f, log := b.fleet, slog.New(slog.DiscardHandler)
	l := &line{sts: f.sts, duration: f.duration, ends: make(map[policy.Grant]time.Time)}
	if f.http != nil {
		source, err := assume.New(f.ctx, assume.Config{Region: "eu-central-1", Endpoint: f.http.URL(), Dial: f.http.Dial})
		fatal(f.t, err)
		l.wire = source
	}
	var err error
	b.sessions, err = cache.New(cache.Config[policy.Grant]{Source: l, MaxPerTenant: maxGrants, Logger: log})
	fatal(f.t, err)
	b.placement = placement.New(placement.DefaultSettleTime)
	b.prefetch, err = broker.NewPrefetch(broker.PrefetchConfig{
		Lookup: f.lookup, Owns: b.placement.Owns, Sessions: b.sessions, Logger: log,
	})
	fatal(f.t, err)
	b.placement.OnChange(func() {
		b.sessions.ShareRate(b.placement.Brokers())
		b.prefetch.Changed(f.podKeys()...)
	})
	decisions, err := audit.New(audit.Config{Writer: io.Discard, Logger: log})
	fatal(f.t, err)
	go func() { _ = decisions.Run(f.ctx) }()
	b.server, err = broker.New(broker.Config{
		Verifier: f, Binder: f, Rules: f.rules, Sessions: b.sessions, Audit: decisions, Logger: log,
	})
	fatal(f.t, err)
}

// hear updates the placement, unless the broker has newer news.
func (b *instance) hear(n news) {
	b.updating.Lock()
	defer b.updating.Unlock()
	if b.ended() || n.version <= b.heard || b.behavior() == refuses {
		return
	}
	b.heard = n.version
	b.placement.Update(n.members(b.addr))
}

// warm waits until sidecars should call this broker, as cmd/broker does.
func (b *instance) warm(ctx context.Context) {
	since := time.Now()
	if !pause(ctx, within(0, probes)) {
		return
	}
	for {
		settled, active := b.sessions.Progress()
		if b.placement.Known() && b.prefetch.Pending() == 0 && settled == active || time.Since(since) >= warmTime {
			break
		}
		if !pause(ctx, probes) {
			return
		}
	}
	if !b.ended() {
		b.fleet.setState(b.addr, isReady)
	}
}

func (b *instance) behavior() behavior {
	b.fleet.mu.RLock()
	defer b.fleet.mu.RUnlock()
	return b.how
}

func (b *instance) ended() bool {
	b.fleet.mu.RLock()
	defer b.fleet.mu.RUnlock()
	return b.done
}

func (b *instance) set(how behavior, done bool) {
	b.fleet.mu.Lock()
	defer b.fleet.mu.Unlock()
	b.how, b.done = how, done
}

// shutDown shuts the broker down, as SIGTERM does. It does not wait.
func (b *instance) shutDown() {
	b.fleet.setState(b.addr, isEnding)
	b.set(b.behavior(), true)
	b.updating.Lock()
	b.placement.Update(placement.Members{Self: b.addr, ShuttingDown: true})
	b.updating.Unlock()
	time.AfterFunc(lingers, func() {
		b.set(refuses, true)
		b.cancel()
		time.AfterFunc(leaves, func() { b.fleet.setState(b.addr, isGone) })
	})
}

// lose loses the broker's node: Kubernetes and the sidecars are not notified.
func (b *instance) lose() {
	b.set(silent, true)
	b.cancel()
	time.AfterFunc(noticed, func() { b.fleet.setState(b.addr, isUnready) })
	time.AfterFunc(evicted, func() { b.fleet.setState(b.addr, isGone) })
}

// crash ends the broker's program. Its address refuses connections, and the second failing probe finds it unready.
func (b *instance) crash() {
	b.set(refuses, true)
	b.cancel()
	time.AfterFunc(2*probes, func() { b.fleet.setState(b.addr, isGone) })
}

// restart crashes the broker's program, which starts again in the same pod, and so at the same address.
func (b *instance) restart() {
	b.set(refuses, true)
	b.cancel()
	b.fleet.setState(b.addr, isUnready) // the kubelet sees the program end
	time.AfterFunc(restarts, func() {
		if b.fleet.ctx.Err() == nil {
			b.fleet.startAt(b.addr, b.number, b.zone)
		}
	})
}

// get calls the broker as a sidecar does.
func (b *instance) get(ctx context.Context, key string) (*brokerpb.GetCredentialsResponse, error) {
	how := b.behavior()
	if how == slow && !pause(ctx, slowness) {
		return nil, unavailable("the caller gave up")
	}
	if how == responds || how == slow {
		ctx := metadata.NewIncomingContext(context.WithValue(ctx, called{}, true), metadata.Pairs("authorization", "Bearer "+key))
		response, err := b.server.GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
		if err != nil {
			err = brokerpb.FromError(err)
		}
		if b.behavior() != silent {
			return response, err
		}
	}
	if b.behavior() == silent {
		<-ctx.Done()
	}
	return nil, unavailable("no connection")
}

func unavailable(text string) error {
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "%s", text)
}

// Verify implements identity.Verifier: a pod's token is its key.
func (f *fleet) Verify(_ context.Context, token identity.UnverifiedToken) (identity.Pod, error) {
	namespace, name, _ := strings.Cut(token.Reveal(), "/")
	return identity.Pod{Namespace: namespace, Name: name}, nil
}

// Bind implements broker.Binder.
func (f *fleet) Bind(_ context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	pod, ns, ok := f.lookup(id.String())
	if !ok {
		return pod, ns, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "pod %s does not exist", id)
	}
	return pod, ns, nil
}

// How long news of brokers takes.
const (
	// published is the interval at which endpoints are written.
	published = time.Second
	// A watch gets news within seconds. A node's DNS caches a response for 5 s more, which is CoreDNS's time to live.
	leastDelay = time.Second
	watchDelay = 3 * time.Second
	dnsDelay   = 8 * time.Second
)

// state is what Kubernetes knows about a broker's pod.
type state int

const (
	isStarting state = iota
	isReady
	isUnready // lost: its probes fail
	isEnding
	isGone
)

// news is the state of all brokers at one time.
type news struct {
	version int
	states  map[netip.Addr]state
}

// members is what a broker derives from it, as package kube does.
func (n news) members(self netip.Addr) placement.Members {
	m := placement.Members{Self: self}
	for a, s := range n.states {
		switch s {
		case isReady:
			m.Ready = append(m.Ready, a)
		case isStarting, isUnready:
			m.Starting = append(m.Starting, a)
		case isEnding, isGone:
			m.ShuttingDown = m.ShuttingDown || a == self
		}
	}
	return m
}

// resolver is the DNS of one node.
type resolver struct {
	version   int
	addresses []netip.Addr
}

// setState changes what Kubernetes knows about a broker. It is published a little later.
func (f *fleet) setState(a netip.Addr, s state) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.states[a] = s; s == isGone {
		delete(f.states, a)
	}
	if !f.publishing {
		f.publishing = true
		time.AfterFunc(published, f.publish)
	}
}

// publish notifies brokers and the DNS of nodes, each after some time.
func (f *fleet) publish() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.publishing = false
	n := news{f.news.version + 1, make(map[netip.Addr]state, len(f.states))}
	var addresses []netip.Addr
	for a, s := range f.states {
		n.states[a] = s
		if s == isReady {
			addresses = append(addresses, a)
		}
	}
	f.news = n
	for _, b := range f.instances {
		time.AfterFunc(within(leastDelay, watchDelay), func() { b.hear(n) })
	}
	for i := range f.resolvers {
		time.AfterFunc(within(leastDelay, dnsDelay), func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if r := &f.resolvers[i]; r.version < n.version {
				*r = resolver{n.version, addresses}
			}
		})
	}
}
