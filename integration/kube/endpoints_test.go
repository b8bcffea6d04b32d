//go:build unix

package kube_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/placement"
)

const brokers = "credence-broker"

// slice makes or changes an EndpointSlice of the brokers' Service. Each endpoint is an address with a state behind it:
// "10.0.0.1 ready", starting, ending, or unset for one without conditions.
func slice(t *testing.T, ns, service, name string, family discoveryv1.AddressType, endpoints ...string) {
	t.Helper()
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: family,
		Endpoints:   []discoveryv1.Endpoint{},
	}
	for _, text := range endpoints {
		var address, state string
		if _, err := fmt.Sscan(text, &address, &state); err != nil {
			t.Fatal(err)
		}
		e := discoveryv1.Endpoint{Addresses: []string{address}}
		switch state {
		case "ready":
			e.Conditions = discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)}
		case "starting":
			e.Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(false)}
		case "ending": // it still answers
			e.Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
		case "unset":
		default:
			t.Fatalf("no state %q", state)
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	all := client.DiscoveryV1().EndpointSlices(ns)
	_, err := all.Create(t.Context(), s, metav1.CreateOptions{})
	if err != nil {
		_, err = all.Update(t.Context(), s, metav1.UpdateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// told is what a broker was told last.
type told struct {
	mu   sync.Mutex
	last placement.Members // guarded by mu
	n    int               // of different ones; guarded by mu
}

func (w *told) update(m placement.Members) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, list := range [][]netip.Addr{m.Ready, m.Starting} {
		slices.SortFunc(list, netip.Addr.Compare)
	}
	// One event may be told twice: the store has the next one before the loop has read the last, and then it reads the same
	// once more. Only what differs counts, to the broker as well (placement.Update).
	if w.n == 0 || !reflect.DeepEqual(m, w.last) {
		w.last, w.n = m, w.n+1
	}
}

func (w *told) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return fmt.Sprintf("self %s, ready %v, starting %v, ending %v", w.last.Self, w.last.Ready, w.last.Starting, w.last.Ending)
}

func (w *told) want(t *testing.T, want string) {
	t.Helper()
	eventually(t, "the broker is told "+want, func() bool { return w.String() == want })
}

// follow watches the endpoints of the brokers' Service as one of them.
func follow(t *testing.T, ns string, own ...string) *told {
	t.Helper()
	w := new(told)
	var addresses []netip.Addr
	for _, a := range own {
		addresses = append(addresses, netip.MustParseAddr(a))
	}
	e, err := kube.NewEndpoints(kube.EndpointsConfig{
		REST: control.Config(), Namespace: ns, Service: brokers, Own: addresses, Update: w.update, Patience: time.Hour, Logger: logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	background(t, e.Run)
	return w
}

func TestEndpoints(t *testing.T) {
	ns := namespace(t)
	slice(t, ns, "other", "other-1", discoveryv1.AddressTypeIPv4, "10.9.9.9 ready")
	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready", "10.0.0.2 starting", "10.0.0.3 ending", "10.0.0.4 unset")
	// A Service may have more than a hundred endpoints, and then more than one slice.
	slice(t, ns, brokers, brokers+"-2", discoveryv1.AddressTypeIPv4, "10.0.1.1 ready")
	first, last := follow(t, ns, "10.0.0.1"), follow(t, ns, "10.0.0.3")
	first.want(t, "self 10.0.0.1, ready [10.0.0.1 10.0.0.4 10.0.1.1], starting [10.0.0.2], ending false")
	last.want(t, "self 10.0.0.3, ready [10.0.0.1 10.0.0.4 10.0.1.1], starting [10.0.0.2], ending true")

	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready", "10.0.0.2 ready")
	first.want(t, "self 10.0.0.1, ready [10.0.0.1 10.0.0.2 10.0.1.1], starting [], ending false")
	if err := client.DiscoveryV1().EndpointSlices(ns).Delete(t.Context(), brokers+"-2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	first.want(t, "self 10.0.0.1, ready [10.0.0.1 10.0.0.2], starting [], ending false")
}

// Where the Service has two families, brokers are told apart by one of them, the same for all.
func TestEndpointsOfTwoFamilies(t *testing.T) {
	ns := namespace(t)
	slice(t, ns, brokers, brokers+"-6", discoveryv1.AddressTypeIPv6, "fd00::1 ready", "fd00::2 ready")
	six := follow(t, ns, "fd00::1")
	six.want(t, "self fd00::1, ready [fd00::1 fd00::2], starting [], ending false")
	slice(t, ns, brokers, brokers+"-4", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready", "10.0.0.2 ready")
	both := follow(t, ns, "fd00::1", "10.0.0.1")
	both.want(t, "self 10.0.0.1, ready [10.0.0.1 10.0.0.2], starting [], ending false")
}

// A broker that starts is listed a second later; the others are not to be taken for all there are. For how long it waits
// is tested where the clock is not a real one, in package kube.
func TestBrokerThatIsNotListedYet(t *testing.T) {
	ns := namespace(t)
	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready")
	late := follow(t, ns, "10.0.0.2")
	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready", "10.0.0.2 starting")
	late.want(t, "self 10.0.0.2, ready [10.0.0.1], starting [10.0.0.2], ending false")
	late.mu.Lock()
	if late.n != 1 {
		t.Errorf("it was told of %d sets of brokers", late.n)
	}
	late.mu.Unlock()
}

// While nobody is named, what was told holds: a Service that is made anew makes nobody the only one.
func TestEndpointsOfNobody(t *testing.T) {
	ns := namespace(t)
	first := follow(t, ns, "10.0.0.1")
	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4)
	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready", "10.0.0.2 ready")
	const both = "self 10.0.0.1, ready [10.0.0.1 10.0.0.2], starting [], ending false"
	first.want(t, both)
	first.mu.Lock()
	told := first.n
	first.mu.Unlock()
	if told != 1 {
		t.Errorf("it was told of %d sets of brokers, and there was one", told)
	}
	if err := client.DiscoveryV1().EndpointSlices(ns).Delete(t.Context(), brokers+"-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	slice(t, ns, brokers, brokers+"-2", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready", "10.0.0.3 ready")
	first.want(t, "self 10.0.0.1, ready [10.0.0.1 10.0.0.3], starting [], ending false")
	first.mu.Lock()
	defer first.mu.Unlock()
	if first.n != 2 {
		t.Errorf("it was told %d times of two sets of brokers", first.n)
	}
}

// A new pod can have the address of one that is still listed.
func TestEndpointsOfAnAddressThatIsUsedAgain(t *testing.T) {
	ns := namespace(t)
	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4, "10.0.0.1 ending", "10.0.0.1 starting", "10.0.0.2 ready")
	follow(t, ns, "10.0.0.1").want(t, "self 10.0.0.1, ready [10.0.0.2], starting [10.0.0.1], ending false")
}
