package kube

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// lagPatience is how long to wait for the watch to bring a pod that its token speaks of. The
// sidecar of a new pod asks about a second after the pod was created.
const lagPatience = 2 * time.Second

// Directory binds the identity in a verified token to the live pod, and tells which injected pods
// there are.
type Directory struct {
	keys            policy.Keys
	log             *slog.Logger
	pods            informed
	serviceAccounts informed
	namespaces      *Namespaces
	core            corev1client.CoreV1Interface
	changed         *broadcast
	reads           liveReads
}

// NewDirectory prepares the watches. It asks the API server for nothing until Run.
func NewDirectory(config *rest.Config, keys policy.Keys, log *slog.Logger) (*Directory, error) {
	client, core, err := clients(config, keys, log)
	if err != nil {
		return nil, err
	}
	d := &Directory{keys: keys, log: log, core: core, changed: newBroadcast(), reads: newLiveReads()}
	if d.namespaces, err = newNamespaces(client, core, keys, d.changed, d.reads); err != nil {
		return nil, err
	}
	d.pods, err = newInformed(client, "pods", d.changed, byNamespace, func(o *metav1.ListOptions) {
		// Finished pods leave the watch: they need no credentials, and cost no memory.
		o.LabelSelector = keys.Name(policy.Injected) + "=true"
		o.FieldSelector = "status.phase!=Succeeded,status.phase!=Failed"
	}, func(m *metav1.PartialObjectMetadata) { keepOnly(m, nil, bears(keys)) })
	if err != nil {
		return nil, err
	}
	d.serviceAccounts, err = newInformed(client, "serviceaccounts", d.changed, cache.Indexers{}, nil,
		func(m *metav1.PartialObjectMetadata) { keepOnly(m, nil, nil) })
	if err != nil {
		return nil, err
	}
	return d, nil
}

// byNamespace finds the pods of a namespace that has changed without walking all pods.
var byNamespace = cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}

// Run watches until ctx ends.
func (d *Directory) Run(ctx context.Context) error {
	run(ctx, d.pods, d.serviceAccounts, d.namespaces.informed)
	return nil
}

// Synced reports whether everything has been listed once.
func (d *Directory) Synced() bool { return synced(d.pods, d.serviceAccounts, d.namespaces.informed) }

// Bind finds the live pod that a verified token is bound to, with its namespace. A pod or service
// account that was deleted, or recreated under the same name, a pod that has finished or was not
// injected, and a pod of a namespace that is not opted in, is refused. What the watch does not know yet is waited for a little and then read from
// the API server; credential.ErrUnavailable is returned only when that could not be asked.
func (d *Directory) Bind(ctx context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	accountIsLive := func() bool {
		m := d.serviceAccounts.get(id.Namespace + "/" + id.ServiceAccount)
		return m != nil && string(m.UID) == id.ServiceAccountUID
	}
	podIsLive := func() bool {
		m := d.pods.get(id.Namespace + "/" + id.Name)
		return m != nil && string(m.UID) == id.UID
	}
	// First, because pods of other namespaces can have tokens for our audience too, and must not make us
	// wait and ask for them.
	ns, err := d.namespaces.Namespace(ctx, id.Namespace)
	if err == nil {
		err = d.keys.CheckOptedIn(ns)
	}
	if err != nil {
		return policy.Pod{}, policy.Namespace{}, err
	}
	d.changed.until(ctx, lagPatience, func() bool { return podIsLive() && accountIsLive() })
	if !accountIsLive() {
		if err := d.readServiceAccount(ctx, id); err != nil {
			return policy.Pod{}, policy.Namespace{}, err
		}
	}
	pod := policy.Pod{Namespace: id.Namespace, Name: id.Name, UID: id.UID, ServiceAccount: id.ServiceAccount}
	if m := d.pods.get(id.Namespace + "/" + id.Name); m != nil && string(m.UID) == id.UID {
		pod.Annotations = m.Annotations
	} else {
		annotations, err := d.readPod(ctx, id)
		if err != nil {
			return policy.Pod{}, policy.Namespace{}, err
		}
		pod.Annotations = annotations
	}
	return pod, ns, nil
}

// readPod asks the API server for the pod's annotations.
func (d *Directory) readPod(ctx context.Context, id identity.Pod) (map[string]string, error) {
	var pod *corev1.Pod
	found, err := d.reads.do(ctx, "pod "+id.String(), func(ctx context.Context) (err error) {
		pod, err = d.core.Pods(id.Namespace).Get(ctx, id.Name, metav1.GetOptions{})
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case !found || string(pod.UID) != id.UID:
		return nil, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound,
			"pod %s with UID %s does not exist any more", id, id.UID)
	case pod.Labels[d.keys.Name(policy.Injected)] != "true":
		return nil, credential.Errorf(credential.ErrDenied, credential.ReasonPodNotInjected,
			"pod %s was not injected: it has no label %s=true", id, d.keys.Name(policy.Injected))
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return nil, credential.Errorf(credential.ErrDenied, credential.ReasonPodFinished, "pod %s has finished", id)
	}
	return pod.Annotations, nil
}

// readServiceAccount asks the API server whether the pod's service account is still the one that
// its token names.
func (d *Directory) readServiceAccount(ctx context.Context, id identity.Pod) error {
	var uid string
	found, err := d.reads.do(ctx, "service account "+id.Namespace+"/"+id.ServiceAccount, func(ctx context.Context) error {
		account, err := d.core.ServiceAccounts(id.Namespace).Get(ctx, id.ServiceAccount, metav1.GetOptions{})
		if err == nil {
			uid = string(account.UID)
		}
		return err
	})
	if err != nil {
		return err
	}
	if !found || uid != id.ServiceAccountUID {
		return credential.Errorf(credential.ErrNotFound, credential.ReasonServiceAccountGone,
			"service account %s/%s was deleted or recreated since pod %s began: restart the pod", id.Namespace, id.ServiceAccount, id)
	}
	return nil
}

// Pod returns the injected pod of the key NAMESPACE/NAME and its namespace, as the watch knows them.
// Its service account is the webhook's hint. ok is false when the pod is gone or has finished, or
// its namespace is not known.
func (d *Directory) Pod(key string) (pod policy.Pod, ns policy.Namespace, ok bool) {
	m := d.pods.get(key)
	if m == nil {
		return policy.Pod{}, policy.Namespace{}, false
	}
	ns, ok = d.namespaces.Known(m.Namespace)
	if !ok {
		return policy.Pod{}, policy.Namespace{}, false
	}
	return policy.Pod{
		Namespace: m.Namespace, Name: m.Name, UID: string(m.UID), Annotations: m.Annotations,
		ServiceAccount: m.Annotations[d.keys.Name(policy.ServiceAccount)],
	}, ns, true
}

// Pods returns the keys of all injected pods that the watch knows.
func (d *Directory) Pods() []string { return d.pods.informer.GetStore().ListKeys() }

// OnChange calls changed with the key NAMESPACE/NAME of each injected pod that appears, changes or
// goes, and of each pod whose namespace changes; first, of each that there is. changed must not block.
func (d *Directory) OnChange(changed func(key string)) error {
	if _, err := d.pods.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { changed(keyOf(obj)) },
		UpdateFunc: func(_, obj any) { changed(keyOf(obj)) },
		DeleteFunc: func(obj any) { changed(keyOf(obj)) },
	}); err != nil {
		return fmt.Errorf("watching pods: %w", err)
	}
	podsOf := func(obj any) {
		keys, err := d.pods.informer.GetIndexer().IndexKeys(cache.NamespaceIndex, keyOf(obj))
		if err != nil {
			d.log.Error("Finding the pods of a namespace failed", "error", err) // There is that index: see byNamespace.
		}
		for _, key := range keys {
			changed(key)
		}
	}
	if _, err := d.namespaces.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    podsOf,
		UpdateFunc: func(_, obj any) { podsOf(obj) },
		DeleteFunc: podsOf,
	}); err != nil {
		return fmt.Errorf("watching namespaces: %w", err)
	}
	return nil
}

// keyOf is the key of an object or of the tombstone that stands for one whose deletion was missed.
func keyOf(obj any) string {
	key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj)
	if err != nil {
		return "" // Not an object: no pod has that key.
	}
	return key
}
