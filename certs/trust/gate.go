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

// A leaf is about to expire when its time left is less than a tenth of its lifetime, and less than an hour. An hour is enough
// for clocks that differ. The tenth is for leaves with a lifetime of an hour, which would otherwise always be about to expire.
const (
	lastPart = 10
	lastTime = time.Hour
)

// gate decides whether a new leaf may be served, because pods can have its root.
type gate struct {
	propagation time.Duration
	log         *slog.Logger

	mu      sync.Mutex
	initial []*x509.Certificate // that verify the leaf loaded at startup; guarded by mu
	record  record              // the last good one; nil before the first; guarded by mu
	err     error               // why record is not the current one; guarded by mu
}

// begin stores the roots that verify the first leaf.
func (g *gate) begin(serving *tls.Certificate, roots []*x509.Certificate) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, root := range roots {
		if verifies(serving, time.Now(), root) {
			g.initial = append(g.initial, root)
		}
	}
}

// allow is the function for certs.KeyPair.SetGate. It allows next if every client can verify it with the roots that have been
// published for the propagation time. It also allows next if no client can use serving any longer, or soon.
func (g *gate) allow(serving, next *tls.Certificate) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.initial) == 0 && len(g.record) == 0 {
		return nil // Nothing was ever published, so no pod trusts a root that next could break.
	}
	now := time.Now()
	if (now.Before(next.Leaf.NotBefore) || now.After(next.Leaf.NotAfter)) && now.Before(serving.Leaf.NotAfter) {
		return errors.New("the new leaf is not valid at this time")
	}
	var known, published []*x509.Certificate
	for _, root := range g.initial {
		// A root that the record no longer has was dropped.
		if _, kept := g.record[digest(root)]; kept || g.record == nil {
			known = append(known, root)
		}
	}
	var since time.Time // when a root that verifies next was published; zero if it was not
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
	// A root can expire before its leaves. Then no client can verify serving, and waiting does not help.
	if verifies(next, now, published...) && !verifies(serving, now, append(published, known...)...) {
		return nil
	}
	left := serving.Leaf.NotAfter.Sub(now)
	if left < min(serving.Leaf.NotAfter.Sub(serving.Leaf.NotBefore)/lastPart, lastTime) {
		g.log.Warn("Served a leaf before pods can have its root, because the present leaf is about to expire",
			"expires", serving.Leaf.NotAfter)
		return nil
	}
	if !since.IsZero() {
		return fmt.Errorf("its root was published at %s, and pods can need until %s to get it",
			since.Format(time.TimeOnly), since.Add(g.propagation).Format(time.TimeOnly))
	}
	return errors.New("no root that is published in every opted-in namespace verifies the new leaf")
}

func (g *gate) problem() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// observe stores a new record. A malformed one changes nothing, because the leader will repair it.
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

// follow watches the trust record until ctx ends. It keeps the last one while the API server is unavailable, and after the
// ConfigMap is deleted.
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
		t.cfg.Logger.ErrorContext(ctx, "Could not watch the trust record", "error", err) // only after the informer has ended
		return
	}
	informer.RunWithContext(ctx)
}

// maps lists and watches the ConfigMaps with our name in one namespace, or in all if namespace is empty. With the field
// selector, RBAC can limit the right to that name.
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
