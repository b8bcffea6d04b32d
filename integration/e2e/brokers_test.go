//go:build linux

package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// observer computes which broker owns which session, from the brokers' endpoints, as each broker does.
type observer struct {
	settleTime time.Duration

	mu      sync.Mutex
	keys    []string                            // the routing keys of all sessions; guarded by mu
	brokers map[netip.Addr]*placement.Placement // guarded by mu
	owned   map[string]bool                     // "KEY at ADDRESS", for each owner that ever was; guarded by mu
	ready   int                                 // guarded by mu
}

// observe starts an observer until the test ends.
func observe(t *testing.T, settleTime time.Duration) *observer {
	t.Helper()
	o := &observer{settleTime: settleTime, brokers: map[netip.Addr]*placement.Placement{}, owned: map[string]bool{}}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	endpoints, err := kube.NewEndpoints(kube.EndpointsConfig{
		REST: d.Cluster.Config(), Namespace: deployment.Namespace, Service: "credence-broker", Logger: slog.New(slog.DiscardHandler),
		Own:    []netip.Addr{netip.MustParseAddr("192.0.2.1")}, // no broker's address
		Update: func(m placement.Members) { o.update(ctx, &running, m) },
	})
	if err != nil {
		t.Fatal(err)
	}
	running.Go(func() { _ = endpoints.Run(ctx) })
	return o
}

func (o *observer) update(ctx context.Context, running *sync.WaitGroup, m placement.Members) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ready = len(m.Ready)
	all := slices.Concat(m.Ready, m.Starting)
	for _, a := range all {
		if o.brokers[a] == nil {
			p := placement.New(o.settleTime)
			p.OnChange(func() { go o.record() })
			running.Go(func() { _ = p.Run(ctx) })
			o.brokers[a] = p
		}
	}
	for a, p := range o.brokers {
		if !slices.Contains(all, a) {
			delete(o.brokers, a) // it terminates and takes over no session
			continue
		}
		m.Self = a
		p.Update(m)
	}
}

// record records the current owners.
func (o *observer) record() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, key := range o.keys {
		for a, p := range o.brokers {
			if p.Owns(key) {
				o.owned[key+" at "+a.String()] = true
			}
		}
	}
}

// add adds a session.
func (o *observer) add(key string) {
	o.mu.Lock()
	o.keys = append(o.keys, key)
	o.mu.Unlock()
	o.record()
}

// fetches returns the number of fetches that were needed so far.
func (o *observer) fetches() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.owned)
}

// await waits until that many brokers are ready, no others exist, and the settle time has passed. No broker may have one
// of the addresses of the deleted ones.
func (o *observer) await(t *testing.T, count int, deleted ...string) {
	t.Helper()
	await.Until(t, fmt.Sprintf("%d brokers are ready", count), func() error {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.ready != count || len(o.brokers) != count {
			return fmt.Errorf("%d are ready of %d", o.ready, len(o.brokers))
		}
		for _, address := range deleted {
			if o.brokers[netip.MustParseAddr(address)] != nil {
				return fmt.Errorf("%s still exists", address)
			}
		}
		return nil
	})
	time.Sleep(o.settleTime + time.Second)
}

// TestBrokersComeAndGo adds and removes brokers while pods call them all the time. No call fails, and each owner fetches
// each session once. Parallel tests run meanwhile, and need no particular broker.
func TestBrokersComeAndGo(t *testing.T) {
	t.Parallel()
	const (
		settleTime = 4 * time.Second
		roles      = 12
		callers    = 3
	)
	replicas := func(count int) {
		t.Helper()
		// Other tests have set the replicas with another client, which is a conflict for Helm.
		if err := d.Upgrade(t.Context(), "--force-conflicts", "--set=broker.replicas="+strconv.Itoa(count), "--set=broker.settleTime="+settleTime.String()); err != nil {
			t.Fatal(err)
		}
	}
	replicas(3)
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	o := observe(t, settleTime)
	o.await(t, 3)

	ns := d.Namespace(t)
	var pods []string // each has a role of its name
	for i := range roles {
		pods = append(pods, "placed-"+strconv.Itoa(i))
	}
	calls := func() (n int) {
		for _, role := range pods {
			n += d.STS.Count("AssumeRole", stack.RoleARN(role))
		}
		return n
	}
	for i, name := range pods {
		pod := paused(name, map[string]string{roleKey: name})
		if i < callers {
			pod = caller(t, d.App(name, map[string]string{roleKey: name}, "watch", "1h"))
		}
		stored := kubetest.Create(t, d.Client, ns, pod)
		key, err := policy.Pod{Namespace: ns, Name: name, UID: string(stored.UID), ServiceAccount: "default", Request: keys.Request(stored.Annotations)}.RoutingKey()
		if err != nil {
			t.Fatal(err)
		}
		o.add(string(key))
		if i < callers {
			if got := kubetest.Variable(kubetest.Container(t, stored, stack.SidecarName), "CREDENCE_ROUTING_KEY"); got != string(key) {
				t.Errorf("the sidecar of %s has routing key %q, brokers have %q", name, got, key)
			}
		}
	}
	for _, pod := range pods {
		kubetest.AwaitReady(t, d.Client, ns, pod)
	}
	check := func(after string) {
		t.Helper()
		await.Until(t, "brokers have fetched their sessions after "+after, func() error {
			got, want := calls(), o.fetches()
			// A broker and the observer can miss a very short ownership, and sidecars can still have called a deleted broker.
			tolerance := max(2, want/10)
			switch {
			case got > want+tolerance:
				return await.Never{Err: fmt.Errorf("STS got %d calls, want about %d", got, want)}
			case got < want-tolerance:
				return fmt.Errorf("STS got %d calls, want about %d", got, want)
			}
			return nil
		})
		calm(t, ns, pods[:callers]...)
	}
	check("the start")
	if got := calls(); got != placement.Owners*roles {
		t.Errorf("%d roles with %d owners each are %d calls", roles, placement.Owners, got)
	}

	brokers, err := d.Pods(t.Context(), "broker")
	if err != nil || len(brokers) != 3 {
		t.Fatalf("%d brokers: %v", len(brokers), err)
	}
	for _, broker := range brokers {
		if err := d.Client.CoreV1().Pods(deployment.Namespace).Delete(t.Context(), broker.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		o.await(t, 3, broker.Status.PodIP)
	}
	check("the deletion of each broker in turn")
	if got, least := calls(), 2*placement.Owners*roles; got < least {
		t.Errorf("three new brokers needed %d calls, want at least %d", got, least)
	}
	replicas(5)
	o.await(t, 5)
	check("two more brokers")
	replicas(2)
	o.await(t, 2)
	check("three brokers fewer")
}
