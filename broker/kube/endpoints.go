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
	// Own are the addresses of this broker's pod, one of each family that it has. Required.
	Own []netip.Addr
	// Update is told which brokers there are, first when they are known and then at each change. It must not
	// block. Required.
	Update func(placement.Members)
	// Patience is how long the first Update waits for this broker to be among the endpoints, once there are any, which
	// takes a second. Those that start with it are found there at the same time. Default 5 s.
	Patience time.Duration
	// Logger is told where this broker is never among them. Required.
	Logger *slog.Logger
}

// Endpoints watches which brokers there are. While the API server is away, what it said last holds; and while it names
// nobody, as when the Service is made anew, what it said before: a broker that took itself for the only one would take
// up everything.
type Endpoints struct {
	freshness

	cfg     EndpointsConfig
	client  discoveryv1client.EndpointSliceInterface
	store   cache.Store
	changed chan struct{} // holds one
}

// NewEndpoints checks cfg. It asks the API server for nothing until Run.
func NewEndpoints(cfg EndpointsConfig) (*Endpoints, error) {
	if cfg.REST == nil || cfg.Namespace == "" || cfg.Service == "" || len(cfg.Own) == 0 || cfg.Update == nil || cfg.Logger == nil {
		return nil, errors.New("watching which brokers there are needs a REST configuration, Namespace, Service, Own, Update and a Logger")
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
	e.heard(nil)
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		cache.NewReflectorWithOptions(e.source(), &discoveryv1.EndpointSlice{}, endpointSink{e.store, e.changed}, cache.ReflectorOptions{
			Name:    "credence/endpointslices",
			Backoff: &wait.Backoff{Duration: minPause, Cap: maxPause, Steps: 16, Factor: 2, Jitter: 0.5},
		}).RunWithContext(ctx)
	}()
	var patience <-chan time.Time // nil until there are endpoints
	for told := false; ; {
		select {
		case <-ctx.Done():
			<-watching
			return nil
		case <-e.changed:
		case <-patience:
			e.cfg.Logger.WarnContext(ctx, "This broker is not among the endpoints of its Service; it counts itself in", "service", e.cfg.Service, "addresses", e.cfg.Own)
			told = true
		}
		m, some, listed := e.members()
		if !some {
			continue
		}
		if patience == nil {
			patience = time.After(e.cfg.Patience) //nolint:forbidigo // Once in a process's life.
		}
		if told = told || listed; told {
			e.cfg.Update(m)
			patience = make(chan time.Time) // never
		}
	}
}

// Age is how old what it told may be: 0 while the watch is well, and otherwise how long ago the API server was last heard.
func (e *Endpoints) Age() time.Duration { return e.age() }

// source reads the slices of the Service.
func (e *Endpoints) source() *cache.ListWatch {
	chosen := func(o metav1.ListOptions) metav1.ListOptions {
		o.LabelSelector = discoveryv1.LabelServiceName + "=" + e.cfg.Service
		return o
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := e.client.List(ctx, chosen(o))
			e.heard(err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := e.client.Watch(ctx, chosen(o))
			e.heard(err)
			if err != nil {
				return nil, err
			}
			return recordEvents(w, &e.freshness), nil
		},
	}
}

// members reads what the slices say: whether they name anybody, and this broker.
func (e *Endpoints) members() (m placement.Members, some, listed bool) {
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
					continue // The API server admits none such.
				}
				address = address.Unmap()
				some, listed = true, listed || address == m.Self
				// A condition that is not set is to be taken as ready and not terminating (EndpointConditions).
				c := endpoint.Conditions
				switch {
				case c.Terminating != nil && *c.Terminating:
					m.Ending = m.Ending || address == m.Self
				case c.Ready == nil || *c.Ready:
					m.Ready = append(m.Ready, address)
				default:
					m.Starting = append(m.Starting, address)
				}
			}
		}
	}
	// An address can be another pod's already, which is there to stay.
	m.Ending = m.Ending && !slices.Contains(slices.Concat(m.Ready, m.Starting), m.Self)
	return m, some, listed
}

// family is the one by which brokers are told apart, where their Service has two: sidecars choose the same.
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

// endpointSink is a store that tells of each change.
type endpointSink struct {
	cache.Store
	changed chan<- struct{}
}

func (s endpointSink) tell(err error) error {
	select {
	case s.changed <- struct{}{}:
	default:
	}
	return err
}

func (s endpointSink) Add(obj any) error                  { return s.tell(s.Store.Add(obj)) }
func (s endpointSink) Update(obj any) error               { return s.tell(s.Store.Update(obj)) }
func (s endpointSink) Delete(obj any) error               { return s.tell(s.Store.Delete(obj)) }
func (s endpointSink) Replace(list []any, v string) error { return s.tell(s.Store.Replace(list, v)) }
