// Package trust publishes the broker's root certificates to the pods of opted-in namespaces, and keeps a new leaf pending until
// pods can have its root.
//
// The leading replica publishes the ConfigMap in every opted-in namespace and in its own, and repairs it if another client
// edits or deletes it. In its own namespace, the ConfigMap also has the trust record. Every replica follows that record.
//
// It publishes:
//   - the roots in the file next to the leaf (a Secret's ca.crt),
//   - the roots that verify the served leaf,
//   - earlier roots, until neither of these has been true for a day.
//
// It guarantees:
//   - A root that verifies the served leaf is never withdrawn before it expires, whatever happens to the file.
//   - Published roots are never replaced by nothing: without a root to publish, the ConfigMaps do not change.
//   - The broker never stops. While the API server is unavailable or refuses, the leader retries, and the broker serves the leaf
//     that pods can verify.
//   - Keys of other clients in a ConfigMap of that name do not change.
//
// A namespace that is no longer opted in keeps its ConfigMap: running pods mount it, and kubelets could not restart their
// sidecars without it. The owner reference removes all ConfigMaps when Credence is uninstalled.
//
// The package does not issue or renew certificates; cert-manager or the cluster admin does.
package trust

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	coordinationv1client "k8s.io/client-go/kubernetes/typed/coordination/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/certs"
)

// Names of published objects and keys.
const (
	// RootsKey is the ConfigMap's key for the roots, in PEM.
	RootsKey = "roots.pem"
	// RecordKey is the ConfigMap's key for the trust record, in JSON: when each root was published and when it was retired. Only
	// the broker's own namespace has it.
	RecordKey = "record.json"
	// dropAnnotation, on the ConfigMap in the broker's own namespace, lists roots to withdraw, even if the file has them. Its
	// value has the SHA-256 digests of their certificates in hexadecimal digits, separated by commas. A root that verifies the
	// served leaf is withdrawn when another leaf is served.
	dropAnnotation = "credence-iam.github.io/drop-roots"
	// fieldManager is the owner of our fields of a ConfigMap (server-side apply).
	fieldManager = "credence-broker"
	// Lease is the name of the Lease that the leading replica holds.
	Lease = "credence-broker"
)

// DefaultPropagation is the time that a published root may need to reach running pods. The kubelet reads ConfigMaps about once a
// minute, from a copy that may be a minute old.
const DefaultPropagation = 3 * time.Minute

// Config configures a [Trust]. A field is required unless its comment says otherwise.
type Config struct {
	// REST reaches the API server.
	REST *rest.Config
	// Pair is the broker's serving certificate. New sets its gate, so that a leaf stays pending until its root has been
	// published for Propagation.
	Pair *certs.KeyPair
	// RootsFile is the file with the roots in PEM, such as ca.crt next to the leaf. It is read every few seconds. While it does
	// not exist, Err returns an error, and only earlier roots are published.
	RootsFile string
	// Namespace is the broker's own.
	Namespace string
	// ConfigMap is the name of the ConfigMaps.
	ConfigMap string
	// Namespaces is the label selector of opted-in namespaces.
	Namespaces string
	// Owner is the name of the ClusterRole that owns the ConfigMaps. While that ClusterRole does not exist, nothing is
	// published. Default: no owner; the ConfigMaps stay when Credence is uninstalled.
	Owner string
	// Propagation is how long a root must have been published everywhere before a leaf under it is served. Zero: no leaf is
	// pending.
	Propagation time.Duration
	// Identity identifies this replica in the election. Default: the host name, which is the pod's name, with a random suffix.
	Identity string
	// Logger receives a line for each root that is published, retired or withdrawn, and for failures.
	Logger *slog.Logger
}

// Trust publishes roots while its replica leads, and follows the trust record. Make it with [New]. Its methods may be called
// concurrently.
type Trust struct {
	cfg    Config
	core   corev1client.CoreV1Interface
	leases coordinationv1client.CoordinationV1Interface
	meta   metadata.Interface
	gate   *gate

	leading   atomic.Bool
	mu        sync.Mutex
	publisher *publisher // nil while another replica leads; guarded by mu
}

// New checks cfg and sets the gate of cfg.Pair. Only Run sends requests to the API server.
func New(cfg Config) (*Trust, error) {
	switch {
	case cfg.REST == nil || cfg.Pair == nil || cfg.Logger == nil:
		return nil, errors.New("publishing roots: a REST configuration, a key pair and a Logger are required")
	case cfg.RootsFile == "" || cfg.Namespace == "" || cfg.ConfigMap == "" || cfg.Namespaces == "":
		return nil, errors.New("publishing roots: RootsFile, Namespace, ConfigMap and Namespaces are required")
	case cfg.Propagation < 0:
		return nil, errors.New("publishing roots: the propagation time must not be negative")
	}
	if cfg.Identity == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("publishing roots: naming this replica: %w", err)
		}
		cfg.Identity = host + "_" + rand.Text() // A restarted container is another replica.
	}
	t := &Trust{cfg: cfg}
	if err := t.connect(); err != nil {
		return nil, fmt.Errorf("publishing roots: %w", err)
	}
	t.gate = &gate{propagation: cfg.Propagation, log: cfg.Logger}
	if roots, err := readRoots(cfg.RootsFile); err == nil {
		serving, err := cfg.Pair.GetCertificate(nil)
		if err != nil {
			return nil, fmt.Errorf("publishing roots: %w", err)
		}
		t.gate.begin(serving, roots)
	}
	if cfg.Propagation > 0 {
		cfg.Pair.SetGate(t.gate.allow)
	}
	return t, nil
}

// connect makes the clients. They have no rate limit, because publishRate limits the writes.
func (t *Trust) connect() (err error) {
	config := rest.CopyConfig(t.cfg.REST)
	config.QPS = -1
	if t.core, err = corev1client.NewForConfig(config); err != nil {
		return fmt.Errorf("making a core client: %w", err)
	}
	if t.leases, err = coordinationv1client.NewForConfig(config); err != nil {
		return fmt.Errorf("making a client for leases: %w", err)
	}
	if t.meta, err = metadata.NewForConfig(config); err != nil {
		return fmt.Errorf("making a metadata client: %w", err)
	}
	return nil
}

// Run follows the trust record, and publishes while this replica leads, until ctx ends. Then it releases the Lease, so that
// another replica can lead at once. It returns no error before that.
func (t *Trust) Run(ctx context.Context) error {
	var running sync.WaitGroup
	running.Go(func() { t.follow(ctx) })
	running.Go(func() { t.campaign(ctx) })
	running.Wait()
	return nil
}

// Err returns the present failures of this replica, or nil. A pending leaf is not a failure; the key pair's Err reports it. Err
// is for metrics and users: a broker that cannot publish should keep serving.
func (t *Trust) Err() error {
	errs := []error{t.gate.problem()}
	t.mu.Lock()
	p := t.publisher
	t.mu.Unlock()
	if p != nil {
		errs = append(errs, p.problem())
	}
	return errors.Join(errs...)
}

// serving returns the served pair. The call reads the files, and the gate decides about a new pair in them.
func (t *Trust) serving() (*tls.Certificate, error) { return t.cfg.Pair.GetCertificate(nil) }
