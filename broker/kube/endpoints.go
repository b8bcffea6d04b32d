package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	discoveryv1client "k8s.io/client-go/kubernetes/typed/discovery/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/credence-iam/credence/broker/placement"
)

// EndpointsConfig configures [NewEndpoints].
type EndpointsConfig struct {
	// REST reaches the API server. Required.
	REST *rest.Config
	// Namespace and Service name the brokers' Service. Required.
	Namespace, Service string
	// Own are the addresses of this broker's pod, one per address family. Required.
	Own []netip.Addr
	// Update receives the brokers when they are known and after each change. It must not block. Required.
	Update func(placement.Members)
	// Patience is how long the first Update waits, once there are endpoints, until this broker is among them. That usually
	// takes a second, and brokers that start together then see each other. Default 5 s.
	Patience time.Duration
	// Logger. Required.
	Logger *slog.Logger
}

// Endpoints watches the list of brokers. It keeps the last list if the API server is unavailable or lists no broker, for
// example because the Service was recreated. Otherwise a broker would think it is alone and take over every session.
type Endpoints struct {
	freshness

	cfg     EndpointsConfig
	client  discoveryv1client.EndpointSliceInterface
	store   cache.Store
	changed chan struct{} // has room for one
}

// NewEndpoints checks cfg. Only Run sends requests.
func NewEndpoints(cfg EndpointsConfig) (*Endpoints, error) {
	if cfg.REST == nil || cfg.Namespace == "" || cfg.Service == "" || len(cfg.Own) == 0 || cfg.Update == nil || cfg.Logger == nil {
		return nil, errors.New("endpoints: REST, Namespace, Service, Own, Update and Logger are required")
	}
	if cfg.Patience == 0 {
		cfg.Patience = 5 * time.Second
	}
	client, err := discoveryv1client.NewForConfig(cfg.REST)
	if err != nil {
		return nil, fmt.Errorf("making a client for EndpointSlices: %w", err)
	}
	return &Endpoints{
		cfg: cfg, client: client.EndpointSlices(cfg.Namespace),
		store: cache.NewStore(cache.MetaNamespaceKeyFunc), changed: make(chan struct{}, 1),
	}, nil
}

// Run watches until ctx ends.
func (e *Endpoints) Run(ctx context.Context) error {
	e.record(nil)
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		cache.NewReflectorWithOptions(e.source(), &discoveryv1.EndpointSlice{}, endpointSink{e.store, e.changed}, cache.ReflectorOptions{
			Name:    "credence/endpointslices",
			Backoff: &wait.Backoff{Duration: minPause, Cap: maxPause, Steps: 16, Factor: 2, Jitter: 0.5},
		}).RunWithContext(ctx)
	}()
	var patience <-chan time.Time // nil until there are endpoints
	for started := false; ; {
		select {
		case <-ctx.Done():
			<-watching
			return nil
		case <-e.changed:
		case <-patience:
			e.cfg.Logger.WarnContext(ctx, "Counted this broker among the endpoints of its Service, although it is not listed", "service", e.cfg.Service, "addresses", e.cfg.Own)
			started = true
		}
		m, found, listed := e.members()
		if !found {
			continue
		}
		if patience == nil {
			patience = time.After(e.cfg.Patience) //nolint:forbidigo // Once per process.
		}
		if started = started || listed; started {
			e.cfg.Update(m)
			patience = make(chan time.Time) // never
		}
	}
}

// Age returns 0 while the watch works, and otherwise the time since the API server last sent something.
func (e *Endpoints) Age() time.Duration { return e.age() }

// source lists and watches the EndpointSlices of the Service.
func (e *Endpoints) source() *cache.ListWatch {
	ofService := func(o metav1.ListOptions) metav1.ListOptions {
		o.LabelSelector = discoveryv1.LabelServiceName + "=" + e.cfg.Service
		return o
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := e.client.List(ctx, ofService(o))
			e.record(err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := e.client.Watch(ctx, ofService(o))
			e.record(err)
			if err != nil {
				return nil, err
			}
			return recordEvents(w, &e.freshness), nil
		},
	}
}

// members returns the brokers in the EndpointSlices. found reports whether there is any, listed whether this broker is among
// them.
func (e *Endpoints) members() (m placement.Members, found, listed bool) {
	family := e.family()
	m.Self = e.cfg.Own[0]
	for _, own := range e.cfg.Own {
		if own.Is4() == (family == discoveryv1.AddressTypeIPv4) {
			m.Self = own
		}
	}
	for _, obj := range e.store.List() {
		slice, ok := obj.(*discoveryv1.EndpointSlice)
		if !ok || slice.AddressType != family {
			continue
		}
		for _, endpoint := range slice.Endpoints {
			for _, text := range endpoint.Addresses {
				address, err := netip.ParseAddr(text)
				if err != nil {
					continue // The API server refuses such addresses.
				}
				address = address.Unmap()
				found, listed = true, listed || address == m.Self
				// Unset conditions mean ready and not terminating (documentation of EndpointConditions).
				c := endpoint.Conditions
				switch {
				case c.Terminating != nil && *c.Terminating:
					m.ShuttingDown = m.ShuttingDown || address == m.Self
				case c.Ready == nil || *c.Ready:
					m.Ready = append(m.Ready, address)
				default:
					m.Starting = append(m.Starting, address)
				}
			}
		}
	}
	// A new pod may already have the address of a terminating one.
	m.ShuttingDown = m.ShuttingDown && !slices.Contains(slices.Concat(m.Ready, m.Starting), m.Self)
	return m, found, listed
}

// family returns the address family that identifies brokers. If their Service has two families, sidecars choose the same.
func (e *Endpoints) family() discoveryv1.AddressType {
	has := func(family discoveryv1.AddressType) bool {
		return slices.ContainsFunc(e.store.List(), func(obj any) bool {
			slice, ok := obj.(*discoveryv1.EndpointSlice)
			return ok && slice.AddressType == family && len(slice.Endpoints) > 0
		})
	}
	if has(discoveryv1.AddressTypeIPv6) && !has(discoveryv1.AddressTypeIPv4) {
		return discoveryv1.AddressTypeIPv6
	}
	return discoveryv1.AddressTypeIPv4
}

// endpointSink is a store that signals each change.
type endpointSink struct {
	cache.Store
	changed chan<- struct{}
}

func (s endpointSink) signal(err error) error {
	select {
	case s.changed <- struct{}{}:
	default:
	}
	return err
}

func (s endpointSink) Add(obj any) error                  { return s.signal(s.Store.Add(obj)) }
func (s endpointSink) Update(obj any) error               { return s.signal(s.Store.Update(obj)) }
func (s endpointSink) Delete(obj any) error               { return s.signal(s.Store.Delete(obj)) }
func (s endpointSink) Replace(list []any, v string) error { return s.signal(s.Store.Replace(list, v)) }
