package kube_test

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/placement"
)

// oneSlice is an API server with one EndpointSlice, of which it serves lists and watches.
type oneSlice struct {
	mu      sync.Mutex
	version int                       // guarded by mu
	slice   discoveryv1.EndpointSlice // guarded by mu
	changed chan struct{}             // closed at the next change; guarded by mu
	cut     chan struct{}             // closed to end all watches
}

// put makes these addresses the ready endpoints.
func (s *oneSlice) put(addresses ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.slice = discoveryv1.EndpointSlice{
		TypeMeta:    metav1.TypeMeta{Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"},
		ObjectMeta:  metav1.ObjectMeta{Namespace: "credence", Name: "b-1", ResourceVersion: strconv.Itoa(s.version)},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, address := range addresses {
		s.slice.Endpoints = append(s.slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *oneSlice) state() (discoveryv1.EndpointSlice, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.slice, s.changed
}

func (s *oneSlice) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(rw)
	slice, changed := s.state()
	switch q := r.URL.Query(); {
	case q.Get("sendInitialEvents") == "true":
		rw.WriteHeader(http.StatusUnprocessableEntity)
		_ = encoder.Encode(gone(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid))
	case q.Get("watch") != "true":
		_ = encoder.Encode(discoveryv1.EndpointSliceList{
			TypeMeta: metav1.TypeMeta{Kind: "EndpointSliceList", APIVersion: "discovery.k8s.io/v1"},
			ListMeta: metav1.ListMeta{ResourceVersion: slice.ResourceVersion}, Items: []discoveryv1.EndpointSlice{slice},
		})
	default:
		seen := q.Get("resourceVersion")
		for {
			if slice.ResourceVersion != seen {
				seen = slice.ResourceVersion
				_ = encoder.Encode(map[string]any{"type": "MODIFIED", "object": slice})
			}
			_ = http.NewResponseController(rw).Flush()
			select {
			case <-changed:
			case <-s.cut:
				return
			case <-r.Context().Done():
				return
			}
			slice, changed = s.state()
		}
	}
}

// TestPatienceWithEndpoints: the first Update waits for this broker to be listed for 5 s from the moment on at which there are
// endpoints, and for as long as it takes until there are.
func TestPatienceWithEndpoints(t *testing.T) {
	for name, tt := range map[string]struct {
		listed time.Duration // after the others
		told   time.Duration
		ready  []string
	}{
		"it is listed":           {2 * time.Second, 2 * time.Second, []string{"10.0.0.1", "10.0.0.2"}},
		"it is listed with them": {0, 0, []string{"10.0.0.1", "10.0.0.2"}},
		"it is never listed":     {time.Hour, 5 * time.Second, []string{"10.0.0.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := &oneSlice{changed: make(chan struct{}), cut: make(chan struct{})}
				server.put()
				told := make(chan placement.Members, 100)
				e, err := kube.NewEndpoints(kube.EndpointsConfig{
					REST: serve(t, server, nil), Namespace: "credence", Service: "b", Own: []netip.Addr{netip.MustParseAddr("10.0.0.2")},
					Update: func(m placement.Members) { told <- m }, Logger: slog.New(slog.DiscardHandler),
				})
				if err != nil {
					t.Fatal(err)
				}
				ctx, stop := withCancel(t)
				done := make(chan struct{})
				go func() { defer close(done); _ = e.Run(ctx) }()
				t.Cleanup(func() { stop(); close(server.cut); <-done })

				time.Sleep(time.Hour)
				synctest.Wait()
				if len(told) > 0 {
					t.Errorf("while there are no endpoints it is told %v", <-told)
				}
				began := time.Now()
				if tt.listed > 0 {
					server.put("10.0.0.1")
				}
				go func() {
					time.Sleep(tt.listed)
					server.put("10.0.0.1", "10.0.0.2")
				}()
				m := <-told
				if took := time.Since(began); took != tt.told {
					t.Errorf("it is told after %s, want %s", took, tt.told)
				}
				var ready []string
				for _, address := range m.Ready {
					ready = append(ready, address.String())
				}
				if slices.Sort(ready); !slices.Equal(ready, tt.ready) {
					t.Errorf("it is told of %q, want %q", ready, tt.ready)
				}
				// A Service without endpoints makes nobody the only broker.
				time.Sleep(2 * time.Hour)
				synctest.Wait()
				for len(told) > 0 {
					<-told
				}
				server.put()
				time.Sleep(time.Hour)
				synctest.Wait()
				if len(told) > 0 {
					t.Errorf("when there are no endpoints any more it is told %v", <-told)
				}
			})
		})
	}
}
