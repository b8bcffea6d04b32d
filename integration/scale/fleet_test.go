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

// shape is what a fleet is made of.
type shape struct {
	brokers, nodes, roles, pods int
	scope                       policy.Scope // "": role
	accounts                    int          // with ScopeServiceAccount, of each role
	life                        time.Duration
	// wire has brokers call STS by HTTP, as the program does.
	wire bool
	// gradual has pods come one after the other for as long as a session is used, so that renewals are as spread as in
	// a cluster that has long been there. Otherwise all are there when brokers start.
	gradual bool
}

// grants is how many sessions each broker would have if there were one.
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

// asksIn is how many calls sidecars make in some time: each when between 0.45 and 0.5 of its session's life are left.
func (s shape) asksIn(d time.Duration) float64 {
	return float64(s.pods) * float64(d) / (0.5 * float64(s.life))
}

// perHour is how many calls renewals take on average: two brokers renew each session when 0.45 of it are used.
func (s shape) perHour() float64 {
	return 2 * float64(s.grants()) * float64(time.Hour) / (0.45 * float64(s.life))
}

// fleet is a cluster: its brokers, its pods, and the one STS.
type fleet struct {
	shape

	t       *testing.T
	ctx     context.Context
	sts     *sts
	http    *ststest.Server // nil: none
	keysOf  policy.Keys
	rules   *policy.Rules
	running sync.WaitGroup
	wake    chan struct{} // holds one

	mu         sync.Mutex
	due        dueHeap                  // guarded by mu
	states     map[netip.Addr]state     // guarded by mu
	publishing bool                     // guarded by mu
	news       news                     // guarded by mu
	instances  map[netip.Addr]*instance // all that ever were; guarded by mu
	started    int                      // guarded by mu
	resolvers  []resolver               // by node; guarded by mu
	onNode     [][]*pod                 // :: node → its pods; guarded by mu
	made       int                      // pods; guarded by mu
	answers    figures                  // guarded by mu
	cold       figures                  // of the time before anything was measured

	podsMu sync.RWMutex
	live   map[string]*pod // :: NAMESPACE/NAME → live pod; guarded by podsMu
	listed []string        // their keys; nil when pods have come or gone since; guarded by podsMu
}

// told is what one call came to.
type told struct {
	failed  bool
	first   bool          // of a pod
	without bool          // what the pod held had ended
	left    float64       // of the life of the session that it is given
	waited  time.Duration // for the answer
	err     error
}

// figures are what pods were told in some time.
type figures struct {
	asks, failed, without int
	attempts              int // brokers asked
	least                 float64
	longest               time.Duration
	failure               error // the first
}

func (f *fleet) told(a told) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &f.answers
	s.asks++
	if a.without {
		s.without++
	}
	s.longest = max(s.longest, a.waited)
	if a.failed {
		s.failed++
		if s.failure == nil {
			s.failure = a.err
		}
		return
	}
	s.least = min(s.least, a.left)
}

// collect returns the figures since the last time.
func (f *fleet) collect() figures {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.answers
	f.answers = figures{least: 1}
	return s
}

// newFleet starts a cluster, and returns when its brokers have settled and all of its pods have asked.
func newFleet(t *testing.T, s shape) *fleet {
	t.Helper()
	if s.life == 0 {
		s.life = time.Hour
	}
	ctx, cancel := context.WithCancel(t.Context())
	f := &fleet{
		shape: s, t: t, ctx: ctx, sts: newSTS(), wake: make(chan struct{}, 1),
		states: make(map[netip.Addr]state), instances: make(map[netip.Addr]*instance),
		resolvers: make([]resolver, s.nodes), onNode: make([][]*pod, s.nodes), live: make(map[string]*pod),
		answers: figures{least: 1},
	}
	t.Cleanup(func() {
		cancel()
		for _, b := range f.instances {
			b.running.Wait()
		}
		f.running.Wait()
	})
	f.policy()
	if s.wire {
		f.dial()
	}
	if !s.gradual {
		for i := range s.pods {
			f.add(i, i%s.nodes, within(time.Minute, 10*time.Minute))
		}
	}
	for i := range s.brokers {
		f.start(i % zones)
	}
	f.running.Go(f.asking)
	f.await(s.brokers)
	if s.gradual {
		every := s.life * 45 / 100 / time.Duration(s.pods)
		for i := range s.pods {
			f.add(s.gradually(i), i%s.nodes, within(3*time.Second, 6*time.Second))
			time.Sleep(every)
		}
		// Into the midst of the time in which all ask again: what happens then happens under load.
		time.Sleep(s.life * 3 / 10)
	} else {
		time.Sleep(10 * time.Minute) // until all have asked
	}
	f.cold = f.collect()
	if f.cold.failed > 0 {
		t.Errorf("%d of %d calls failed while the fleet started, one with %v", f.cold.failed, f.cold.asks, f.cold.failure)
	}
	return f
}

// gradually is the specification of the pod that comes as the ith: all pods of a role, and then those of the next.
func (s shape) gradually(i int) int {
	each := s.pods / s.roles
	return i%each*s.roles + i/each
}

// policy completes role names to those of one account.
func (f *fleet) policy() {
	var err error
	f.keysOf, err = policy.NewKeys(policy.DefaultPrefix)
	fatal(f.t, err)
	base, err := credential.BaseOf("aws", account)
	fatal(f.t, err)
	f.rules, err = policy.New(policy.Config{Keys: f.keysOf, Base: base})
	fatal(f.t, err)
}

// dial starts an STS that is called over HTTP, through memory.
func (f *fleet) dial() {
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

// await waits until n brokers are ready and everybody has heard of it.
func (f *fleet) await(n int) {
	f.awaitReady(n)
	time.Sleep(published + dnsDelay)
}

// awaitReady waits until n brokers are ready.
func (f *fleet) awaitReady(n int) {
	for f.ready() != n {
		time.Sleep(100 * time.Millisecond)
	}
}

func (f *fleet) ready() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.states {
		if s == ready {
			n++
		}
	}
	return n
}

func (f *fleet) at(a netip.Addr) *instance {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.instances[a]
}

// up are the brokers that are neither lost nor about to end, the oldest first.
func (f *fleet) up() (up []*instance) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range f.instances {
		b.mu.Lock()
		if !b.done {
			up = append(up, b)
		}
		b.mu.Unlock()
	}
	slices.SortFunc(up, func(a, b *instance) int { return age(a) - age(b) })
	return up
}

// age is the number in a broker's address.
func age(b *instance) int {
	bytes := b.addr.As4()
	return int(bytes[2])*250 + int(bytes[3])
}

// add makes the pod with that specification anew, on a node; it asks after a while.
func (f *fleet) add(spec, node int, asks time.Duration) {
	f.mu.Lock()
	f.made++
	n := f.made
	f.mu.Unlock()
	p := &pod{Pod: f.specified(spec), spec: spec, node: node}
	p.Name = fmt.Sprintf("pod-%d", n)
	p.UID = fmt.Sprintf("uid-%d", n)
	p.key = p.Namespace + "/" + p.Name
	routing, err := p.RoutingKey()
	fatal(f.t, err)
	p.routing = string(routing)
	f.podsMu.Lock()
	f.live[p.key], f.listed = p, nil
	f.podsMu.Unlock()
	f.mu.Lock()
	f.onNode[node] = append(f.onNode[node], p)
	f.mu.Unlock()
	f.changed(p.key)
	f.asksAt(p, time.Now().Add(asks))
}

// addAfter is add after a while.
func (f *fleet) addAfter(after time.Duration, spec, node int) {
	time.AfterFunc(after, func() {
		if f.ctx.Err() == nil {
			f.add(spec, node, within(3*time.Second, 6*time.Second))
		}
	})
}

// remove ends one pod.
func (f *fleet) remove(p *pod) {
	f.mu.Lock()
	p.gone = true
	f.onNode[p.node] = slices.DeleteFunc(f.onNode[p.node], func(other *pod) bool { return other == p })
	f.mu.Unlock()
	f.podsMu.Lock()
	delete(f.live, p.key)
	f.listed = nil
	f.podsMu.Unlock()
	f.changed(p.key)
}

// drain ends all pods of a node, and returns their specifications.
func (f *fleet) drain(node int) (specs []int) {
	f.mu.Lock()
	gone := f.onNode[node]
	f.onNode[node] = nil
	for _, p := range gone {
		p.gone = true
		specs = append(specs, p.spec)
	}
	f.mu.Unlock()
	f.podsMu.Lock()
	for _, p := range gone {
		delete(f.live, p.key)
	}
	f.listed = nil
	f.podsMu.Unlock()
	for _, p := range gone {
		f.changed(p.key)
	}
	return specs
}

// namespacesOf is such that no namespace has more grants than it may.
func (f *fleet) namespacesOf() int { return max(20, f.grants()/(maxGrants*4/5)) }

// specified is what a Deployment or the like says of a pod.
func (f *fleet) specified(spec int) policy.Pod {
	role := spec % f.roles
	p := policy.Pod{ServiceAccount: "default"}
	annotations := map[string]string{f.keysOf.Name(policy.Role): fmt.Sprintf("role-%d", role)}
	switch f.scope {
	case policy.ScopePod:
		p.Namespace = fmt.Sprintf("ns-%d", spec%f.namespacesOf())
	case policy.ScopeServiceAccount:
		p.ServiceAccount = fmt.Sprintf("account-%d", spec/f.roles%f.accounts)
		p.Namespace = fmt.Sprintf("ns-%d", role%f.namespacesOf())
	default:
		p.Namespace = fmt.Sprintf("ns-%d", role%f.namespacesOf())
	}
	if f.scope != "" {
		annotations[f.keysOf.Name(policy.SessionScope)] = string(f.scope)
	}
	if f.life != time.Hour {
		annotations[f.keysOf.Name(policy.Duration)] = f.life.String()
	}
	p.Request = f.keysOf.Request(annotations)
	return p
}

// changed tells all brokers of a pod.
func (f *fleet) changed(key string) {
	f.mu.Lock()
	all := make([]*instance, 0, len(f.instances))
	for _, b := range f.instances {
		all = append(all, b)
	}
	f.mu.Unlock()
	for _, b := range all {
		b.mu.Lock()
		done := b.manner == refuses || b.manner == silent
		b.mu.Unlock()
		if !done {
			b.prefetch.Changed(key)
		}
	}
}

// keys are those of all pods.
func (f *fleet) keys() []string {
	f.podsMu.Lock()
	defer f.podsMu.Unlock()
	if f.listed == nil {
		f.listed = make([]string, 0, len(f.live))
		for key := range f.live {
			f.listed = append(f.listed, key)
		}
	}
	return f.listed
}

var namespaceLabels, namespaceAnnotations = map[string]string{policy.DefaultPrefix + "/" + string(policy.Inject): policy.Enabled},
	map[string]string{policy.DefaultPrefix + "/" + string(policy.Permitted): ".*"}

func (f *fleet) lookup(key string) (policy.Pod, policy.Namespace, bool) {
	f.podsMu.RLock()
	defer f.podsMu.RUnlock()
	p, ok := f.live[key]
	if !ok {
		return policy.Pod{}, policy.Namespace{}, false
	}
	return p.Pod, policy.Namespace{Name: p.Namespace, Labels: namespaceLabels, Annotations: namespaceAnnotations}, true
}

// nodeBut is any node but some.
func (f *fleet) nodeBut(not func(node int) bool) int {
	for {
		if n := rand.IntN(f.nodes); !not(n) {
			return n
		}
	}
}
