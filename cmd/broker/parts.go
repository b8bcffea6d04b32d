package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	// AWS's certificates have public roots, and an image of one program has no file of them. These are used only
	// where the system has none; see cmd/broker/roots_test.go.
	_ "golang.org/x/crypto/x509roots/fallback"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/trust"
)

// parts are what the broker is made of.
type parts struct {
	log       *slog.Logger
	pair      *certs.KeyPair
	trust     *trust.Trust // nil: nothing is published
	directory *kube.Directory
	verifier  verifier
	events    *kube.Events
	sts       *assume.STS
	sessions  *cache.Cache[policy.Grant]
	decisions *audit.Log
}

// verifier is either of the two that kube has.
type verifier interface {
	identity.Verifier
	Run(ctx context.Context) error
	Ready() bool
	Age() time.Duration
}

// newVerifier makes the one that was asked for.
func newVerifier(o options, rest *rest.Config, log *slog.Logger) (verifier, error) {
	if o.tokenReview {
		return kube.NewTokenReview(kube.TokenReviewConfig{REST: rest, Audience: o.audience, Issuers: o.issuers, Logger: log})
	}
	return kube.NewJWKS(kube.JWKSConfig{REST: rest, Audience: o.audience, Issuers: o.issuers, Logger: log})
}

// build makes the parts that need nothing from AWS.
func build(ctx context.Context, o options) (p parts, err error) {
	p.log = slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: o.level}))
	klog.SetSlogLogger(p.log) // client-go's own lines
	if p.pair, err = certs.NewKeyPair(o.tlsCert, o.tlsKey, p.log); err != nil {
		return parts{}, fmt.Errorf("--tls-cert, --tls-key: %w", err)
	}
	rest, err := clientcmd.BuildConfigFromFlags("", o.kubeconfig)
	if err != nil {
		return parts{}, fmt.Errorf("reaching the API server (set --kubeconfig outside a cluster): %w", err)
	}
	if p.trust, err = publisher(ctx, o, rest, p.pair, p.log); err != nil {
		return parts{}, err
	}
	if p.directory, err = kube.NewDirectory(rest, o.keys, p.log); err != nil {
		return parts{}, err
	}
	if p.verifier, err = newVerifier(o, rest, p.log); err != nil {
		return parts{}, err
	}
	name, err := os.Hostname() // in a pod, the pod's
	if err != nil {
		return parts{}, fmt.Errorf("finding out the name of this broker: %w", err)
	}
	if p.events, err = kube.NewEvents(rest, name, p.log); err != nil {
		return parts{}, err
	}
	if p.sts, err = assume.New(ctx, assume.Config{Region: o.region, Endpoint: o.stsEndpoint, FirstHop: o.firstHop}); err != nil {
		return parts{}, err
	}
	if p.sessions, err = cache.New(cache.Config[policy.Grant]{Source: p.sts, Logger: p.log}); err != nil {
		return parts{}, err
	}
	p.decisions, err = audit.New(audit.Config{Writer: os.Stdout, Required: o.auditRequired, Logger: p.log})
	return p, err
}

// publisher makes what publishes the roots; nil when nothing is to be published.
func publisher(ctx context.Context, o options, rest *rest.Config, pair *certs.KeyPair, log *slog.Logger) (*trust.Trust, error) {
	if o.rootsFile == "" {
		return nil, nil
	}
	if o.rootsRequired {
		// At the start an operator looks; later the broker goes on with the roots it knew.
		if _, err := certs.NewRoots(o.rootsFile, nil); err != nil {
			return nil, fmt.Errorf("--%s: %w", rootsFileFlag, err)
		}
	}
	if o.namespace == "" {
		o.namespace = ownNamespace()
	}
	if o.namespace == "" {
		if o.rootsRequired {
			return nil, fmt.Errorf("--%s: set --namespace outside a cluster", rootsFileFlag)
		}
		log.InfoContext(ctx, "Publishing no roots: there is no namespace to publish from; set --namespace outside a cluster")
		return nil, nil
	}
	t, err := trust.New(trust.Config{
		REST: rest, Pair: pair, RootsFile: o.rootsFile, Namespace: o.namespace, ConfigMap: o.trustConfigMap,
		Namespaces: o.keys.Name(policy.Inject) + "=" + policy.Enabled, Owner: o.trustOwner, Propagation: o.trustPropagation, Logger: log,
	})
	if err != nil {
		return nil, fmt.Errorf("--%s, --trust-config-map: %w", rootsFileFlag, err)
	}
	return t, nil
}

// ownNamespace is the namespace of the pod that this process runs in; empty outside a cluster.
func ownNamespace() string {
	if name := os.Getenv("POD_NAMESPACE"); name != "" {
		return name
	}
	name, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(name))
}

// broker makes what decides, which needs the base ARN.
func (p parts) broker(o options, base credential.RoleBase) (*broker.Broker, *broker.Prefetch, error) {
	rules, err := policy.New(policy.Config{Keys: o.keys, Base: base, Cluster: o.cluster})
	if err != nil {
		return nil, nil, fmt.Errorf("--cluster-name: %w", err)
	}
	prefetch, err := broker.NewPrefetch(broker.PrefetchConfig{Lookup: p.directory.Pod, Rules: rules, Sessions: p.sessions, Logger: p.log})
	if err != nil {
		return nil, nil, err
	}
	if err := p.directory.OnChange(prefetch.Changed); err != nil {
		return nil, nil, err
	}
	b, err := broker.New(broker.Config{
		Verifier: p.verifier, Binder: p.directory, Rules: rules, Sessions: p.sessions, Audit: p.decisions,
		Region: p.sts.Region(), Logger: p.log,
	})
	return b, prefetch, err
}
