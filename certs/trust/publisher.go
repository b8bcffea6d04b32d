package trust

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

const (
	// reconcileInterval is how often the leader reads the roots file and the clock. Both are cheap.
	reconcileInterval = 2 * time.Second
	// resyncInterval is how often the leader compares all namespaces, in case a watch missed a change. That needs no request if
	// nothing is wrong.
	resyncInterval = 10 * time.Minute
)

// configMapState is the part of a ConfigMap that stays in memory, without its data.
type configMapState struct {
	metav1.ObjectMeta // only fields that the package uses

	roots, record [sha256.Size]byte // digests of the data
	owners        []types.UID
	drop          string // dropAnnotation
}

// strip replaces a ConfigMap by its configMapState. The informer may pass a result to strip again.
func strip(obj any) (any, error) {
	m, ok := obj.(*corev1.ConfigMap)
	if !ok {
		return obj, nil
	}
	state := &configMapState{
		ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion},
		roots:      sha256.Sum256([]byte(m.Data[RootsKey])),
		record:     sha256.Sum256([]byte(m.Data[RecordKey])),
		drop:       strings.Clone(m.Annotations[dropAnnotation]), // a copy, so that the object can be freed
	}
	for _, owner := range m.OwnerReferences {
		if owner.Kind == ownerKind {
			state.owners = append(state.owners, owner.UID)
		}
	}
	return state, nil
}

// publisher publishes while one replica leads.
type publisher struct {
	*Trust
	namespaces cache.SharedIndexInformer // opted-in ones
	configMaps cache.SharedIndexInformer // of configMapState
	queue      workqueue.TypedRateLimitingInterface[string]
	priorities *priorityQueue
	limiter    *rate.Limiter
	owner      owner
	wake       chan struct{} // makes reconcile run now

	mu      sync.Mutex
	record  record               // guarded by mu
	desired map[string]string    // the data in our own namespace; nil while there is no root to publish; guarded by mu
	written map[string]time.Time // :: namespace → last write, for minRepair; guarded by mu
	failing map[string]error     // :: namespace → why it does not have the desired data; guarded by mu
	fileErr error                // guarded by mu
	dropErr error                // guarded by mu
	noRoot  error                // guarded by mu
	synced  bool                 // guarded by mu
}

// lead publishes until ctx ends.
func (t *Trust) lead(ctx context.Context) {
	t.leading.Store(true)
	defer t.leading.Store(false)
	priorities := newPriorityQueue()
	p := &publisher{
		Trust: t, priorities: priorities, limiter: rate.NewLimiter(publishRate, publishBurst),
		queue: workqueue.NewTypedRateLimitingQueueWithConfig(
			workqueue.NewTypedItemExponentialFailureRateLimiter[string](firstRetry, lastRetry),
			workqueue.TypedRateLimitingQueueConfig[string]{
				DelayingQueue: workqueue.NewTypedDelayingQueueWithConfig(workqueue.TypedDelayingQueueConfig[string]{
					Queue: workqueue.NewTypedWithConfig(workqueue.TypedQueueConfig[string]{Queue: priorities}),
				}),
			}),
		owner:   owner{meta: t.meta, name: t.cfg.Owner},
		wake:    make(chan struct{}, 1),
		written: make(map[string]time.Time), failing: make(map[string]error),
	}
	t.mu.Lock()
	t.publisher = p
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		t.publisher = nil
		t.mu.Unlock()
	}()
	t.cfg.Logger.InfoContext(ctx, "Started to publish roots as the leading replica")
	defer t.cfg.Logger.InfoContext(ctx, "Stopped publishing roots, another replica may lead")
	if err := p.run(ctx); err != nil {
		t.cfg.Logger.ErrorContext(ctx, "Could not start to publish roots", "error", err)
		<-ctx.Done()
	}
}

func (p *publisher) run(ctx context.Context) error {
	if err := p.watch(); err != nil {
		return err
	}
	if !p.restore(ctx) {
		return nil
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer p.queue.ShutDown()
	running.Go(func() { p.namespaces.RunWithContext(ctx) })
	running.Go(func() { p.configMaps.RunWithContext(ctx) })
	// Without complete lists, the workers would write ConfigMaps that are up to date.
	if !cache.WaitForCacheSync(ctx.Done(), p.namespaces.HasSynced, p.configMaps.HasSynced) {
		return nil
	}
	p.mu.Lock()
	p.synced = true
	p.mu.Unlock()
	p.reconcile(ctx)
	for range workers {
		running.Go(func() {
			for p.work(ctx) {
			}
		})
	}
	clock, all := time.NewTicker(reconcileInterval), time.NewTicker(resyncInterval)
	defer clock.Stop()
	defer all.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-clock.C:
			p.reconcile(ctx)
		case <-p.wake:
			p.reconcile(ctx)
		case <-all.C:
			p.owner.invalidate()
			p.enqueueAll()
		}
	}
}

// watch creates the informers.
func (p *publisher) watch() error {
	p.namespaces = metadatainformer.NewFilteredMetadataInformer(p.meta, corev1.SchemeGroupVersion.WithResource("namespaces"),
		metav1.NamespaceAll, 0, cache.Indexers{}, func(o *metav1.ListOptions) { o.LabelSelector = p.cfg.Namespaces }).Informer()
	p.configMaps = cache.NewSharedIndexInformer(p.maps(metav1.NamespaceAll), &corev1.ConfigMap{}, 0, cache.Indexers{})
	err := errors.Join(
		p.namespaces.SetTransform(func(obj any) (any, error) {
			if m, ok := obj.(*metav1.PartialObjectMetadata); ok {
				m.ObjectMeta = metav1.ObjectMeta{Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, DeletionTimestamp: m.DeletionTimestamp}
			}
			return obj, nil
		}),
		p.configMaps.SetTransform(strip))
	if err != nil {
		return fmt.Errorf("preparing the watches: %w", err)
	}
	_, err = p.namespaces.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { p.enqueueUrgent(nameOf(obj)) },
		UpdateFunc: func(_, obj any) { p.enqueueUrgent(nameOf(obj)) },
		DeleteFunc: func(obj any) { p.forget(nameOf(obj)) },
	})
	if err != nil {
		return fmt.Errorf("watching namespaces: %w", err)
	}
	_, err = p.configMaps.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { p.changed(namespaceOf(obj)) },
		UpdateFunc: func(_, obj any) { p.changed(namespaceOf(obj)) },
		DeleteFunc: func(obj any) {
			// Perhaps the garbage collector deleted it because the owner was recreated.
			p.owner.invalidate()
			p.changed(namespaceOf(obj))
		},
	})
	if err != nil {
		return fmt.Errorf("watching ConfigMaps: %w", err)
	}
	return nil
}

// restore reads the trust record of the earlier leader. It retries until ctx ends, and returns false only then: without the
// record, a moment of an unavailable API server would withdraw roots that are still in use.
func (p *publisher) restore(ctx context.Context) bool {
	retry := time.NewTicker(reconcileInterval)
	defer retry.Stop()
	for {
		read, cancel := context.WithTimeout(ctx, writeTimeout)
		m, err := p.core.ConfigMaps(p.cfg.Namespace).Get(read, p.cfg.ConfigMap, metav1.GetOptions{})
		cancel()
		if apierrors.IsNotFound(err) {
			return true
		}
		if err == nil {
			r, err := parseRecord(m.Data)
			if err != nil {
				p.cfg.Logger.WarnContext(ctx, "Could not read the trust record, forgetting earlier roots", "error", err)
			}
			p.mu.Lock()
			p.record = r
			p.mu.Unlock()
			return true
		}
		p.fail(ctx, p.cfg.Namespace, fmt.Errorf("reading the trust record: %w", err))
		select {
		case <-ctx.Done():
			return false
		case <-retry.C:
		}
	}
}

// reconcile updates the trust record from the file, the leaf, the annotation, the clock and the namespaces.
func (p *publisher) reconcile(ctx context.Context) {
	file, fileErr := readRoots(p.cfg.RootsFile)
	serving, err := p.serving()
	if err != nil {
		return // New refuses the zero pair, the only one with an error.
	}
	var drop map[string]bool
	var dropErr, noRoot error
	if own := p.state(p.cfg.Namespace); own != nil {
		drop, dropErr = parseDigests(own.drop)
	}
	now := time.Now()

	p.mu.Lock()
	before := p.record
	record, changes := before.next(facts{now: now, file: file, serving: serving, drop: drop})
	if len(record) > 0 && !verifies(serving, now, record.certs()...) {
		noRoot = fmt.Errorf("no root in %[2]s and no earlier root verifies the broker's leaf, which expires at %[1]s; add its root to that file",
			serving.Leaf.NotAfter.Format(time.RFC3339), p.cfg.RootsFile)
	}
	newErrors := p.newErrors(fileErr, dropErr, noRoot)
	p.fileErr, p.dropErr, p.noRoot = fileErr, dropErr, noRoot
	p.set(record)
	if !record.complete() && p.allPublished() {
		record = record.stamped(now)
		p.set(record)
		changes = append(changes, change{what: "published in every namespace"})
	}
	p.mu.Unlock()

	for _, c := range changes {
		attrs := []any{"what", c.what}
		if c.cert != nil {
			attrs = append(attrs, "sha256", c.id, "subject", c.cert.Subject.String(), "expires", c.cert.NotAfter)
		}
		p.cfg.Logger.InfoContext(ctx, "Roots changed", attrs...)
	}
	for _, err := range newErrors {
		p.cfg.Logger.ErrorContext(ctx, "Could not publish roots as configured", "error", err)
	}
}

// newErrors returns the errors whose text has changed since the last reconcile. The caller holds mu.
func (p *publisher) newErrors(fileErr, dropErr, noRoot error) (all []error) {
	for _, pair := range [][2]error{{p.fileErr, fileErr}, {p.dropErr, dropErr}, {p.noRoot, noRoot}} {
		if pair[1] != nil && (pair[0] == nil || pair[0].Error() != pair[1].Error()) {
			all = append(all, pair[1])
		}
	}
	return all
}

// set makes r the record to publish, and enqueues the namespaces that it changes. The caller holds mu.
func (p *publisher) set(r record) {
	p.record = r
	if len(r) == 0 {
		return // The ConfigMaps do not change: see the package comment.
	}
	data, err := r.data()
	if err != nil {
		p.cfg.Logger.Error("Could not encode the trust record", "error", err) // a time outside the years 0 to 9999
		return
	}
	old := p.desired
	p.desired = data
	if old[RecordKey] != data[RecordKey] {
		p.enqueueUrgent(p.cfg.Namespace)
	}
	if old[RootsKey] != data[RootsKey] {
		p.enqueueAll()
	}
}

// allPublished reports whether the API server shows the current roots in every namespace. It skips namespaces without the
// ConfigMap, where no pod runs that could miss a root. It also skips ConfigMaps that cannot take our key (immutable, full,
// binary data), or one tenant could block everyone's rotation. The caller holds mu.
func (p *publisher) allPublished() bool {
	if p.desired == nil {
		return false
	}
	roots := sha256.Sum256([]byte(p.desired[RootsKey]))
	if own := p.state(p.cfg.Namespace); own == nil || own.roots != roots {
		return false
	}
	for _, obj := range p.namespaces.GetStore().List() {
		ns := obj.(*metav1.PartialObjectMetadata)
		cannotChange := apierrors.IsInvalid(p.failing[ns.Name]) || apierrors.IsRequestEntityTooLargeError(p.failing[ns.Name])
		if m := p.state(ns.Name); ns.DeletionTimestamp == nil && m != nil && m.roots != roots && !cannotChange {
			return false
		}
	}
	return true
}

// state returns a namespace's ConfigMap as the watch has it; nil if there is none.
func (p *publisher) state(namespace string) *configMapState {
	obj, ok, err := p.configMaps.GetStore().GetByKey(namespace + "/" + p.cfg.ConfigMap)
	if err != nil || !ok {
		return nil
	}
	return obj.(*configMapState)
}

// problem returns the present failures, or nil.
func (p *publisher) problem() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	errs := []error{p.dropErr, p.noRoot}
	switch {
	case errors.Is(p.fileErr, os.ErrNotExist) && p.desired == nil:
		errs = append(errs, fmt.Errorf("no roots are published: %w", p.fileErr))
	case p.fileErr != nil:
		errs = append(errs, p.fileErr)
	}
	if !p.synced {
		errs = append(errs, errors.New("namespaces and ConfigMaps are not listed yet"))
	}
	for namespace, err := range p.failing {
		errs = append(errs, fmt.Errorf("%d namespaces fail, for example %s: %w", len(p.failing), namespace, err))
		break
	}
	return errors.Join(errs...)
}

func nameOf(obj any) string {
	name, err := cache.DeletionHandlingObjectToName(obj)
	if err != nil {
		return "" // not an object; no namespace has that name
	}
	return name.Name
}

func namespaceOf(obj any) string {
	name, err := cache.DeletionHandlingObjectToName(obj)
	if err != nil {
		return ""
	}
	return name.Namespace
}
