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

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/deployment"
)

// observer works out, from what Kubernetes says of the brokers, which of them own what, as each of them does.
type observer struct {
	settleTime time.Duration

	mu      sync.Mutex
	keys    []string                            // of the sessions there are; guarded by mu
	brokers map[netip.Addr]*placement.Placement // guarded by mu
	owned   map[string]bool                     // :: KEY at ADDRESS, for each that was ever owned; guarded by mu
	ready   int                                 // guarded by mu
}

// observe begins to.
func observe(t *testing.T, settleTime time.Duration) *observer {
	t.Helper()
	o := &observer{settleTime: settleTime, brokers: map[netip.Addr]*placement.Placement{}, owned: map[string]bool{}}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	endpoints, err := kube.NewEndpoints(kube.EndpointsConfig{
		REST: world.Config(), Namespace: deployment.Namespace, Service: "credence-broker", Logger: slog.New(slog.DiscardHandler),
		Own:    []netip.Addr{netip.MustParseAddr("192.0.2.1")}, // nobody's
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
	there := slices.Concat(m.Ready, m.Starting)
	for _, a := range there {
		if o.brokers[a] == nil {
			p := placement.New(o.settleTime)
			p.OnChange(func() { go o.look() })
			running.Go(func() { _ = p.Run(ctx) })
			o.brokers[a] = p
		}
	}
	for a, p := range o.brokers {
		if !slices.Contains(there, a) {
			delete(o.brokers, a) // It ends, and takes nothing up any more.
			continue
		}
		m.Self = a
		p.Update(m)
	}
}

// look notes who owns what now.
func (o *observer) look() {
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

// add says that there is one more session.
func (o *observer) add(key string) {
	o.mu.Lock()
	o.keys = append(o.keys, key)
	o.mu.Unlock()
	o.look()
}

// fetches is how often sessions had to be fetched so far.
func (o *observer) fetches() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.owned)
}

// await returns when that many brokers are ready, and no others there, for long enough to have settled; none of them
// at the addresses of those that are gone.
func (o *observer) await(t *testing.T, count int, gone ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d brokers are ready", count), func(context.Context) error {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.ready != count || len(o.brokers) != count {
			return fmt.Errorf("%d are ready of %d", o.ready, len(o.brokers))
		}
		for _, address := range gone {
			if o.brokers[netip.MustParseAddr(address)] != nil {
				return fmt.Errorf("%s is still there", address)
			}
		}
		return nil
	})
	time.Sleep(o.settleTime + time.Second)
}

// Brokers are lost, and come and go, while pods ask them all the time. No call fails, and each session is fetched by
// those who own it, once each. The tests that follow have brokers that settle as soon as they do here.
func TestBrokersComeAndGo(t *testing.T) {
	const (
		settleTime = 4 * time.Second
		roles      = 12
		callers    = 3
	)
	replicas := func(count int) {
		t.Helper()
		// By Helm, which would take replicas that somebody else had set for a conflict.
		if err := d.Upgrade(t.Context(), "--set=broker.replicas="+strconv.Itoa(count), "--set=broker.settleTime="+settleTime.String()); err != nil {
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

	ns := namespace(t)
	calls := func() (n int) {
		for i := range roles {
			n += d.STS.Count("AssumeRole", deployment.RoleARN("placed-"+strconv.Itoa(i)))
		}
		return n
	}
	for i := range roles {
		name := "placed-" + strconv.Itoa(i)
		pod := app(name, map[string]string{roleKey: name})
		if i < callers {
			pod = caller(t, app(name, map[string]string{roleKey: name}, "watch", "1h"))
		} else {
			pod.Spec.Containers[0].Image = "localhost/credence-pause:1"
		}
		stored := create(t, ns, pod)
		key, err := policy.Pod{Namespace: ns, Name: name, UID: string(stored.UID), ServiceAccount: "default", Request: keys.Request(stored.Annotations)}.RoutingKey()
		if err != nil {
			t.Fatal(err)
		}
		o.add(string(key))
		if i < callers {
			if got := variableOf(sidecarOf(stored), "CREDENCE_ROUTING_KEY"); got != string(key) {
				t.Errorf("the sidecar of %s is told to route by %q, and brokers by %q", name, got, key)
			}
		}
	}
	for i := range roles {
		awaitReady(t, ns, "placed-"+strconv.Itoa(i))
	}
	check := func(after string) {
		t.Helper()
		got, want := calls(), o.fetches()
		t.Logf("after %s: %d calls of STS, %d computed", after, got, want)
		// What is owned for less than the moment between two looks is not always seen by both, and a broker that has
		// gone can have been asked by sidecars that did not know yet.
		if tolerance := max(2, want/10); got < want-tolerance || got > want+tolerance {
			t.Errorf("after %s there were %d calls of STS, and %d are computed", after, got, want)
		}
		for i := range callers {
			calm(t, ns, "placed-"+strconv.Itoa(i))
		}
	}
	check("the start")
	if got := calls(); got != placement.Owners*roles {
		t.Errorf("%d roles are fetched %d times by %d owners each", roles, got, placement.Owners)
	}

	pods := d.Client.CoreV1().Pods(deployment.Namespace)
	brokers, err := pods.List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=broker"})
	if err != nil || len(brokers.Items) != 3 {
		t.Fatalf("%d brokers: %v", len(brokers.Items), err)
	}
	for _, broker := range brokers.Items {
		if err := pods.Delete(t.Context(), broker.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		o.await(t, 3, broker.Status.PodIP)
	}
	check("the deletion of each broker in turn")
	if got, least := calls(), 2*placement.Owners*roles; got < least {
		t.Errorf("three other brokers hold each role's session twice after %d calls, and at least %d are needed", got, least)
	}
	replicas(5)
	o.await(t, 5)
	check("two more brokers")
	replicas(2)
	o.await(t, 2)
	check("three brokers less")
}

// variableOf is the value of a container's environment variable.
func variableOf(c corev1.Container, name string) string {
	for _, v := range c.Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}
