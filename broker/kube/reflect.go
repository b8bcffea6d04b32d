package kube

import (
	"context"
	"errors"
	"fmt"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

const (
	// pageSize bounds the part of a list that is in memory at once: 500 objects are about 3 MB as they arrive. An API server
	// that streams (Kubernetes 1.34, by default) receives no request for a list.
	pageSize = 500
	// maxPages bounds a list that does not end: five million objects are more than any API server has.
	maxPages = 10_000
)

// source is what the reflector reads from: client-go's metadata client, with each outcome recorded in the watch's freshness.
type source struct{ w *watched }

func (s source) options(o metav1.ListOptions) metav1.ListOptions {
	if s.w.tweak != nil {
		s.w.tweak(&o)
	}
	return o
}

// ListWithContext reads page after page, and reduces each object to the part to store. The reflector by itself would get a
// response from the API server's watch cache with everything in one piece, which for 100,000 pods is 300 MB.
func (s source) ListWithContext(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	o = s.options(o)
	o.ResourceVersion, o.ResourceVersionMatch, o.Limit, o.Continue = "", "", pageSize, ""
	all := new(internalversion.List)
	for range maxPages {
		page, err := s.w.client.List(ctx, o)
		s.w.record(err)
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w", s.w.resource, err)
		}
		for i := range page.Items {
			all.Items = append(all.Items, s.w.reduced(&page.Items[i]))
		}
		if all.ResourceVersion = page.ResourceVersion; page.Continue == "" {
			return all, nil
		}
		o.Continue = page.Continue
	}
	return nil, fmt.Errorf("listing %s: the list does not end after %d pages", s.w.resource, maxPages)
}

// WatchWithContext watches, and records each event in the watch's freshness.
func (s source) WatchWithContext(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	w, err := s.w.client.Watch(ctx, s.options(o))
	s.w.record(err)
	if err != nil {
		return nil, fmt.Errorf("watching %s: %w", s.w.resource, err)
	}
	return recordEvents(w, &s.w.freshness), nil
}

// recordEvents returns w with each of its events recorded in f.
func recordEvents(w watch.Interface, f *freshness) watch.Interface {
	r := &recorded{Interface: w, events: make(chan watch.Event), stopped: make(chan struct{})}
	go r.forward(f)
	return r
}

// recorded is a watch that recordEvents returned. watch.Filter leaks its goroutine if it is stopped while it sends an event.
type recorded struct {
	watch.Interface
	events  chan watch.Event
	stop    sync.Once
	stopped chan struct{}
}

func (r *recorded) forward(f *freshness) {
	defer close(r.events)
	for e := range r.Interface.ResultChan() {
		if e.Type == watch.Error {
			f.record(apierrors.FromObject(e.Object))
		} else {
			f.record(nil)
		}
		select {
		case r.events <- e:
		case <-r.stopped:
			return
		}
	}
}

// ResultChan implements watch.Interface.
func (r *recorded) ResultChan() <-chan watch.Event { return r.events }

// Stop implements watch.Interface.
func (r *recorded) Stop() {
	r.stop.Do(func() { close(r.stopped) })
	r.Interface.Stop()
}

// List and Watch are the methods that reflectors called before they had contexts. They do not call them if the source has
// the two methods above.

func (source) List(metav1.ListOptions) (runtime.Object, error)   { return nil, errNoContext }
func (source) Watch(metav1.ListOptions) (watch.Interface, error) { return nil, errNoContext }

var errNoContext = errors.New("client-go called a watch without a context")

// sink is what the reflector writes to. The reflector calls it from one goroutine.
type sink struct{ w *watched }

// Transformer reduces each object of a streamed list as it arrives.
func (s sink) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if m, ok := obj.(*metav1.PartialObjectMetadata); ok {
			return s.w.reduced(m), nil
		}
		return obj, nil
	}
}

func (s sink) object(obj any) (*object, error) {
	switch o := obj.(type) {
	case *object:
		return o, nil
	case *metav1.PartialObjectMetadata:
		return s.w.reduced(o), nil
	default:
		return nil, fmt.Errorf("the watch of %s sent %T", s.w.resource, obj)
	}
}

// apply applies a change of one object to the store.
func (s sink) apply(obj any, change func(*object)) error {
	o, err := s.object(obj)
	if err != nil {
		return err
	}
	change(o)
	s.w.sweep(s.w.used)
	return nil
}

func (s sink) Add(obj any) error    { return s.apply(obj, s.w.set) }
func (s sink) Update(obj any) error { return s.apply(obj, s.w.set) }
func (s sink) Delete(obj any) error { return s.apply(obj, s.w.remove) }
func (s sink) Resync() error        { return nil }

func (s sink) Replace(list []any, _ string) error {
	all := make([]*object, 0, len(list))
	for _, obj := range list {
		o, err := s.object(obj)
		if err != nil {
			return err
		}
		all = append(all, o)
	}
	s.w.replace(all)
	s.w.sweep(s.w.used)
	return nil
}
