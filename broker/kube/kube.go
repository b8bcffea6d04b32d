// Package kube is what the broker and the webhook know of the cluster: which pods are injected,
// what their namespaces permit, and whether a service-account token is genuine.
//
// It watches metadata only, keeps of each object no more than a decision needs, and goes on
// answering from what it has while the API server is away. It decides nothing: package policy does.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// informed is one metadata-only informer whose objects have been cut down to what decisions need.
type informed struct {
	informer cache.SharedIndexInformer
	changed  *broadcast
}

// newInformed makes an informer of the given resource, which keeps what strip leaves of each object.
func newInformed(client metadata.Interface, resource string, changed *broadcast, indexers cache.Indexers, tweak func(*metav1.ListOptions), strip func(*metav1.PartialObjectMetadata)) (informed, error) {
	gvr := corev1.SchemeGroupVersion.WithResource(resource)
	informer := metadatainformer.NewFilteredMetadataInformer(client, gvr, metav1.NamespaceAll, 0, indexers, tweak).Informer()
	err := informer.SetTransform(func(obj any) (any, error) {
		// Anything else is a tombstone of an object that was stripped before.
		if m, ok := obj.(*metav1.PartialObjectMetadata); ok {
			strip(m)
		}
		return obj, nil
	})
	if err != nil {
		return informed{}, fmt.Errorf("preparing the informer of %s: %w", resource, err)
	}
	_, err = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { changed.send() },
		UpdateFunc: func(_, _ any) { changed.send() },
	})
	if err != nil {
		return informed{}, fmt.Errorf("watching %s: %w", resource, err)
	}
	return informed{informer: informer, changed: changed}, nil
}

// get returns the object of that key, nil when there is none.
func (i informed) get(key string) *metav1.PartialObjectMetadata {
	obj, ok, err := i.informer.GetStore().GetByKey(key)
	if err != nil || !ok {
		return nil
	}
	return obj.(*metav1.PartialObjectMetadata)
}

// broadcast wakes everybody who waits for the watched state to change.
type broadcast struct {
	mu      sync.Mutex
	waiters int           // guarded by mu
	next    chan struct{} // closed at the next change; guarded by mu
}

func newBroadcast() *broadcast { return &broadcast{next: make(chan struct{})} }

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiters > 0 {
		close(b.next)
		b.next = make(chan struct{})
	}
}

// until waits for condition to hold, at most for patience and no longer than ctx, and reports
// whether it does.
func (b *broadcast) until(ctx context.Context, patience time.Duration, condition func() bool) bool {
	if condition() {
		return true
	}
	b.mu.Lock()
	b.waiters++
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.waiters--
		b.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		b.mu.Lock()
		next := b.next
		b.mu.Unlock()
		if condition() {
			return true
		}
		select {
		case <-next:
		case <-ctx.Done():
			return condition()
		}
	}
}

// Reads that go past the informers to the API server, for what they do not know yet. They are rare,
// and a flood of callers with tokens of dead pods must not become a flood on the API server.
const (
	liveReadsPerSecond = 20
	liveReadBurst      = 100
	liveReadTimeout    = 5 * time.Second
)

// liveReads bounds them.
type liveReads struct{ limiter *rate.Limiter }

func newLiveReads() liveReads {
	return liveReads{limiter: rate.NewLimiter(liveReadsPerSecond, liveReadBurst)}
}

// do runs read, whose "not found" gives ok == false, and any other failure credential.ErrUnavailable.
func (l liveReads) do(ctx context.Context, what string, read func(context.Context) error) (ok bool, err error) {
	if !l.limiter.Allow() {
		return false, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerAway, RetryAfter: time.Second,
			Message: "too many pods are unknown at once; ask again",
		}
	}
	ctx, cancel := context.WithTimeout(ctx, liveReadTimeout)
	defer cancel()
	err = read(ctx)
	switch {
	case err == nil:
		return true, nil
	case apierrors.IsNotFound(err):
		return false, nil
	}
	return false, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerAway, RetryAfter: time.Second,
		Message: "the Kubernetes API server cannot be asked; ask again",
		Cause:   fmt.Errorf("reading %s: %w", what, err),
	}
}

// run runs informers until ctx ends.
func run(ctx context.Context, informers ...informed) {
	var running sync.WaitGroup
	for _, i := range informers {
		running.Go(func() { i.informer.RunWithContext(ctx) })
	}
	running.Wait()
}

// synced reports whether each informer has had its first list.
func synced(informers ...informed) bool {
	for _, i := range informers {
		if !i.informer.HasSynced() {
			return false
		}
	}
	return true
}

// keepOnly drops what decisions do not need. Most of an object's memory is its managed fields.
func keepOnly(m *metav1.PartialObjectMetadata, labels, annotations func(string) bool) {
	m.ManagedFields, m.OwnerReferences, m.Finalizers = nil, nil, nil
	m.GenerateName = ""
	m.Labels = filter(m.Labels, labels)
	m.Annotations = filter(m.Annotations, annotations)
}

func filter(all map[string]string, keep func(string) bool) map[string]string {
	var kept map[string]string
	for k, v := range all {
		if keep != nil && keep(k) {
			if kept == nil {
				kept = make(map[string]string)
			}
			kept[k] = v
		}
	}
	return kept
}

// clients checks what both kinds of watch need, and makes the clients they use.
func clients(config *rest.Config, keys policy.Keys, log *slog.Logger) (metadata.Interface, corev1client.CoreV1Interface, error) {
	if config == nil || keys.Prefix() == "" || log == nil {
		return nil, nil, errors.New("a REST configuration, annotation keys and a Logger are required")
	}
	config = rest.CopyConfig(config)
	config.QPS = -1 // liveReads bounds the reads; client-go's own limit of 5 a second would queue them.
	watch, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("making a metadata client: %w", err)
	}
	read, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("making a core client: %w", err)
	}
	return watch, read, nil
}

// bears returns a filter for the names of labels and annotations that bear our prefix.
func bears(keys policy.Keys) func(name string) bool {
	return func(name string) bool { return strings.HasPrefix(name, keys.Prefix()+"/") }
}
