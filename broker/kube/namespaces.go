package kube

import (
	"context"
	"log/slog"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Namespaces knows the labels and annotations of every namespace that bear our prefix.
type Namespaces struct {
	informed
	keys  policy.Keys
	core  corev1client.CoreV1Interface
	reads liveReads
}

// NewNamespaces prepares a watch of namespaces. It asks the API server for nothing until Run.
func NewNamespaces(config *rest.Config, keys policy.Keys, log *slog.Logger) (*Namespaces, error) {
	client, core, err := clients(config, keys, log)
	if err != nil {
		return nil, err
	}
	return newNamespaces(client, core, keys, newBroadcast(), newLiveReads())
}

func newNamespaces(client metadata.Interface, core corev1client.CoreV1Interface, keys policy.Keys, changed *broadcast, reads liveReads) (*Namespaces, error) {
	i, err := newInformed(client, "namespaces", changed, cache.Indexers{}, nil, func(m *metav1.PartialObjectMetadata) { keepOnly(m, bears(keys), bears(keys)) })
	if err != nil {
		return nil, err
	}
	return &Namespaces{informed: i, keys: keys, core: core, reads: reads}, nil
}

// Run watches until ctx ends.
func (n *Namespaces) Run(ctx context.Context) error {
	run(ctx, n.informed)
	return nil
}

// Synced reports whether all namespaces have been listed once.
func (n *Namespaces) Synced() bool { return synced(n.informed) }

// Namespace returns what is known of the namespace. One that is not known to be opted in is read
// from the API server itself first: namespaces are labelled a moment before their first pod. It
// returns credential.ErrNotFound for a namespace that does not exist, and credential.ErrUnavailable
// when the API server could not be asked.
func (n *Namespaces) Namespace(ctx context.Context, name string) (policy.Namespace, error) {
	if m := n.get(name); m != nil && n.keys.OptedIn(m.Labels) {
		return namespace(m.ObjectMeta), nil
	}
	return n.read(ctx, name)
}

// Known returns what the watch knows of the namespace, without asking anybody.
func (n *Namespaces) Known(name string) (policy.Namespace, bool) {
	m := n.get(name)
	if m == nil {
		return policy.Namespace{}, false
	}
	return namespace(m.ObjectMeta), true
}

// read asks the API server.
func (n *Namespaces) read(ctx context.Context, name string) (policy.Namespace, error) {
	var meta metav1.ObjectMeta
	found, err := n.reads.do(ctx, "namespace "+name, func(ctx context.Context) error {
		ns, err := n.core.Namespaces().Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			meta = ns.ObjectMeta
		}
		return err
	})
	if err != nil {
		return policy.Namespace{}, err
	}
	if !found {
		return policy.Namespace{}, credential.Errorf(credential.ErrNotFound, credential.ReasonNamespaceNotFound, "namespace %q does not exist", name)
	}
	return namespace(meta), nil
}

func namespace(meta metav1.ObjectMeta) policy.Namespace {
	return policy.Namespace{Name: meta.Name, Labels: meta.Labels, Annotations: meta.Annotations}
}
