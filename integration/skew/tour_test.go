//go:build unix

package skew_test

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/stack"
)

// The parts that an upgrade replaces, each in its own step.
const (
	webhookPart = iota
	brokerPart
	imagePart // the image of new pods' sidecars
	parts
)

// state has the version of each part: 0 for the previous one, 1 for this one.
type state [parts]int

func (s state) flip(part int) state {
	s[part] = 1 - s[part]
	return s
}

func (s state) String() string {
	return fmt.Sprintf("webhook %s, broker %s, sidecar image %s", versions[s[webhookPart]].name, versions[s[brokerPart]].name, versions[s[imagePart]].name)
}

// tour returns a walk over all states that makes each step between two neighbors once in each direction. It begins and
// ends with the previous version.
func tour() (walk []state) {
	made := make(map[state][parts]bool)
	var visit func(state)
	visit = func(s state) {
		for part := range parts {
			if steps := made[s]; !steps[part] {
				steps[part] = true
				made[s] = steps
				visit(s.flip(part))
			}
		}
		walk = append(walk, s)
	}
	visit(state{})
	return walk
}

// world is Credence with programs of both versions. Pods and the API server reach them through fronts.
type world struct {
	brokers, webhooks *front
	broker, webhook   *stack.Stack // those that run
	started           int
	ending            sync.WaitGroup // programs that shut down
}

// flags are the flags of a version's webhook and of its command "credence inject". The memory of a sidecar shows which version
// injected it.
func (w *world) flags(v, image version) []string {
	return append(credence.InjectFlags(),
		"--broker=localhost:"+strconv.Itoa(w.brokers.port()), "--sidecar-image="+image.image(), "--sidecar-memory="+v.memory)
}

// next returns a place for a further program.
func (w *world) next(t *testing.T, v version) *stack.Stack {
	t.Helper()
	w.started++
	s, err := credence.Beside(t.Context(), fmt.Sprintf("%s-%d", v.name, w.started), v.programs)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// updateWebhook replaces the webhook, a new one ready before the old one shuts down.
func (w *world) updateWebhook(t *testing.T, v, image version) {
	t.Helper()
	next, old := w.next(t, v), w.webhook
	if err := next.StartWebhook(t.Context(), w.flags(v, image)...); err != nil {
		t.Fatal(err)
	}
	w.webhooks.set(next.Webhook.Address)
	w.webhook = next
	if old != nil {
		w.ending.Go(old.Webhook.ShutDown)
	}
}

// updateBroker replaces the broker in the same way. It calls mixed while both run.
func (w *world) updateBroker(t *testing.T, v version, mixed func()) {
	t.Helper()
	next, old := w.next(t, v), w.broker
	address := fmt.Sprintf("10.0.0.%d", w.started) // The API server refuses loopback addresses of endpoints. Brokers only compare them.
	slices := credence.Client.DiscoveryV1().EndpointSlices(stack.SystemNamespace)
	slice, err := slices.Create(t.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: sliceOf(next), Labels: map[string]string{discoveryv1.LabelServiceName: "credence-broker"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{address}, Conditions: discoveryv1.EndpointConditions{Ready: new(false)}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := next.StartBroker(t.Context(), "--service=credence-broker", "--pod-ips="+address, "--settle-time=1s"); err != nil {
		t.Fatal(err)
	}
	slice.Endpoints[0].Conditions.Ready = new(true)
	if _, err := slices.Update(t.Context(), slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	endpoints := []string{next.Broker.Address}
	if old != nil {
		endpoints = append(endpoints, old.Broker.Address)
	}
	w.brokers.set(endpoints...)
	w.broker = next
	if old == nil {
		return
	}
	mixed()
	w.brokers.set(next.Broker.Address)
	if err := slices.Delete(t.Context(), sliceOf(old), metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.ending.Go(old.Broker.ShutDown)
}

// sliceOf returns the name of the EndpointSlice with the broker.
func sliceOf(s *stack.Stack) string { return strings.ReplaceAll(s.Broker.Address, ":", "-") }

// begin starts the previous version, and has the API server call its webhook.
func begin(t *testing.T) *world {
	t.Helper()
	w := &world{brokers: newFront(t), webhooks: newFront(t)}
	t.Cleanup(func() {
		for _, s := range []*stack.Stack{w.broker, w.webhook} {
			if s != nil {
				s.Broker.ShutDown()
				s.Webhook.ShutDown()
			}
		}
		w.ending.Wait()
	})
	w.updateBroker(t, versions[0], nil)
	w.updateWebhook(t, versions[0], versions[0])
	configurations := credence.Client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	registered, err := configurations.Get(t.Context(), "credence", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	registered.Webhooks[0].ClientConfig.URL = new("https://" + w.webhooks.Addr().String() + "/mutate")
	if _, err := configurations.Update(t.Context(), registered, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	ns := namespace(t, "registration")
	await.Until(t, "the API server calls the webhooks through their front", func() error {
		if _, err := dryRun(t.Context(), ns, pod("p")); err != nil {
			return await.Never{Err: err}
		}
		if !w.webhooks.used() {
			return errors.New("no connection arrived")
		}
		return nil
	})
	credence.Broker.ShutDown()
	w.ending.Go(credence.Webhook.ShutDown)
	return w
}

// TestEveryOrderOfUpgrade replaces one part after the other, by this version and back, in all orders, under load. While
// that happens, the API server admits each pod with a sidecar, and all old and new sidecars get and renew credentials. So
// do new pods, those of all earlier states and those whose manifests have the sidecar of either version already.
func TestEveryOrderOfUpgrade(t *testing.T) {
	installPolicies(t)
	w := begin(t)
	walk := tour()
	steps := make(map[[2]state]bool)
	for n := range len(walk) - 1 {
		steps[[2]state{walk[n], walk[n+1]}] = true
	}
	if len(steps) != 24 || walk[0] != (state{}) {
		t.Fatalf("the tour begins with %v and makes %d different steps, want 24", walk[0], len(steps))
	}
	l := startLoad(t, namespace(t, "load"))
	p := newPods(t, w)
	for n, now := range walk {
		changed := "nothing"
		began := time.Now()
		switch {
		case n == 0:
		case now[brokerPart] != walk[n-1][brokerPart]:
			changed = "broker"
			w.updateBroker(t, versions[now[brokerPart]], func() { p.check(t, "while both brokers run, before "+now.String()) })
		default:
			changed = "webhook or image"
			w.updateWebhook(t, versions[now[webhookPart]], versions[now[imagePart]])
			p.awaitWebhook(t, now)
		}
		p.create(t, now)
		if changed == "broker" {
			p.check(t, now.String())
		}
		l.check(t, now.String())
		t.Logf("step %d, changed %s: %s; %.1f s", n, changed, now, time.Since(began).Seconds())
		if t.Failed() {
			t.FailNow()
		}
	}
	rotate(t, w, p, l)
	p.end(t)
	l.end(t)
}

// rotate replaces the root certificate while brokers of both versions run. Either may publish it.
func rotate(t *testing.T, w *world, p *pods, l *load) {
	t.Helper()
	w.updateBroker(t, versions[1], func() {
		l.roots.Lock()
		err := credence.RotateCertificates(t.Context())
		l.roots.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		for _, lasting := range p.lasting {
			if err := lasting.sidecar.WriteVolumes(t.Context()); err != nil { // as the kubelet does
				t.Fatal(err)
			}
		}
		for _, address := range w.brokers.to {
			await.Until(t, "the broker serves a certificate of the new root", func() error {
				if newest, err := credence.ServedBy(t.Context(), address); !newest {
					return errors.Join(err, errors.New("it does not"))
				}
				return nil
			})
		}
		p.check(t, "after a rotation while both brokers run")
	})
}

// freeOfErrors fails the test if the log of a program has a warning or an error.
func freeOfErrors(t *testing.T, what, log string) {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, `"level":"WARN"`) || strings.Contains(line, `"level":"ERROR"`) || strings.Contains(line, "FAILED") {
			t.Errorf("%s: %s", what, line)
		}
	}
}
