//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	xrate "golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/stack"
)

func (w *world) startSTS(latency time.Duration) *ststest.Server {
	sts := must(ststest.Start(w.ctx, ststest.Config{Account: account, Default: ststest.Behavior{Latency: latency}}))
	w.Cleanup(sts.Close)
	return sts
}

// stsEnv is the environment of a program that calls sts.
func stsEnv(sts *ststest.Server) []string {
	keyID, secret := sts.Keys()
	return append(stack.NoAWSFiles(), "AWS_ACCESS_KEY_ID="+keyID, "AWS_SECRET_ACCESS_KEY="+secret.Reveal(), "AWS_SESSION_TOKEN=")
}

// coldStart is the result of one start of a broker among pods.
type coldStart struct {
	calls int
	took  time.Duration
}

// warmTimeout bounds one start, on a machine that does other work too. 5,000 sessions take 13 s at 400 calls a second.
const warmTimeout = 2 * time.Minute

// coldStarts starts brokers among pods, one after the other.
func (w *world) coldStarts(pods, roles int, limit xrate.Limit, value func(coldStart) float64) []measurement {
	return w.repeat(w.runs, func(w *world, _ int) measurement { return measurement{Value: value(w.coldStart(pods, roles, limit))} })
}

func (w *world) coldStart(pods, roles int, limit xrate.Limit) coldStart {
	ctx, cancel := context.WithTimeout(w.ctx, warmTimeout)
	defer cancel()
	sts := w.startSTS(100 * time.Millisecond)
	for _, variable := range stsEnv(sts) { // which assume.New reads
		name, value, _ := strings.Cut(variable, "=")
		check(os.Setenv(name, value))
	}
	source := must(assume.New(ctx, assume.Config{Region: region, Endpoint: sts.URL()}))
	sessions := must(cache.New(cache.Config[policy.Grant]{Source: source, Rate: limit, Logger: discard}))
	rules := newRules()
	requests := make([]*policy.Request, roles)
	for i := range requests {
		requests[i] = rules.Keys().Request(map[string]string{policy.DefaultPrefix + "/" + string(policy.Role): fmt.Sprintf("bench-%d", i)})
	}
	all := make(map[string]policy.Pod, pods)
	for i := range pods {
		pod := policy.Pod{
			Namespace: fmt.Sprintf("ns-%d", i%podNamespaces), Name: fmt.Sprintf("pod-%d", i), ServiceAccount: "default",
			Request: requests[i%roles],
		}
		all[pod.Namespace+"/"+pod.Name] = pod
	}
	prefetch := must(broker.NewPrefetch(broker.PrefetchConfig{
		Lookup: func(key string) (policy.Pod, policy.Namespace, bool) {
			pod, ok := all[key]
			return pod, optedIn(pod.Namespace), ok
		},
		Sessions: sessions, Logger: discard,
	}))
	for _, run := range []func(context.Context) error{sessions.Run, func(ctx context.Context) error { return prefetch.Run(ctx, rules) }} {
		go func() { _ = run(ctx) }()
	}
	began := time.Now()
	for key := range all {
		prefetch.Changed(key)
	}
	for sessions.Stats().Warm < roles {
		if ctx.Err() != nil {
			check(fmt.Errorf("only %d of %d roles are warm: %w", sessions.Stats().Warm, roles, ctx.Err()))
		}
		time.Sleep(5 * time.Millisecond)
	}
	return coldStart{calls: sts.Count("AssumeRole", ""), took: time.Since(began)}
}

// program is a broker that runs as a program.
type program struct {
	*process.Process

	admin string
	sts   *ststest.Server
}

// startBroker starts a broker at an address with more flags. It is stopped when the world ends.
func (w *world) startBroker(kubeconfig string, t trust, sts *ststest.Server, address string, flags ...string) program {
	admin := freeAddress(w.ctx)
	p := must(w.programs.Start(process.Command{
		Name: "credence-broker-" + filepath.Base(filepath.Dir(kubeconfig)) + "-" + address,
		Path: w.build(w.ctx, "cmd/broker", "credence-broker"), Env: stsEnv(sts),
		Args: append([]string{
			"--listen=" + address, "--admin-listen=" + admin, "--debug-listen=", "--kubeconfig=" + kubeconfig, "--roots-file=",
			"--tls-cert=" + t.certFile, "--tls-key=" + t.keyFile, "--audience=" + audience,
			"--sts-endpoint=" + sts.URL(), "--region=" + region, "--base-arn=arn:aws:iam::" + account + ":role/",
		}, flags...),
	}))
	w.Cleanup(func() { p.Stop(stopGrace) })
	return program{p, admin, sts}
}

// await waits until a condition of a broker has no error.
func (w *world) await(p program, condition func() error) {
	ctx, cancel := context.WithTimeout(w.ctx, warmTimeout)
	defer cancel()
	check(p.WaitReady(ctx, func(context.Context) error { return condition() }))
}

// ready waits until a broker is ready and STS has had that many calls.
func (w *world) ready(p program, calls int) {
	w.await(p, func() error {
		if n := p.sts.Count("AssumeRole", ""); n < calls {
			return fmt.Errorf("%d of %d sessions are warm", n, calls)
		}
		request := must(http.NewRequestWithContext(w.ctx, http.MethodGet, "http://"+p.admin+"/readyz", nil))
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	})
}

// resident starts a broker for each run and each kind of API server, and reads a line of /proc/PID/status when it is
// warm. A run has the largest value, so that no median hides the cost of one kind of API server.
func (w *world) resident(pods int, line string, relist bool, streams ...bool) []measurement {
	needsProc(line)
	return w.repeat(min(w.runs, 3), func(w *world, _ int) (r measurement) { // Equal processes differ by a few percent.
		for _, streams := range streams {
			api, kubeconfig := w.servePods(pods, streams)
			p := w.startBroker(kubeconfig, w.newTrust(), w.startSTS(0), freeAddress(w.ctx))
			w.ready(p, podRoles)
			if relist {
				listed := api.lists.Load()
				select {
				case api.expire <- struct{}{}:
				case <-p.Done():
					check(p.Err())
				}
				w.await(p, func() error {
					if api.lists.Load() == listed {
						return errors.New("the broker has not listed pods again")
					}
					return nil
				})
			}
			w.sleep(settle) // until the broker has processed the list
			r.Value = max(r.Value, procBytes(p.PID(), line))
			p.Stop(stopGrace)
		}
		return r
	})
}

const (
	failoverBrokers = 3
	// failoverClients are many and call rarely, so that each is a sidecar that calls once during the loss.
	failoverClients = 600
	failoverPause   = 6 * time.Second
	failoverRoles   = 100
	// noticing is how long the lost broker stays in DNS. Kubernetes removes an ended process after a second or two,
	// DNS caches up to 5 s more, and a lost node is noticed after 40 s.
	noticing = 5 * time.Second
	// calm is how long clients call before the loss and after it.
	calm = 2 * time.Second

	brokerNamespace, brokerService = "credence", "credence-broker"
)

// failover is the result of the loss of one broker.
type failover struct {
	failed int           // calls
	p99    time.Duration // of calls that began while the loss was not noticed
}

// failovers loses brokers, one killed and one stopped for each run. It does so once for all metrics.
func (w *world) failovers(value func(failover) float64) (runs []measurement) {
	if w.losses == nil {
		var losses []failover
		for range min(w.runs, 3) {
			killed := must(inWorld(w.ctx, w.bench, func(w *world) failover { return w.failover(syscall.SIGKILL) }))
			stopped := must(inWorld(w.ctx, w.bench, func(w *world) failover { return w.failover(syscall.SIGSTOP) }))
			losses = append(losses, failover{killed.failed + stopped.failed, max(killed.p99, stopped.p99)})
		}
		w.losses = losses
	}
	for _, f := range w.losses {
		runs = append(runs, measurement{Value: value(f)})
	}
	return runs
}

// failover starts brokers, lets clients call them, and sends a signal to one broker.
func (w *world) failover(sig syscall.Signal) (result failover) {
	f, clients := w.startBrokers()
	ctx, stop := context.WithCancel(w.ctx)
	defer stop()
	var mu sync.Mutex
	var took []time.Duration // guarded by mu
	var lost atomic.Pointer[time.Time]
	var calling sync.WaitGroup
	for i, c := range clients {
		calling.Go(func() {
			for wait := failoverPause * time.Duration(i) / failoverClients; ; wait = failoverPause {
				select {
				case <-time.After(wait):
				case <-ctx.Done():
					return
				}
				began := time.Now()
				_, err := c.Credentials(context.WithoutCancel(ctx))
				mu.Lock()
				if err != nil {
					result.failed++
				}
				if at := lost.Load(); at != nil && !began.Before(*at) && began.Before(at.Add(noticing)) {
					took = append(took, time.Since(began))
				}
				mu.Unlock()
			}
		})
	}
	w.sleep(calm)
	lost.Store(new(time.Now()))
	check(syscall.Kill(f.programs[0].PID(), sig))
	w.sleep(noticing)
	f.set((*f.dns.Load())[1:])
	w.sleep(calm)
	stop()
	calling.Wait()
	if len(took) == 0 {
		check(errors.New("no client called while a broker was lost"))
	}
	slices.Sort(took)
	result.p99 = took[len(took)*99/100]
	return result
}

// brokers are programs that share the work.
type brokers struct {
	*world

	api      *apitest.Server
	port     string
	trust    trust
	programs []program
	dns      atomic.Pointer[[]netip.Addr]
}

// set sets the addresses in DNS and in the EndpointSlice. A real API server accepts no loopback addresses, which brokers
// have here.
func (f *brokers) set(addresses []netip.Addr) {
	f.dns.Store(&addresses)
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: brokerNamespace, Name: brokerService, Labels: map[string]string{discoveryv1.LabelServiceName: brokerService},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, a := range addresses {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{a.String()}})
	}
	f.api.Put(slice)
}

// startBrokers returns when all brokers are ready and two of them have each session, and returns the clients of the pods'
// sidecars.
func (w *world) startBrokers() (*brokers, []*client.Client) {
	f := &brokers{world: w, api: apitest.Start(w), port: strconv.Itoa(must(process.FreePort(w.ctx))), trust: w.newTrust()}
	clients := f.sidecars()
	var addresses []netip.Addr
	for i := range failoverBrokers {
		addresses = append(addresses, netip.AddrFrom4([4]byte{127, 0, 0, byte(2 + i)}))
	}
	f.set(addresses)
	kubeconfig, sts := f.api.Kubeconfig(w), w.startSTS(0)
	for _, a := range addresses {
		p := w.startBroker(kubeconfig, f.trust, sts, net.JoinHostPort(a.String(), f.port),
			"--namespace="+brokerNamespace, "--service="+brokerService, "--pod-ips="+a.String(), "--settle-time=1s")
		w.Cleanup(func() { _ = syscall.Kill(p.PID(), syscall.SIGCONT) }) // runs before its stop, which a stopped program ignores
		f.programs = append(f.programs, p)
	}
	for _, p := range f.programs {
		w.ready(p, placement.Owners*failoverRoles)
	}
	return f, clients
}

// sidecars makes injected pods, and returns the client of each pod's sidecar.
func (f *brokers) sidecars() (clients []*client.Client) {
	keys, dir := must(policy.NewKeys(policy.DefaultPrefix)), f.TempDir()
	ns, account := optedIn(namespace), &corev1.ServiceAccount{}
	account.Namespace, account.Name = namespace, "default"
	f.api.Put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: ns.Labels, Annotations: ns.Annotations}}, account)
	for i := range failoverClients {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: fmt.Sprint("pod-", i), Labels: map[string]string{keys.Name(policy.Injected): "true"},
			Annotations: map[string]string{keys.Name(policy.Role): fmt.Sprint("bench-", i%failoverRoles)},
		}}
		pod.Spec.ServiceAccountName = account.Name
		f.api.Put(pod)
		bound := policy.Pod{
			Namespace: namespace, Name: pod.Name, UID: string(pod.UID), ServiceAccount: account.Name, Request: keys.Request(pod.Annotations),
		}
		token := f.api.Token(f, pod, apitest.Token{Audience: audience})
		clients = append(clients, newClient(filepath.Join(dir, fmt.Sprint("token-", i)), token, client.Config{
			Target: net.JoinHostPort(serverName, f.port), TLS: f.trust.client(), RoutingKey: must(bound.RoutingKey()),
			Lookup: func(context.Context, string, string) ([]netip.Addr, error) { return *f.dns.Load(), nil },
		}))
	}
	return clients
}
