package scale

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	account = "123456789012"
	zones   = 3
)

// shape is the size of a fleet.
type shape struct {
	brokers, nodes, roles, pods int
	scope                       policy.Scope // "": role
	accounts                    int          // with ScopeServiceAccount, of each role
	duration                    time.Duration
	// wire makes brokers call STS over HTTP, as the program does.
	wire bool
	// gradual creates pods one after the other for as long as a session is used, so that renewals are spread as in a
	// cluster that has run for long. Otherwise all pods exist when the brokers start.
	gradual bool
}

// grants is the number of distinct sessions.
func (s shape) grants() int {
	switch s.scope {
	case policy.ScopePod:
		return s.pods
	case policy.ScopeServiceAccount:
		return s.roles * s.accounts
	case policy.ScopeRole:
	}
	return s.roles
}

// callsIn is the number of sidecars' calls in some time: each calls when 0.45 to 0.5 of its session are left.
func (s shape) callsIn(d time.Duration) float64 {
	return float64(s.pods) * float64(d) / (0.5 * float64(s.duration))
}

// perHour is the average number of renewals: two brokers renew each session when 0.45 of it are used.
func (s shape) perHour() float64 {
	return 2 * float64(s.grants()) * float64(time.Hour) / (0.45 * float64(s.duration))
}

// fleet is a cluster: its brokers, its pods, and the one STS.
type fleet struct {
	shape

	t     *testing.T
	ctx   context.Context
	sts   *sts
	http  *ststest.Server // nil: brokers do not call STS over HTTP
	keys  policy.Keys
	rules *policy.Rules
	cold  figures // of the time before a scenario measures

	mu         sync.RWMutex
	states     map[netip.Addr]state     // of the brokers' pods in Kubernetes; guarded by mu
	publishing bool                     // guarded by mu
	news       news                     // guarded by mu
	instances  map[netip.Addr]*instance // all that ever were; guarded by mu
	started    int                      // brokers; guarded by mu
	resolvers  []resolver               // by node; guarded by mu
	onNode     [][]*pod                 // :: node → its pods; guarded by mu
	made       int                      // pods; guarded by mu
	results    figures                  // guarded by mu
	live       map[string]*pod          // :: NAMESPACE/NAME → live pod; guarded by mu
	listed     []string                 // the keys of live; nil after a change of live; guarded by mu
}

// figures are the results of pods' calls in some time.
type figures struct {
	calls, failed int
	without       int     // calls of pods whose session had expired
	attempts      int     // calls of brokers
	least         float64 // the smallest fraction of a session that was left in a response
	longest       time.Duration
	failure       error // the first
}

// collect returns the figures since the last call.
func (f *fleet) collect() figures {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.results
	f.results = figures{least: 1}
	return s
}

// newFleet starts a cluster. It returns when the brokers are warm and all pods have called.
func newFleet(t *testing.T, s shape) *fleet {
	t.Helper()
	if s.duration == 0 {
		s.duration = time.Hour
	}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel) // ends all goroutines of the test's bubble
	f := &fleet{
		shape: s, t: t, ctx: ctx, sts: newSTS(),
		states: make(map[netip.Addr]state), instances: make(map[netip.Addr]*instance),
		resolvers: make([]resolver, s.nodes), onNode: make([][]*pod, s.nodes), live: make(map[string]*pod),
		results: figures{least: 1},
	}
	var err error
	f.keys, err = policy.NewKeys(policy.DefaultPrefix)
	fatal(t, err)
	base, err := credential.BaseOf("aws", account)
	fatal(t, err)
	f.rules, err = policy.New(policy.Config{Keys: f.keys, Base: base})
	fatal(t, err)
	if s.wire {
		f.dialSTS()
	}
	if !s.gradual {
		for i := range s.pods {
			f.add(i, i%s.nodes, within(time.Minute, 10*time.Minute))
		}
	}
	for i := range s.brokers {
		f.start(i % zones)
	}
	f.await(s.brokers)
	if s.gradual {
		interval := s.duration * 45 / 100 / time.Duration(s.pods)
		each := s.pods / s.roles
		for i := range s.pods {
			f.add(i%each*s.roles+i/each, i%s.nodes, within(3*time.Second, 6*time.Second)) // all pods of a role, then those of the next
			time.Sleep(interval)
		}
		time.Sleep(s.duration * 3 / 10) // into the time in which all call again: the event happens under load
	} else {
		time.Sleep(10 * time.Minute) // until all have called
	}
	f.cold = f.collect()
	if f.cold.failed > 0 {
		t.Errorf("%d of %d calls failed while the fleet started, one with %v", f.cold.failed, f.cold.calls, f.cold.failure)
	}
	return f
}

// dialSTS starts an STS that brokers call over HTTP, through memory.
func (f *fleet) dialSTS() {
	var err error
	f.http, err = ststest.StartInMemory(f.ctx, ststest.Config{Account: account, Default: ststest.Behavior{Latency: latency}})
	fatal(f.t, err)
	f.t.Cleanup(f.http.Close)
	keyID, secret := f.http.Keys()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": keyID, "AWS_SECRET_ACCESS_KEY": secret.Reveal(), "AWS_SESSION_TOKEN": "",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_EC2_METADATA_DISABLED": "true",
	} {
		f.t.Setenv(name, value)
	}
}

// await waits until n brokers are ready, and all brokers and nodes have the news.
func (f *fleet) await(n int) {
	f.awaitReady(n)
	time.Sleep(published + dnsDelay)
}

// awaitReady waits until n brokers are ready.
func (f *fleet) awaitReady(n int) {
	ready := func() (count int) {
		f.mu.RLock()
		defer f.mu.RUnlock()
		for _, s := range f.states {
			if s == isReady {
				count++
			}
		}
		return count
	}
	for ready() != n {
		time.Sleep(100 * time.Millisecond)
	}
}

// up returns the brokers that are neither lost nor shutting down, the oldest first.
func (f *fleet) up() (up []*instance) {
	for _, b := range f.all() {
		if !b.ended() {
			up = append(up, b)
		}
	}
	slices.SortFunc(up, func(a, b *instance) int { return a.number - b.number })
	return up
}

func (f *fleet) all() (all []*instance) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, b := range f.instances {
		all = append(all, b)
	}
	return all
}

// pod is an injected pod with its sidecar.
type pod struct {
	policy.Pod

	key     string
	spec    int // the pod of a Deployment that it is
	node    int
	routing string
	gone    bool // guarded by fleet.mu

	// Only the one call of the pod uses these.
	ends     time.Time // of its session
	failures int       // in a row
	spent    int       // of its hedge budget
}

// add creates a pod on a node, which calls after some time.
func (f *fleet) add(spec, node int, calls time.Duration) {
	f.mu.Lock()
	f.made++
	n := f.made
	f.mu.Unlock()
	p := &pod{Pod: f.specified(spec), spec: spec, node: node}
	p.Name, p.UID = fmt.Sprintf("pod-%d", n), fmt.Sprintf("uid-%d", n)
	p.key = p.Namespace + "/" + p.Name
	routing, err := p.RoutingKey()
	fatal(f.t, err)
	p.routing = string(routing)
	f.mu.Lock()
	f.live[p.key], f.listed = p, nil
	f.onNode[node] = append(f.onNode[node], p)
	f.mu.Unlock()
	f.changed(p)
	f.callAfter(p, calls)
}

// addAfter adds a pod after some time.
func (f *fleet) addAfter(after time.Duration, spec, node int) {
	time.AfterFunc(after, func() {
		if f.ctx.Err() == nil {
			f.add(spec, node, within(3*time.Second, 6*time.Second))
		}
	})
}

// remove ends pods of one node, and returns their specs.
func (f *fleet) remove(node int, pods ...*pod) (specs []int) {
	f.mu.Lock()
	for _, p := range pods {
		p.gone = true
		delete(f.live, p.key)
		specs = append(specs, p.spec)
	}
	f.listed = nil
	f.onNode[node] = slices.DeleteFunc(slices.Clone(f.onNode[node]), func(p *pod) bool { return p.gone })
	f.mu.Unlock()
	f.changed(pods...)
	return specs
}

// drain ends all pods of a node, and returns their specs.
func (f *fleet) drain(node int) (specs []int) {
	f.mu.RLock()
	pods := f.onNode[node]
	f.mu.RUnlock()
	return f.remove(node, pods...)
}

// replace ends one pod, and creates its successor on another node.
func (f *fleet) replace() {
	f.mu.RLock()
	var p *pod
	for _, p = range f.live {
		break
	}
	f.mu.RUnlock()
	f.remove(p.node, p)
	f.addAfter(within(time.Second, 5*time.Second), p.spec, f.nodeBut(func(node int) bool { return node == p.node }))
}

// nodeBut returns a random node without some.
func (f *fleet) nodeBut(not func(node int) bool) int {
	for {
		if n := rand.IntN(f.nodes); !not(n) {
			return n
		}
	}
}

// specified is the pod of a Deployment.
func (f *fleet) specified(spec int) policy.Pod {
	role := spec % f.roles
	namespaces := max(20, f.grants()/(maxGrants*4/5)) // so that none has more grants than allowed
	p := policy.Pod{Namespace: fmt.Sprintf("ns-%d", role%namespaces), ServiceAccount: "default"}
	annotations := map[string]string{f.keys.Name(policy.Role): fmt.Sprintf("role-%d", role)}
	switch f.scope {
	case policy.ScopePod:
		p.Namespace = fmt.Sprintf("ns-%d", spec%namespaces)
	case policy.ScopeServiceAccount:
		p.ServiceAccount = fmt.Sprintf("account-%d", spec/f.roles%f.accounts)
	case policy.ScopeRole:
	}
	if f.scope != "" {
		annotations[f.keys.Name(policy.SessionScope)] = string(f.scope)
	}
	if f.duration != time.Hour {
		annotations[f.keys.Name(policy.Duration)] = f.duration.String()
	}
	p.Request = f.keys.Request(annotations)
	return p
}

// changed notifies all running brokers of changed pods.
func (f *fleet) changed(pods ...*pod) {
	for _, b := range f.all() {
		if m := b.behavior(); m == responds || m == slow {
			for _, p := range pods {
				b.prefetch.Changed(p.key)
			}
		}
	}
}

// podKeys returns the keys of all live pods.
func (f *fleet) podKeys() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.listed == nil {
		f.listed = make([]string, 0, len(f.live))
		for key := range f.live {
			f.listed = append(f.listed, key)
		}
	}
	return f.listed
}

var (
	namespaceLabels      = map[string]string{policy.DefaultPrefix + "/" + string(policy.Inject): policy.Enabled}
	namespaceAnnotations = map[string]string{policy.DefaultPrefix + "/" + string(policy.Permitted): ".*"}
)

func (f *fleet) lookup(key string) (policy.Pod, policy.Namespace, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	p, ok := f.live[key]
	if !ok {
		return policy.Pod{}, policy.Namespace{}, false
	}
	return p.Pod, policy.Namespace{Name: p.Namespace, Labels: namespaceLabels, Annotations: namespaceAnnotations}, true
}

// within returns a random duration.
func within(least, most time.Duration) time.Duration {
	if most <= least {
		return least
	}
	return least + rand.N(most-least)
}

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pause reports whether d has passed before ctx ended.
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
