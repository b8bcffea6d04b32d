//go:build unix

package main

import (
	"encoding/json"
	"net/http"
	"strconv"
	"sync"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const (
	brokerNamespace, brokerService = "credence", "credence-broker"

	slicesPath = "/apis/discovery.k8s.io/v1/namespaces/" + brokerNamespace + "/endpointslices"
)

// endpoints is the EndpointSlice of the brokers' Service. A real API server takes no loopback addresses, which is what
// brokers have here.
type endpoints struct {
	mu      sync.Mutex
	ready   []string      // guarded by mu
	version int           // guarded by mu
	changed chan struct{} // closed at the next change; nil before anybody watches; guarded by mu
}

// set says which brokers are ready.
func (e *endpoints) set(ready ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ready = ready
	e.version++
	if e.changed != nil {
		close(e.changed)
		e.changed = nil
	}
}

// look returns the slice, and what is closed when there is a newer one.
func (e *endpoints) look() (*discoveryv1.EndpointSlice, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.changed == nil {
		e.changed = make(chan struct{})
	}
	s := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: brokerNamespace, Name: brokerService, ResourceVersion: strconv.Itoa(e.version),
			Labels: map[string]string{discoveryv1.LabelServiceName: brokerService},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, address := range e.ready {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	return s, e.changed
}

// serve answers a list or a watch.
func (e *endpoints) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	encoder := json.NewEncoder(w)
	slice, changed := e.look()
	switch {
	case r.URL.Query().Get("sendInitialEvents") == "true":
		w.WriteHeader(http.StatusUnprocessableEntity)
		_ = encoder.Encode(gone(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"))
		return
	case r.URL.Query().Get("watch") != "true":
		list := &discoveryv1.EndpointSliceList{TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"}, Items: []discoveryv1.EndpointSlice{*slice}}
		list.ResourceVersion = slice.ResourceVersion
		_ = encoder.Encode(list)
		return
	}
	for since := r.URL.Query().Get("resourceVersion"); ; slice, changed = e.look() {
		if slice.ResourceVersion != since {
			since = slice.ResourceVersion
			if encoder.Encode(metav1.WatchEvent{Type: "MODIFIED", Object: runtime.RawExtension{Object: slice}}) != nil {
				return
			}
		}
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}
