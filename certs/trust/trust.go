// Package trust tells the pods of opted-in namespaces which roots the broker's certificate is verified
// by, and holds the broker to it: a leaf under a new root is not served before the pods can know that
// root.
//
// The replica that leads publishes the ConfigMap in every opted-in namespace and in its own, repairs
// it when somebody edits or deletes it, and keeps a record of the roots beside them in its own. Every
// replica, leading or not, follows that record.
//
// What is published is the union of
//   - the roots in the file that comes with the leaf (a Secret's ca.crt),
//   - the roots under which the leaf now served verifies,
//   - earlier ones, until a day after that was last so of them.
//
// It promises that
//   - a root whose leaf is being served is never withdrawn, whatever happens to the file, but by its
//     own expiry;
//   - nothing is published instead of something: while there is no root to publish, what is there stays;
//   - the broker is never stopped: while the API server is away, or refuses, publishing is tried
//     again and the leaf that pods know is served on;
//   - keys of others in a ConfigMap of that name are left alone.
//
// A ConfigMap is left where it is when its namespace is no longer opted in: running pods mount it,
// and kubelets could not restart their sidecars without it. The owner reference takes all of them away
// when Credence is uninstalled.
//
// It issues and renews nothing; cert-manager, or the operator, does.
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

// Names of what is published.
const (
	// RootsKey is the key of the ConfigMap that holds the roots, in PEM.
	RootsKey = "roots.pem"
	// RecordKey is the key, in the broker's own namespace alone, that says since when each root is
	// published and since when it is out of use, in JSON.
	RecordKey = "record.json"
	// DropAnnotation, on the ConfigMap in the broker's own namespace, names roots that are not to be
	// published from now on, whatever else speaks for them: a comma list of the SHA-256 digests of
	// their certificates, in hexadecimal digits. A root whose leaf is being served goes as soon as it
	// is not any more.
	DropAnnotation = "credence-iam.github.io/drop-roots"
	// FieldManager owns, by server-side apply, what is ours of a ConfigMap.
	FieldManager = "credence-broker"
	// Lease is the name of the Lease that the leading replica holds.
	Lease = "credence-broker"
)

// DefaultPropagation is the time that a published root is given to arrive in running pods: the kubelet
// looks at ConfigMaps about once a minute, and its copy may be a minute old.
const DefaultPropagation = 3 * time.Minute

// Config configures a [Trust]. Required, except where it says otherwise.
type Config struct {
	// REST reaches the API server.
	REST *rest.Config
	// Pair is the key pair that the broker serves with. It is told to hold back leaves under roots that
	// are not published long enough.
	Pair *certs.KeyPair
	// RootsFile holds the roots in PEM, as ca.crt beside the leaf does. It is read again every few
	// seconds. It need not be there: while it is not, Err says so, and only earlier roots are published.
	RootsFile string
	// Namespace is the broker's own.
	Namespace string
	// ConfigMap is the name of the ConfigMaps.
	ConfigMap string
	// Namespaces selects the opted-in namespaces by label.
	Namespaces string
	// Owner is the name of the ClusterRole that owns the ConfigMaps. Empty: nothing does, and they stay
	// when Credence is uninstalled. While it is set and there is none of that name, nothing is published.
	Owner string
	// Propagation is how long a root is published everywhere before a leaf under it is served. Zero:
	// none is held back.
	Propagation time.Duration
	// Identity tells this replica from the others. Zero means the host's name, which is the pod's, and
	// something random.
	Identity string
	// Logger gets a record for each root that comes, retires or goes, and for failures.
	Logger *slog.Logger
}

// Trust publishes roots, in one replica of several. Make it with [New].
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

// New checks the configuration, and from then on holds back the pair's leaves. It asks the API server for
// nothing until Run.
func New(cfg Config) (*Trust, error) {
	switch {
	case cfg.REST == nil || cfg.Pair == nil || cfg.Logger == nil:
		return nil, errors.New("publishing roots: a REST configuration, a key pair and a Logger are required")
	case cfg.RootsFile == "" || cfg.Namespace == "" || cfg.ConfigMap == "" || cfg.Namespaces == "":
		return nil, errors.New("publishing roots: a file of roots, the broker's own namespace, a ConfigMap's name and a selector of namespaces are required")
	case cfg.Propagation < 0:
		return nil, errors.New("publishing roots: a propagation time below zero makes no sense")
	}
	if cfg.Identity == "" {
		host, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("publishing roots: naming this replica: %w", err)
		}
		cfg.Identity = host + "_" + rand.Text() // A container that restarts is another replica, too.
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

// connect makes the clients. Each holds its own to a bound of its own: see publishRate.
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

// Run follows the record and, while this replica leads, publishes, until ctx ends. Then it gives up the
// lead at once, so that another replica takes over. No failure ends it.
func (t *Trust) Run(ctx context.Context) error {
	var running sync.WaitGroup
	running.Go(func() { t.follow(ctx) })
	running.Go(func() { t.campaign(ctx) })
	running.Wait()
	return nil
}

// Leading reports whether this replica publishes.
func (t *Trust) Leading() bool { return t.leading.Load() }

// Err returns nil while all is well with what this replica does, and otherwise why not. A leaf that is
// held back is no failure; the key pair's Err tells of it. It is for metrics and people: a broker that
// cannot publish should go on serving.
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

// serving is the pair that is served at this moment; the pair judges a new one on the way.
func (t *Trust) serving() (*tls.Certificate, error) { return t.cfg.Pair.GetCertificate(nil) }
