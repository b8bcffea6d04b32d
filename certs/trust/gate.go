package trust

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// A leaf is about to expire when less than this is left of its life: a tenth, and at most an hour. The
// hour is ample for clocks that differ; the tenth is for leaves of an hour, which would otherwise be
// about to expire all their life.
const (
	lastPart = 10
	lastTime = time.Hour
)

// gate judges whether pods can know the root of a new leaf.
type gate struct {
	propagation time.Duration
	log         *slog.Logger

	mu      sync.Mutex
	initial []*x509.Certificate // under which this process began to serve: it could do nothing else; guarded by mu
	record  record              // as last read; nil before; guarded by mu
	err     error               // why record is older than what is there; guarded by mu
}

// begin notes which of the roots the first leaf verifies under.
func (g *gate) begin(serving *tls.Certificate, roots []*x509.Certificate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, root := range roots {
		if verifies(serving, time.Now(), root) {
			g.initial = append(g.initial, root)
		}
	}
}

// allow has the form that certs.KeyPair.SetGate asks for. Every client that trusts what has been
// published for the propagation time must be able to verify next; otherwise it waits, unless serving is
// about to be of no use to anybody.
func (g *gate) allow(serving, next *tls.Certificate) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.initial) == 0 && len(g.record) == 0 {
		return nil // Nothing was ever published: no pod trusts anything that next could break.
	}
	now := time.Now()
	if (now.Before(next.Leaf.NotBefore) || now.After(next.Leaf.NotAfter)) && now.Before(serving.Leaf.NotAfter) {
		return errors.New("it is not valid at this time")
	}
	var known, published []*x509.Certificate
	for _, root := range g.initial {
		// One that the record has lost was dropped since.
		if _, kept := g.record[digest(root)]; kept || g.record == nil {
			known = append(known, root)
		}
	}
	var since time.Time // when the root of next was published, where it was
	for _, c := range g.record {
		if !c.published.IsZero() {
			published = append(published, c.cert)
		}
		switch {
		case c.published.IsZero():
		case now.Sub(c.published) >= g.propagation:
			known = append(known, c.cert)
		case verifies(next, now, c.cert):
			since = c.published
		}
	}
	if verifies(next, now, known...) {
		return nil
	}
	// Roots can end before leaves do. Then nobody is served by waiting.
	if verifies(next, now, published...) && !verifies(serving, now, append(published, known...)...) {
		return nil
	}
	left := serving.Leaf.NotAfter.Sub(now)
	if left < min(serving.Leaf.NotAfter.Sub(serving.Leaf.NotBefore)/lastPart, lastTime) {
		g.log.Warn("Serving a leaf under a root that pods may not know yet, because the present leaf is about to expire",
			"expires", serving.Leaf.NotAfter)
		return nil
	}
	if !since.IsZero() {
		return fmt.Errorf("its root is published since %s, and pods have it at %s",
			since.Format(time.TimeOnly), since.Add(g.propagation).Format(time.TimeOnly))
	}
	return errors.New("it verifies under no root that is published in every opted-in namespace")
}

func (g *gate) problem() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// observe takes up a new record. One that does not parse changes nothing: the leader is about to repair it.
func (g *gate) observe(m *corev1.ConfigMap) {
	record, err := parseRecord(m.Data)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		g.err = fmt.Errorf("reading ConfigMap %s/%s: %w", m.Namespace, m.Name, err)
		return
	}
	g.record, g.err = record, nil
}

// follow watches the record until ctx ends. What was read last is kept while the API server is away, and
// when the ConfigMap is deleted.
func (t *Trust) follow(ctx context.Context) {
	informer := cache.NewSharedIndexInformer(t.maps(t.cfg.Namespace), &corev1.ConfigMap{}, 0, cache.Indexers{})
	observe := func(obj any) {
		if m, ok := obj.(*corev1.ConfigMap); ok {
			t.gate.observe(m)
		}
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    observe,
		UpdateFunc: func(_, obj any) { observe(obj) },
	}); err != nil {
		t.cfg.Logger.ErrorContext(ctx, "Watching the record of roots failed", "error", err) // Only after its end.
		return
	}
	informer.RunWithContext(ctx)
}

// maps lists and watches the ConfigMaps of our name, in one namespace or, where it is empty, in all. The
// field selector is what lets RBAC limit the right to that name.
func (t *Trust) maps(namespace string) cache.ListerWatcher {
	selector := fields.OneTermEqualSelector("metadata.name", t.cfg.ConfigMap).String()
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return t.core.ConfigMaps(namespace).List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return t.core.ConfigMaps(namespace).Watch(ctx, o)
		},
	}
}
