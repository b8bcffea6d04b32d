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
	// publishRate bounds our writes a second, to be a small part of what an API server takes: a new root
	// reaches 10,000 namespaces in less than two minutes. What somebody waits for goes first.
	publishRate  = 100
	publishBurst = 20
	// workers write at the same time; a write takes some milliseconds.
	workers = 8
	// writeTimeout ends a write whose connection has died.
	writeTimeout = 10 * time.Second
	// minRepair is the least time between two writes to one namespace, lest a quarrel with another
	// controller over the same ConfigMap take up what others need.
	minRepair = time.Second
	// firstRetry and lastRetry bound the time after which a failed write is tried again.
	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
)

// enqueueUrgent has a namespace looked at before those that only take part in a change for all.
func (p *publisher) enqueueUrgent(namespace string) {
	p.priorities.setUrgent(namespace)
	p.queue.Add(namespace)
}

// enqueueAll has every namespace looked at.
func (p *publisher) enqueueAll() {
	p.enqueueUrgent(p.cfg.Namespace)
	for _, name := range p.namespaces.GetStore().ListKeys() {
		p.queue.Add(name)
	}
}

// changed has a namespace looked at whose ConfigMap has changed, perhaps by us. In our own it may bear new
// orders, and everywhere it may be the last that a new root was awaited in.
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

// work looks at one namespace. It returns false when there will be no more.
func (p *publisher) work(ctx context.Context) bool {
	namespace, ended := p.queue.Get()
	if ended {
		return false
	}
	defer p.queue.Done(namespace)
	later, err := p.publish(ctx, namespace)
	if later || ctx.Err() != nil { // In the latter case the queue is about to end.
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
		p.cfg.Logger.InfoContext(ctx, "Publishing roots in a namespace is possible again", "namespace", namespace)
	}
	return true
}

// fail notes why a namespace has not what it should, and says so once for each reason.
func (p *publisher) fail(ctx context.Context, namespace string, err error) {
	p.mu.Lock()
	before := p.failing[namespace]
	p.failing[namespace] = err
	count := len(p.failing)
	p.mu.Unlock()
	if before == nil || before.Error() != err.Error() {
		p.cfg.Logger.WarnContext(ctx, "Publishing roots in a namespace failed; it is tried again",
			"namespace", namespace, "failing", count, "error", err)
	}
}

// publish writes the ConfigMap of one namespace, unless it is as it should be, or was written a moment ago:
// then the namespace comes back later.
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
	if wait > 0 && !own { // Our own is written in the course of a rotation; nobody quarrels with us there.
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
		WithLabels(map[string]string{"app.kubernetes.io/managed-by": FieldManager}).
		WithData(map[string]string{RootsKey: data[RootsKey]})
	if own {
		m.WithData(data)
	}
	if uid != "" {
		m.WithOwnerReferences(metav1ac.OwnerReference().
			WithAPIVersion(rbacv1.SchemeGroupVersion.String()).WithKind(ownerKind).WithName(p.cfg.Owner).WithUID(uid))
	}
	_, err = p.core.ConfigMaps(namespace).Apply(ctx, m, metav1.ApplyOptions{FieldManager: FieldManager, Force: true})
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

// optedIn reports whether a namespace is opted in and not on its way out.
func (p *publisher) optedIn(namespace string) bool {
	obj, ok, err := p.namespaces.GetStore().GetByKey(namespace)
	return err == nil && ok && obj.(*metav1.PartialObjectMetadata).DeletionTimestamp == nil
}

func (p *publisher) upToDate(m *configMapState, data map[string]string, own bool, owner types.UID) bool {
	if m == nil || m.roots != sha256.Sum256([]byte(data[RootsKey])) {
		return false
	}
	if own && m.record != sha256.Sum256([]byte(data[RecordKey])) {
		return false
	}
	return owner == "" || slices.Contains(m.owners, owner)
}

// gone reports whether the namespace is being deleted, or was, as its watch will tell in a moment.
func gone(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
}
