package kube

import (
	"context"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Namespaces knows the labels and annotations of every namespace that bear our prefix.
type Namespaces struct {
	watched *watched
	keys    policy.Keys
	core    corev1client.CoreV1Interface
	changed *broadcast
	reads   *liveReads

	mu    sync.Mutex
	asked map[string]time.Time // :: name → when the API server last said that it is not opted in; guarded by mu
}

// trustFor is how long the API server's word that a namespace is not opted in is not asked for again:
// a namespace with many pods that was opted out must not use up the reads of all others.
const trustFor = 5 * time.Second

// maxRemembered bounds what is remembered of namespaces that are not opted in. Far more than a cluster
// has; should it be reached, all is forgotten and asked anew.
const maxRemembered = 10_000

// NewNamespaces prepares a watch of namespaces. It asks the API server for nothing until Run.
func NewNamespaces(config *rest.Config, keys policy.Keys, log *slog.Logger) (*Namespaces, error) {
	client, core, err := clients(config, keys, log)
	if err != nil {
		return nil, err
	}
	return newNamespaces(client, core, keys, newBroadcast(), newLiveReads()), nil
}

func newNamespaces(client metadata.Interface, core corev1client.CoreV1Interface, keys policy.Keys, changed *broadcast, reads *liveReads) *Namespaces {
	w := newWatched(client, "namespaces", changed)
	w.labels, w.annotations = bears(keys), bears(keys)
	return &Namespaces{watched: w, keys: keys, core: core, changed: changed, reads: reads}
}

// Run watches until ctx ends.
func (n *Namespaces) Run(ctx context.Context) error {
	run(ctx, n.watched)
	return nil
}

// Age is how old what the watch knows may be, as of [Directory.Age].
func (n *Namespaces) Age() time.Duration { return n.watched.age() }

// Reads counts the reads past the watch that were made so far, and those that the bounds on them refused.
func (n *Namespaces) Reads() (made, refused uint64) {
	return n.reads.made.Load(), n.reads.refused.Load()
}

// Synced reports whether all namespaces have been listed once.
func (n *Namespaces) Synced() bool { return n.watched.synced() }

// Namespace returns what is known of the namespace. One that is not known to be opted in is read
// from the API server itself first: namespaces are labelled a moment before their first pod. It
// returns credential.ErrNotFound for a namespace that does not exist, and credential.ErrUnavailable
// when the API server could not be asked.
func (n *Namespaces) Namespace(ctx context.Context, name string) (policy.Namespace, error) {
	// While they are still being listed the list will say; to read each of them beside it would only delay it.
	n.changed.until(ctx, lagPatience, func() bool { return n.watched.synced() || n.watched.get("", name) != nil })
	ns, known := n.Known(name)
	if known && (n.keys.OptedIn(ns.Labels) || n.askedLately(name)) {
		return ns, nil
	}
	ns, err := n.ask(ctx, name)
	if err == nil && !n.keys.OptedIn(ns.Labels) {
		n.remember(name)
	}
	return ns, err
}

func (n *Namespaces) askedLately(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	at, ok := n.asked[name]
	return ok && time.Since(at) < trustFor
}

func (n *Namespaces) remember(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.asked == nil || len(n.asked) >= maxRemembered {
		n.asked = make(map[string]time.Time)
	}
	n.asked[name] = time.Now()
}

// Known returns what the watch knows of the namespace, without asking anybody.
func (n *Namespaces) Known(name string) (policy.Namespace, bool) {
	o := n.watched.get("", name)
	if o == nil {
		return policy.Namespace{}, false
	}
	return policy.Namespace{Name: o.name, Labels: o.labels, Annotations: o.annotations}, true
}

// Latest returns what the API server has of the namespace at this moment: it was perhaps annotated a moment ago, and
// the watch has yet to hear of it. Such reads are few in a second, of all and of one namespace. It returns errors as
// Namespace does.
func (n *Namespaces) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	return n.ask(ctx, name)
}

// ask asks the API server.
func (n *Namespaces) ask(ctx context.Context, name string) (policy.Namespace, error) {
	ns, found, err := readLive(ctx, n.reads, name, "namespace "+name, func(ctx context.Context) (*corev1.Namespace, error) {
		return n.core.Namespaces().Get(ctx, name, metav1.GetOptions{})
	})
	if err != nil {
		return policy.Namespace{}, err
	}
	if !found {
		return policy.Namespace{}, credential.Errorf(credential.ErrNotFound, credential.ReasonNamespaceNotFound, "namespace %q does not exist", name)
	}
	return policy.Namespace{Name: ns.Name, Labels: ns.Labels, Annotations: ns.Annotations}, nil
}
