package kube_test

import (
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/placement"
)

// newSlice returns the Service's EndpointSlice with these ready addresses.
func newSlice(addresses ...string) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "credence", Name: "b-1", Labels: map[string]string{discoveryv1.LabelServiceName: "b"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, address := range addresses {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	return slice
}

// TestPatienceWithEndpoints: the first Update waits without limit for endpoints, and then 5 s for this broker to be among them.
func TestPatienceWithEndpoints(t *testing.T) {
	for name, tt := range map[string]struct {
		listed time.Duration // after the other broker
		update time.Duration
		ready  []string
	}{
		"it is listed":                  {2 * time.Second, 2 * time.Second, []string{"10.0.0.1", "10.0.0.2"}},
		"it is listed at the same time": {0, 0, []string{"10.0.0.1", "10.0.0.2"}},
		"it is never listed":            {time.Hour, 5 * time.Second, []string{"10.0.0.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := apitest.Start(t)
				server.Put(newSlice())
				updates := make(chan placement.Members, 100)
				e, err := kube.NewEndpoints(kube.EndpointsConfig{
					REST: server.Config(), Namespace: "credence", Service: "b", Own: []netip.Addr{netip.MustParseAddr("10.0.0.2")},
					Update: func(m placement.Members) { updates <- m }, Logger: slog.New(slog.DiscardHandler),
				})
				if err != nil {
					t.Fatal(err)
				}
				ctx, stop := withCancel(t)
				done := make(chan struct{})
				go func() { defer close(done); _ = e.Run(ctx) }()
				t.Cleanup(func() { stop(); <-done })

				time.Sleep(time.Hour)
				synctest.Wait()
				if len(updates) > 0 {
					t.Errorf("without endpoints Update receives %v", <-updates)
				}
				began := time.Now()
				if tt.listed > 0 {
					server.Put(newSlice("10.0.0.1"))
				}
				go func() {
					time.Sleep(tt.listed)
					server.Put(newSlice("10.0.0.1", "10.0.0.2"))
				}()
				m := <-updates
				if took := time.Since(began); took != tt.update {
					t.Errorf("Update is called after %s, want %s", took, tt.update)
				}
				var ready []string
				for _, address := range m.Ready {
					ready = append(ready, address.String())
				}
				if slices.Sort(ready); !slices.Equal(ready, tt.ready) {
					t.Errorf("Update receives %q, want %q", ready, tt.ready)
				}
				// If the Service loses its endpoints, the broker does not think it is alone.
				time.Sleep(2 * time.Hour)
				synctest.Wait()
				for len(updates) > 0 {
					<-updates
				}
				server.Put(newSlice())
				time.Sleep(time.Hour)
				synctest.Wait()
				if len(updates) > 0 {
					t.Errorf("after the endpoints are gone Update receives %v", <-updates)
				}
			})
		})
	}
}
