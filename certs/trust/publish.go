package trust

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1ac "k8s.io/client-go/applyconfigurations/core/v1"
	metav1ac "k8s.io/client-go/applyconfigurations/meta/v1"
)

const (
	// publishRate bounds our writes a second, which is little for an API server. A new root reaches 10,000 namespaces in less than
	// two minutes. Urgent writes go first.
	publishRate  = 100
	publishBurst = 20
	// workers is the number of concurrent writes. A write takes some milliseconds.
	workers = 8
	// writeTimeout bounds a request, in case its connection is dead.
	writeTimeout = 10 * time.Second
	// minRepair is the minimum time between two writes to one namespace. So a conflict with another controller over one ConfigMap
	// does not use up the rate.
	minRepair = time.Second
	// firstRetry and lastRetry bound the delay before a failed write is retried.
	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
)

// enqueueUrgent enqueues a namespace before those that only need a change for all.
func (p *publisher) enqueueUrgent(namespace string) {
	p.priorities.setUrgent(namespace)
	p.queue.Add(namespace)
}

// enqueueAll enqueues every namespace.
func (p *publisher) enqueueAll() {
	p.enqueueUrgent(p.cfg.Namespace)
	for _, name := range p.namespaces.GetStore().ListKeys() {
		p.queue.Add(name)
	}
}

// changed handles a change of a namespace's ConfigMap, by this replica or another client. It wakes reconcile if our own
// ConfigMap may have a new annotation, or if this may be the last namespace that lacked a new root.
func (p *publisher) changed(namespace string) {
	p.enqueueUrgent(namespace)
	p.mu.Lock()
	reconcile := p.synced && (namespace == p.cfg.Namespace || !p.record.complete() && p.queue.Len() == 0)
	p.mu.Unlock()
	if reconcile {
		select {
		case p.wake <- struct{}{}:
		default:
		}
	}
}

func (p *publisher) forget(namespace string) {
	p.queue.Forget(namespace)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.written, namespace)
	delete(p.failing, namespace)
}

// work publishes in one namespace. It returns false when the queue is shut down.
func (p *publisher) work(ctx context.Context) bool {
	namespace, shutDown := p.queue.Get()
	if shutDown {
		return false
	}
	defer p.queue.Done(namespace)
	later, err := p.publish(ctx, namespace)
	if later || ctx.Err() != nil { // If ctx has ended, the queue is being shut down.
		return true
	}
	if err != nil {
		p.owner.invalidate()
		p.fail(ctx, namespace, err)
		p.queue.AddRateLimited(namespace)
		return true
	}
	p.queue.Forget(namespace)
	p.mu.Lock()
	_, failed := p.failing[namespace]
	delete(p.failing, namespace)
	p.mu.Unlock()
	if failed {
		p.cfg.Logger.InfoContext(ctx, "Published roots in a namespace again", "namespace", namespace)
	}
	return true
}

// fail stores why a namespace does not have the desired data, and logs each reason once.
func (p *publisher) fail(ctx context.Context, namespace string, err error) {
	p.mu.Lock()
	before := p.failing[namespace]
	p.failing[namespace] = err
	count := len(p.failing)
	p.mu.Unlock()
	if before == nil || before.Error() != err.Error() {
		p.cfg.Logger.WarnContext(ctx, "Could not publish roots in a namespace, retrying",
			"namespace", namespace, "failing", count, "error", err)
	}
}

// publish writes the ConfigMap of one namespace, unless it is up to date. If it was written less than minRepair ago, publish
// enqueues the namespace for later and returns true.
func (p *publisher) publish(ctx context.Context, namespace string) (later bool, err error) {
	own := namespace == p.cfg.Namespace
	if !own && !p.optedIn(namespace) {
		return false, nil
	}
	p.mu.Lock()
	data := p.desired
	wait := minRepair - time.Since(p.written[namespace])
	p.mu.Unlock()
	if data == nil {
		return false, nil
	}
	uid, err := p.owner.uid(ctx)
	if err != nil {
		return false, err
	}
	if p.upToDate(p.state(namespace), data, own, uid) {
		return false, nil
	}
	if wait > 0 && !own { // A rotation writes our own several times, and no other controller writes there.
		p.priorities.setUrgent(namespace)
		p.queue.AddAfter(namespace, wait)
		return true, nil
	}
	if err := p.limiter.Wait(ctx); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	m := corev1ac.ConfigMap(p.cfg.ConfigMap, namespace).
		WithLabels(map[string]string{"app.kubernetes.io/managed-by": fieldManager}).
		WithData(map[string]string{RootsKey: data[RootsKey]})
	if own {
		m.WithData(data)
	}
	if uid != "" {
		m.WithOwnerReferences(metav1ac.OwnerReference().
			WithAPIVersion(rbacv1.SchemeGroupVersion.String()).WithKind(ownerKind).WithName(p.cfg.Owner).WithUID(uid))
	}
	_, err = p.core.ConfigMaps(namespace).Apply(ctx, m, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	p.mu.Lock()
	p.written[namespace] = time.Now()
	p.mu.Unlock()
	if err != nil && gone(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("applying ConfigMap %s/%s: %w", namespace, p.cfg.ConfigMap, err)
	}
	return false, nil
}

// optedIn reports whether a namespace is opted in and not being deleted.
func (p *publisher) optedIn(namespace string) bool {
	obj, ok, err := p.namespaces.GetStore().GetByKey(namespace)
	return err == nil && ok && obj.(*metav1.PartialObjectMetadata).DeletionTimestamp == nil
}

// upToDate reports whether a ConfigMap has the desired data and owner.
func (p *publisher) upToDate(m *configMapState, data map[string]string, own bool, owner types.UID) bool {
	if m == nil || m.roots != sha256.Sum256([]byte(data[RootsKey])) {
		return false
	}
	if own && m.record != sha256.Sum256([]byte(data[RecordKey])) {
		return false
	}
	return owner == "" || slices.Contains(m.owners, owner)
}

// gone reports whether the write failed because the namespace was deleted or is being deleted. Its watch reports the same soon.
func gone(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
}
