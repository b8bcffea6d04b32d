package kube

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// maxLag is how long Bind waits until the watch has the pod of a token. The sidecar of a new pod calls about a second after
// the pod was created.
const maxLag = 2 * time.Second

// Directory binds the identity of a verified token to the live pod, and lists the injected pods. Its methods may be called
// concurrently.
type Directory struct {
	keys            policy.Keys
	pods            *watched
	serviceAccounts *watched
	namespaces      *Namespaces
	core            corev1client.CoreV1Interface
	changed         *broadcast
	reads           *liveReads
}

// NewDirectory prepares the watches. It does not call the API server; Run does.
func NewDirectory(config *rest.Config, keys policy.Keys, log *slog.Logger) (*Directory, error) {
	client, core, err := clients(config, keys, log)
	if err != nil {
		return nil, err
	}
	d := &Directory{keys: keys, core: core, changed: newBroadcast(), reads: newLiveReads()}
	d.namespaces = newNamespaces(client, core, keys, d.changed, d.reads)
	d.pods = newWatched(client, "pods", d.changed)
	d.pods.annotations, d.pods.parse = hasPrefix(keys), keys.Request
	d.pods.tweak = func(o *metav1.ListOptions) {
		// Finished pods leave the watch: they need no credentials and should use no memory.
		o.LabelSelector = keys.Name(policy.Injected) + "=true"
		o.FieldSelector = "status.phase!=Succeeded,status.phase!=Failed"
	}
	d.serviceAccounts = newWatched(client, "serviceaccounts", d.changed)
	return d, nil
}

// Run watches until ctx ends.
func (d *Directory) Run(ctx context.Context) error {
	run(ctx, d.pods, d.serviceAccounts, d.namespaces.watched)
	return nil
}

// Synced reports whether each watch has had a complete list.
func (d *Directory) Synced() bool {
	return d.pods.synced() && d.serviceAccounts.synced() && d.namespaces.Synced()
}

// Reads returns how many live reads were made so far, and how many their limits refused.
func (d *Directory) Reads() (made, refused uint64) {
	return d.reads.made.Load(), d.reads.refused.Load()
}

// Age returns how old the cached state may be: 0 while all watches are healthy. Otherwise it is the time since the API server
// last sent something, of the watch for which that is the longest.
func (d *Directory) Age() time.Duration {
	return max(d.pods.age(), d.serviceAccounts.age(), d.namespaces.watched.age())
}

// Bind returns the live pod that a verified token is bound to, with its namespace. Bind refuses a deleted or recreated pod or
// service account. It also refuses a pod that has finished or was not injected, and a pod of a namespace that is not opted
// in. If the watch does not have an object yet, Bind waits for it for 2 s and then reads it from the API server. It returns
// credential.ErrUnavailable only if that read fails or is over its limit.
func (d *Directory) Bind(ctx context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	accountIsLive := func() bool { return d.accountIsLive(id) }
	livePod := func() *object { return d.livePod(id) }
	// The namespace comes first: pods of other namespaces can have tokens for our audience too, and must not cause waits and
	// live reads.
	ns, err := d.namespaces.Namespace(ctx, id.Namespace)
	if err == nil {
		err = d.keys.CheckOptedIn(ns)
	}
	if err != nil {
		return policy.Pod{}, policy.Namespace{}, err
	}
	d.changed.until(ctx, maxLag, func() bool { return livePod() != nil && accountIsLive() })
	if !accountIsLive() {
		if err := d.readServiceAccount(ctx, id); err != nil {
			return policy.Pod{}, policy.Namespace{}, err
		}
	}
	pod := policy.Pod{Namespace: id.Namespace, Name: id.Name, UID: id.UID, ServiceAccount: id.ServiceAccount}
	if o := livePod(); o != nil {
		pod.Request = o.request()
	} else {
		request, err := d.readPod(ctx, id)
		if err != nil {
			return policy.Pod{}, policy.Namespace{}, err
		}
		pod.Request = request
	}
	// A pod has its annotations from its creation, so they cannot arrive later.
	if !pod.Request.Annotated() {
		return policy.Pod{}, policy.Namespace{}, d.notInjected(id, fmt.Sprintf("no annotation %s", d.keys.Name(policy.Role)))
	}
	return pod, ns, nil
}

// notInjected refuses a pod that lacks the label or the annotations of an injected pod. The refusal is final: the webhook adds
// both when it admits the pod, an admission policy refuses to add them later, and the broker has looked for them in the pod as
// the API server has it. Sidecars rely on that, and stop delaying the start of their pod.
func (d *Directory) notInjected(id identity.Pod, lacks string) error {
	return credential.Errorf(credential.ErrDenied, credential.ReasonPodNotInjected,
		"pod %s was not injected: it has %s; recreate it, so that the webhook injects it. A copy made by kubectl debug --copy-to never gets credentials", id, lacks)
}

// Expects reports whether the watches have the injected pod and the service account of id, by name and UID. It makes no live
// reads.
func (d *Directory) Expects(id identity.Pod) bool { return d.livePod(id) != nil && d.accountIsLive(id) }

// livePod returns the pod of the watch; nil if the watch has none with that UID.
func (d *Directory) livePod(id identity.Pod) *object {
	if o := d.pods.get(id.Namespace, id.Name); o != nil && o.uid == id.UID {
		return o
	}
	return nil
}

// accountIsLive reports whether the watch has the service account, with that UID.
func (d *Directory) accountIsLive(id identity.Pod) bool {
	o := d.serviceAccounts.get(id.Namespace, id.ServiceAccount)
	return o != nil && o.uid == id.ServiceAccountUID
}

// readPod reads the pod from the API server, and returns what its annotations request. The limits of live reads also limit how
// often it parses annotations.
func (d *Directory) readPod(ctx context.Context, id identity.Pod) (*policy.Request, error) {
	pod, found, err := readLive(ctx, d.reads, id.Namespace, "pod "+id.String(), func(ctx context.Context) (*corev1.Pod, error) {
		return d.core.Pods(id.Namespace).Get(ctx, id.Name, metav1.GetOptions{})
	})
	switch {
	case err != nil:
		return nil, err
	case !found || string(pod.UID) != id.UID:
		return nil, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound,
			"pod %s with UID %s no longer exists", id, id.UID)
	case pod.Labels[d.keys.Name(policy.Injected)] != "true":
		return nil, d.notInjected(id, fmt.Sprintf("no label %s=true", d.keys.Name(policy.Injected)))
	case pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed:
		return nil, credential.Errorf(credential.ErrDenied, credential.ReasonPodFinished, "pod %s has finished", id)
	}
	return d.keys.Request(pod.Annotations), nil
}

// readServiceAccount reads from the API server whether the pod's service account is still that of the token.
func (d *Directory) readServiceAccount(ctx context.Context, id identity.Pod) error {
	account, found, err := readLive(ctx, d.reads, id.Namespace, "service account "+id.Namespace+"/"+id.ServiceAccount,
		func(ctx context.Context) (*corev1.ServiceAccount, error) {
			return d.core.ServiceAccounts(id.Namespace).Get(ctx, id.ServiceAccount, metav1.GetOptions{})
		})
	if err != nil {
		return err
	}
	if !found || string(account.UID) != id.ServiceAccountUID {
		return credential.Errorf(credential.ErrNotFound, credential.ReasonServiceAccountGone,
			"service account %s/%s was deleted or recreated after pod %s was created; restart the pod", id.Namespace, id.ServiceAccount, id)
	}
	return nil
}

// Pod returns the injected pod with the key NAMESPACE/NAME and its namespace from the watches, without a live read. Its service
// account is the webhook's hint. ok is false if the pod was deleted or has finished, or if the watch does not have its namespace.
func (d *Directory) Pod(key string) (pod policy.Pod, ns policy.Namespace, ok bool) {
	namespace, name, _ := strings.Cut(key, "/")
	o := d.pods.get(namespace, name)
	if o == nil {
		return policy.Pod{}, policy.Namespace{}, false
	}
	ns, ok = d.namespaces.Known(o.namespace)
	if !ok {
		return policy.Pod{}, policy.Namespace{}, false
	}
	request := o.request()
	return policy.Pod{
		Namespace: o.namespace, Name: o.name, UID: o.uid, ServiceAccount: request.ServiceAccount(), Request: request,
	}, ns, true
}

// Pods returns the keys of all injected pods.
func (d *Directory) Pods() []string { return d.pods.allKeys() }

// OnChange calls changed with the key NAMESPACE/NAME of each injected pod. Later it calls changed for each pod that is added,
// changed or removed, and for each pod of a changed namespace. changed must not block.
func (d *Directory) OnChange(changed func(key string)) {
	d.pods.onChange(func(o *object) { changed(o.key()) })
	d.namespaces.watched.onChange(func(o *object) {
		for _, key := range d.pods.keys(o.name) {
			changed(key)
		}
	})
}
