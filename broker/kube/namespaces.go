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

// Namespaces has the labels and annotations of all namespaces that have our prefix. Its methods may be called concurrently.
type Namespaces struct {
	watched *watched
	keys    policy.Keys
	core    corev1client.CoreV1Interface
	changed *broadcast
	reads   *liveReads

	mu         sync.Mutex
	notOptedIn map[string]time.Time // :: name → when the last live read found it not opted in; guarded by mu
}

// readInterval is the minimum time between two live reads of a namespace that is not opted in: if such a namespace has many
// pods, it must not use up the live reads of the others.
const readInterval = 5 * time.Second

// maxRemembered bounds notOptedIn. It is far more than a cluster has. If it is reached, Namespaces drops all entries and reads
// these namespaces again.
const maxRemembered = 10_000

// NewNamespaces prepares a watch of namespaces. It does not call the API server; Run does.
func NewNamespaces(config *rest.Config, keys policy.Keys, log *slog.Logger) (*Namespaces, error) {
	client, core, err := clients(config, keys, log)
	if err != nil {
		return nil, err
	}
	return newNamespaces(client, core, keys, newBroadcast(), newLiveReads()), nil
}

func newNamespaces(client metadata.Interface, core corev1client.CoreV1Interface, keys policy.Keys, changed *broadcast, reads *liveReads) *Namespaces {
	w := newWatched(client, "namespaces", changed)
	w.labels, w.annotations = hasPrefix(keys), hasPrefix(keys)
	return &Namespaces{watched: w, keys: keys, core: core, changed: changed, reads: reads}
}

// Run watches until ctx ends.
func (n *Namespaces) Run(ctx context.Context) error {
	run(ctx, n.watched)
	return nil
}

// Age returns how old the cached state may be, see [Directory.Age].
func (n *Namespaces) Age() time.Duration { return n.watched.age() }

// Reads returns how many live reads were made so far, and how many their limits refused.
func (n *Namespaces) Reads() (made, refused uint64) {
	return n.reads.made.Load(), n.reads.refused.Load()
}

// Synced reports whether the watch has had a complete list.
func (n *Namespaces) Synced() bool { return n.watched.synced() }

// Namespace returns the namespace. If the watch does not have it as opted in, Namespace reads it from the API server: users
// label a namespace a moment before they create its first pod. It returns credential.ErrNotFound for a namespace that does not
// exist, and credential.ErrUnavailable if the live read fails.
func (n *Namespaces) Namespace(ctx context.Context, name string) (policy.Namespace, error) {
	// Before the first list is complete, wait for it: a live read of each namespace would only delay it.
	n.changed.until(ctx, maxLag, func() bool { return n.watched.synced() || n.watched.get("", name) != nil })
	ns, known := n.Known(name)
	if known && (n.keys.OptedIn(ns.Labels) || n.readRecently(name)) {
		return ns, nil
	}
	ns, err := n.read(ctx, name)
	if err == nil && !n.keys.OptedIn(ns.Labels) {
		n.remember(name)
	}
	return ns, err
}

func (n *Namespaces) readRecently(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	at, ok := n.notOptedIn[name]
	return ok && time.Since(at) < readInterval
}

func (n *Namespaces) remember(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.notOptedIn == nil || len(n.notOptedIn) >= maxRemembered {
		n.notOptedIn = make(map[string]time.Time)
	}
	n.notOptedIn[name] = time.Now()
}

// Known returns the namespace from the watch, without a live read.
func (n *Namespaces) Known(name string) (policy.Namespace, bool) {
	o := n.watched.get("", name)
	if o == nil {
		return policy.Namespace{}, false
	}
	return policy.Namespace{Name: o.name, Labels: o.labels, Annotations: o.annotations}, true
}

// Latest reads the namespace from the API server: perhaps a user annotated it a moment ago, and the watch does not have that
// yet. The number of such reads per second is limited, for all and for each namespace. It returns errors as Namespace does.
func (n *Namespaces) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	return n.read(ctx, name)
}

// read reads the namespace from the API server.
func (n *Namespaces) read(ctx context.Context, name string) (policy.Namespace, error) {
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
