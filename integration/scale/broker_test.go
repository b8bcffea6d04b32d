package scale

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
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
	// probes is the chart's readiness probe, and warmTime how long the program waits for its sessions.
	probes   = 2 * time.Second
	warmTime = 30 * time.Second
	// lingers is the chart's preStop pause, after which no call is taken; the pod is gone a little later.
	lingers = 5 * time.Second
	leaves  = 2 * time.Second
	// maxGrants is the program's default.
	maxGrants = 500
)

// slowness is how long a slow broker takes for each answer: longer than sidecars wait for the first that they ask.
const slowness = 400 * time.Millisecond

// manner is how a broker's address behaves.
type manner int

const (
	answers manner = iota
	refuses        // nothing listens there
	slow           // it takes its time
	silent         // the node is lost, and packets with it
)

// instance is one broker.
type instance struct {
	fleet *fleet
	addr  netip.Addr
	zone  int

	sessions  *cache.Cache[policy.Grant]
	placement *placement.Placement
	prefetch  *broker.Prefetch
	broker    *broker.Broker
	cancel    context.CancelFunc
	running   sync.WaitGroup

	mu     sync.Mutex
	manner manner // guarded by mu
	heard  int    // the version of the latest news; guarded by mu
	done   bool   // it has ended or was lost; guarded by mu
	ready  bool   // it has once been ready; guarded by mu
}

// start starts a broker in a zone. It is ready once it is warm.
func (f *fleet) start(zone int) {
	f.t.Helper()
	f.mu.Lock()
	f.started++
	n := f.started
	f.mu.Unlock()
	f.startAt(netip.AddrFrom4([4]byte{10, byte(zone), byte(n / 250), byte(n%250 + 1)}), zone)
}

func (f *fleet) startAt(addr netip.Addr, zone int) {
	f.t.Helper()
	b := &instance{fleet: f, addr: addr, zone: zone, manner: refuses}
	b.build(f.t)
	f.mu.Lock()
	f.instances[b.addr] = b
	f.mu.Unlock()
	f.setState(b.addr, starting, true)
	ctx, cancel := context.WithCancel(f.ctx)
	b.cancel = cancel
	b.running.Go(func() {
		if !pause(ctx, begins) {
			return
		}
		b.set(answers)
		b.hear(f.latest())
		b.prefetch.Changed(f.keys()...)
		for _, run := range []func(context.Context) error{
			b.sessions.Run, func(ctx context.Context) error { return b.prefetch.Run(ctx, f.rules) }, b.placement.Run,
		} {
			b.running.Go(func() { _ = run(ctx) })
		}
		b.warm(ctx)
	})
}

// build makes the parts of the program.
func (b *instance) build(t *testing.T) {
	t.Helper()
	f, log := b.fleet, slog.New(slog.DiscardHandler)
	l := &line{sts: f.sts, life: f.life, ends: make(map[policy.Grant]time.Time)}
	if f.http != nil {
		source, err := assume.New(f.ctx, assume.Config{Region: "eu-central-1", Endpoint: f.http.URL(), Dial: f.http.Dial})
		fatal(t, err)
		l.wire = source
	}
	var err error
	b.sessions, err = cache.New(cache.Config[policy.Grant]{Source: l, MaxPerTenant: maxGrants, Logger: log})
	fatal(t, err)
	b.placement = placement.New(placement.DefaultSettleTime)
	b.prefetch, err = broker.NewPrefetch(broker.PrefetchConfig{
		Lookup: f.lookup, Owns: b.placement.Owns, Sessions: b.sessions, Logger: log,
	})
	fatal(t, err)
	b.placement.OnChange(func() {
		b.sessions.ShareRate(b.placement.Brokers())
		b.prefetch.Changed(f.keys()...)
	})
	decisions, err := audit.New(audit.Config{Writer: io.Discard, Logger: log})
	fatal(t, err)
	f.running.Go(func() { _ = decisions.Run(f.ctx) })
	b.broker, err = broker.New(broker.Config{
		Verifier: f, Binder: f, Rules: f.rules, Sessions: b.sessions, Audit: decisions, Logger: log,
	})
	fatal(t, err)
}

// hear takes up news, unless it has heard newer.
func (b *instance) hear(n news) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.done || n.version <= b.heard || b.manner == refuses {
		return
	}
	b.heard = n.version
	b.placement.Update(n.members(b.addr))
}

// warm waits until this broker should be asked, as cmd/broker does.
func (b *instance) warm(ctx context.Context) {
	since := time.Now()
	if !pause(ctx, within(0, probes)) {
		return
	}
	for {
		settled, kept := b.sessions.Settled()
		if b.placement.Known() && b.prefetch.Pending() == 0 && settled == kept || time.Since(since) >= warmTime {
			break
		}
		if !pause(ctx, probes) {
			return
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.done {
		b.ready = true
		b.fleet.setState(b.addr, ready, true)
	}
}

func (b *instance) set(m manner) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.manner = m
}

// end ends the broker in an orderly way, without waiting for that.
func (b *instance) end() {
	b.fleet.setState(b.addr, ending, true)
	b.mu.Lock()
	b.done = true
	b.placement.Update(placement.Members{Self: b.addr, Ending: true})
	b.mu.Unlock()
	time.AfterFunc(lingers, func() {
		b.set(refuses)
		b.cancel()
		time.AfterFunc(leaves, func() { b.fleet.setState(b.addr, ending, false) })
	})
}

// How a lost node becomes known.
const (
	// noticed is when a node counts as not ready: its last heartbeat is 10 s old by then at most, and 50 s are waited.
	noticed = 45 * time.Second
	// evicted is when its pods are replaced: they tolerate it for 300 s.
	evicted = noticed + 5*time.Minute
)

// lose takes the broker away without a word, as the loss of its node does.
func (b *instance) lose() {
	b.mu.Lock()
	b.manner, b.done = silent, true
	b.mu.Unlock()
	b.cancel()
	time.AfterFunc(noticed, func() { b.fleet.setState(b.addr, unready, true) })
	time.AfterFunc(evicted, func() { b.fleet.setState(b.addr, unready, false) })
}

// crash takes the broker's program away; its address refuses, and is found unready by the second probe that fails.
func (b *instance) crash() {
	b.mu.Lock()
	b.manner, b.done = refuses, true
	b.mu.Unlock()
	b.cancel()
	time.AfterFunc(2*probes, func() { b.fleet.setState(b.addr, unready, false) })
}

// restarts is how long the kubelet takes to run a program again that has crashed for the first time.
const restarts = 2 * time.Second

// restart crashes the broker's program, which starts again in the same pod, and so at the same address.
func (b *instance) restart() {
	b.mu.Lock()
	b.manner, b.done = refuses, true
	b.mu.Unlock()
	b.cancel()
	b.fleet.setState(b.addr, unready, true) // The kubelet sees the program end.
	time.AfterFunc(restarts, func() {
		if b.fleet.ctx.Err() == nil {
			b.fleet.startAt(b.addr, b.zone)
		}
	})
}

// get asks the broker as a sidecar reaches it.
func (b *instance) get(ctx context.Context, key string) (*brokerpb.GetCredentialsResponse, error) {
	m := b.how()
	if m == slow && !pause(ctx, slowness) {
		return nil, credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "the caller has left")
	}
	if m == answers || m == slow {
		ctx := metadata.NewIncomingContext(context.WithValue(ctx, asked{}, true), metadata.Pairs("authorization", "Bearer "+key))
		answer, err := b.broker.GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
		if err != nil {
			err = brokerpb.FromError(err)
		}
		if b.how() != silent {
			return answer, err
		}
	}
	if b.how() == silent {
		<-ctx.Done()
	}
	return nil, credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "no connection")
}

func (b *instance) how() manner {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.manner
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
		return pod, ns, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "pod %s is gone", id)
	}
	return pod, ns, nil
}

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pause reports false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
