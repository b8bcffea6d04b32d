//go:build unix

package kube_test

import (
	"fmt"
	"net/netip"
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

// slice creates or updates an EndpointSlice of a Service. Each endpoint is an address and a state: "10.0.0.1 ready",
// starting, ending, or unset for an endpoint without conditions.
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
		case "ending": // it still serves
			e.Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
		case "unset":
		default:
			t.Fatalf("unknown state %q", state)
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

// updates records the last update that a broker got.
type updates struct {
	mu   sync.Mutex
	last placement.Members // guarded by mu
}

func (w *updates) add(m placement.Members) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, list := range [][]netip.Addr{m.Ready, m.Starting} {
		slices.SortFunc(list, netip.Addr.Compare)
	}
	w.last = m
}

func (w *updates) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return fmt.Sprintf("self %s, ready %v, starting %v, ending %v", w.last.Self, w.last.Ready, w.last.Starting, w.last.ShuttingDown)
}

func (w *updates) want(t *testing.T, want string) {
	t.Helper()
	eventually(t, "the broker gets the update "+want, func() bool { return w.String() == want })
}

// follow watches the endpoints of the brokers' Service as the broker with these addresses.
func follow(t *testing.T, ns string, own ...string) *updates {
	t.Helper()
	w := new(updates)
	var addresses []netip.Addr
	for _, a := range own {
		addresses = append(addresses, netip.MustParseAddr(a))
	}
	e, err := kube.NewEndpoints(kube.EndpointsConfig{
		REST: control.Config(), Namespace: ns, Service: brokers, Own: addresses, Update: w.add, Patience: time.Hour, Logger: logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	background(t, e.Run)
	return w
}

// TestEndpoints shows that brokers follow the slices of their Service. Package kube tests in virtual time that a broker
// waits until it is listed, and that it keeps the last list if the Service has no endpoints.
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

// TestEndpointsOfTwoFamilies shows that all brokers identify each other by the same IP family if the Service has two.
func TestEndpointsOfTwoFamilies(t *testing.T) {
	ns := namespace(t)
	slice(t, ns, brokers, brokers+"-6", discoveryv1.AddressTypeIPv6, "fd00::1 ready", "fd00::2 ready")
	six := follow(t, ns, "fd00::1")
	six.want(t, "self fd00::1, ready [fd00::1 fd00::2], starting [], ending false")
	slice(t, ns, brokers, brokers+"-4", discoveryv1.AddressTypeIPv4, "10.0.0.1 ready", "10.0.0.2 ready")
	both := follow(t, ns, "fd00::1", "10.0.0.1")
	both.want(t, "self 10.0.0.1, ready [10.0.0.1 10.0.0.2], starting [], ending false")
}

// TestEndpointsOfAnAddressThatIsUsedAgain covers a new pod with the address of a pod that is still listed.
func TestEndpointsOfAnAddressThatIsUsedAgain(t *testing.T) {
	ns := namespace(t)
	slice(t, ns, brokers, brokers+"-1", discoveryv1.AddressTypeIPv4, "10.0.0.1 ending", "10.0.0.1 starting", "10.0.0.2 ready")
	follow(t, ns, "10.0.0.1").want(t, "self 10.0.0.1, ready [10.0.0.2], starting [10.0.0.1], ending false")
}
