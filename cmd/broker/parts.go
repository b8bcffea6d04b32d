package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"

	// AWS's certificates have public roots, and an image of one program has no file of them. These are used only
	// where the system has none; see cmd/broker/roots_test.go.
	_ "golang.org/x/crypto/x509roots/fallback"
	"golang.org/x/time/rate"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/broker/tracing"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// parts are what the broker is made of.
type parts struct {
	log       *slog.Logger
	own       policy.Pod // this broker's; without a UID outside a cluster
	pair      *certs.KeyPair
	trust     *trust.Trust // nil: nothing is published
	directory *kube.Directory
	placement *placement.Placement
	endpoints *kube.Endpoints // nil: this broker is the only one
	verifier  verifier
	events    *kube.Events
	budget    *broker.Budget
	sts       *assume.STS
	sessions  *cache.Cache[policy.Grant]
	decisions *audit.Log
	metrics   *admin.Metrics
	traces    *tracing.Tracing // nil: nothing is traced
}

// verifier is either of the two that kube has.
type verifier interface {
	identity.Verifier
	Run(ctx context.Context) error
	Ready() bool
	Age() time.Duration
	Waiting() int
}

// newVerifier makes the one that was asked for.
func newVerifier(o options, rest *rest.Config, directory *kube.Directory, log *slog.Logger) (verifier, error) {
	if o.tokenReview {
		return kube.NewTokenReview(kube.TokenReviewConfig{
			REST: rest, Audience: o.audience, Issuers: o.issuers, MaxLife: o.maxTokenLife, Expected: directory.Expects, Logger: log,
		})
	}
	return kube.NewJWKS(kube.JWKSConfig{REST: rest, Audience: o.audience, Issuers: o.issuers, MaxLife: o.maxTokenLife, Logger: log})
}

// build makes the parts that need nothing from AWS.
func build(ctx context.Context, o options) (p parts, err error) {
	p.log = program.NewLogger(os.Stderr, o.level)
	klog.SetSlogLogger(p.log) // client-go's own lines
	if o.rulesFile != "" {
		// It is read again once the account is known. A wrong one is better told of before STS has answered.
		if err := rulesfile.Check(o.rulesFile); err != nil {
			return parts{}, fmt.Errorf("--rules-file: %w", err)
		}
	}
	if p.metrics, err = admin.NewMetrics(program.Version(), p.log); err != nil {
		return parts{}, err
	}
	if p.pair, err = certs.NewKeyPair(o.tlsCert, o.tlsKey, p.log); err != nil {
		return parts{}, fmt.Errorf("--tls-cert, --tls-key: %w", err)
	}
	if o.namespace == "" {
		o.namespace = ownNamespace()
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
	if p.verifier, err = newVerifier(o, rest, p.directory, p.log); err != nil {
		return parts{}, err
	}
	name, err := os.Hostname() // in a pod, the pod's
	if err != nil {
		return parts{}, fmt.Errorf("finding out the name of this broker: %w", err)
	}
	if p.events, err = kube.NewEvents(rest, name, p.log); err != nil {
		return parts{}, err
	}
	if p.sts, err = assume.New(ctx, assume.Config{
		Region: o.region, Endpoint: o.stsEndpoint, FirstHop: o.firstHop, Logger: p.log,
		Observe: func(c assume.Call) { p.metrics.STSCall(c.Action, c.Outcome, c.Took) },
	}); err != nil {
		return parts{}, err
	}
	source, err := p.traced(ctx, o)
	if err != nil {
		return parts{}, err
	}
	if p.sessions, err = cache.New(cache.Config[policy.Grant]{
		Source: source, Rate: rate.Limit(o.stsRate), Concurrency: o.stsConcurrency, MaxPerTenant: o.maxGrants, Logger: p.log,
	}); err != nil {
		return parts{}, err
	}
	if err := p.place(o, rest); err != nil {
		return parts{}, err
	}
	p.own = policy.Pod{Namespace: o.namespace, Name: name, UID: os.Getenv("POD_UID")}
	if p.budget, err = broker.NewBudget(broker.BudgetConfig{
		Stats: p.sessions.Stats, Logger: p.log,
		Tell: func(note string) {
			if p.own.UID != "" { // outside a cluster there is no pod to tell it of
				p.events.BudgetShort(p.own, note)
			}
		},
	}); err != nil {
		return parts{}, err
	}
	if p.decisions, err = audit.New(audit.Config{Writer: os.Stdout, Required: o.auditRequired, Logger: p.log}); err != nil {
		return parts{}, err
	}
	return p, p.metrics.Watch(p.sources())
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

// place makes what says which sessions this broker keeps, and what says which brokers there are.
func (p *parts) place(o options, rest *rest.Config) (err error) {
	p.placement = placement.New(o.settleTime)
	p.placement.OnChange(func() { p.sessions.ShareRate(p.placement.Brokers()) })
	if o.service == "" {
		self := netip.IPv6Loopback() // any will do where there is no other
		p.placement.Update(placement.Members{Self: self, Ready: []netip.Addr{self}})
		return nil
	}
	if o.namespace == "" {
		return errors.New("--service: set --namespace outside a cluster")
	}
	p.endpoints, err = kube.NewEndpoints(kube.EndpointsConfig{
		REST: rest, Namespace: o.namespace, Service: o.service, Own: o.podIPs, Update: p.placement.Update, Logger: p.log,
	})
	return err
}

// deciding is what needs the base ARN.
type deciding struct {
	broker   *broker.Broker
	prefetch *broker.Prefetch
	rules    *rulesfile.Follower // nil: there is no rules file
}

// decide makes it.
func (p parts) decide(o options, base credential.RoleBase) (d deciding, err error) {
	rules, err := policy.New(policy.Config{Keys: o.keys, Base: base, Cluster: o.cluster, Chained: o.firstHop != (credential.RoleARN{})})
	if err != nil {
		return deciding{}, fmt.Errorf("--cluster-name: %w", err)
	}
	d.prefetch, err = broker.NewPrefetch(broker.PrefetchConfig{
		Lookup: p.directory.Pod, Owns: p.placement.Owns, Rules: rules, Sessions: p.sessions, Logger: p.log,
	})
	if err != nil {
		return deciding{}, err
	}
	all := func() { d.prefetch.Changed(p.directory.Pods()...) }
	if o.rulesFile != "" {
		d.rules, err = rulesfile.New(rulesfile.Config{
			Path: o.rulesFile, Rules: rules, Logger: p.log, OnChange: all,
		})
		if err != nil {
			return deciding{}, fmt.Errorf("--rules-file: %w", err)
		}
	}
	deciders := admin.Sources{PodsQueued: d.prefetch.Pending}
	if d.rules != nil {
		deciders.RulesFile = func() (admin.RulesFile, bool) {
			status := d.rules.Status()
			return admin.RulesFile{Loaded: status.Loaded, OK: status.Err == nil}, true
		}
	}
	if err := p.metrics.Watch(deciders); err != nil {
		return deciding{}, err
	}
	p.directory.OnChange(func(key string) { d.prefetch.Changed(key) })
	p.placement.OnChange(all)
	all() // for a change between the two
	d.broker, err = broker.New(broker.Config{
		Verifier: p.verifier, Binder: p.directory, Rules: rules, Sessions: p.sessions, Audit: p.decisions,
		Region: p.sts.Region(), Logger: p.log, Observers: append(p.observers(), broker.ReportTo(p.events, p.directory.Expects)),
	})
	return d, err
}
