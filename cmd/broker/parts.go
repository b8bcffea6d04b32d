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

	// AWS's certificates have public roots, and an image with one program has no file of them. The program uses these only if
	// the system has none; see cmd/broker/roots_test.go.
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
	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/kube/events"
	"github.com/credence-iam/credence/broker/kube/verify"
	"github.com/credence-iam/credence/broker/placement"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/broker/tracing"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/trust"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// parts are the parts of the broker that need nothing from AWS. build makes all of them before any method uses one.
type parts struct {
	log       *slog.Logger
	self      policy.Pod // this broker's pod; without a UID outside a cluster
	pair      *certs.KeyPair
	trust     *trust.Trust // nil: this broker publishes no roots
	directory *kube.Directory
	placement *placement.Placement
	endpoints *kube.Endpoints // nil: this broker is the only one
	verifier  verifier
	commands  *verify.Account // nil: commands need no token
	events    *events.Recorder
	budget    *broker.Budget
	impaired  *broker.Impairments
	sts       *assume.STS
	sessions  *cache.Cache[policy.Grant]
	prefetch  *broker.Prefetch
	decisions *audit.Log
	metrics   *admin.Metrics
	traces    *tracing.Tracing // nil: calls are not traced
}

// build makes the parts. Each takes the parts that it depends on as values, so a wrong order does not compile.
func build(ctx context.Context, o options) (parts, error) {
	log := program.NewLogger(os.Stderr, o.level)
	klog.SetSlogLogger(log) // client-go's own lines
	if o.rulesFile != "" {
		// The rules file is read again when the account is known. An invalid one should fail before STS has responded.
		if err := rulesfile.Check(o.rulesFile); err != nil {
			return parts{}, fmt.Errorf("--rules-file: %w", err)
		}
	}
	metrics, err := admin.NewMetrics(program.Version(), log)
	if err != nil {
		return parts{}, err
	}
	pair, err := certs.NewKeyPair(o.tlsCert, o.tlsKey, log)
	if err != nil {
		return parts{}, fmt.Errorf("--tls-cert, --tls-key: %w", err)
	}
	if o.namespace == "" {
		o.namespace = ownNamespace()
	}
	config, err := clientcmd.BuildConfigFromFlags("", o.kubeconfig)
	if err != nil {
		return parts{}, fmt.Errorf("reaching the API server (set --kubeconfig outside a cluster): %w", err)
	}
	publisher, err := newTrust(ctx, o, config, pair, log)
	if err != nil {
		return parts{}, err
	}
	directory, err := kube.NewDirectory(config, o.keys, log)
	if err != nil {
		return parts{}, err
	}
	verifier, err := newVerifier(o, config, directory, log)
	if err != nil {
		return parts{}, err
	}
	commands, err := newCommands(o, config)
	if err != nil {
		return parts{}, err
	}
	name, err := os.Hostname() // in a pod, the pod's name
	if err != nil {
		return parts{}, fmt.Errorf("reading the name of this broker: %w", err)
	}
	self := policy.Pod{Namespace: o.namespace, Name: name, UID: os.Getenv("POD_UID")}
	recorder, err := events.New(config, name, log)
	if err != nil {
		return parts{}, err
	}
	sts, err := assume.New(ctx, assume.Config{
		Region: o.region, Endpoint: o.stsEndpoint, AssumeRole: o.assumeRole, Logger: log,
		Observe: func(c assume.Call) { metrics.STSCall(c.Action, c.Outcome, c.Took) },
	})
	if err != nil {
		return parts{}, err
	}
	traces, source, err := newTracing(ctx, o, sts, log)
	if err != nil {
		return parts{}, err
	}
	impaired, err := newImpairments(sts, recorder, self, log)
	if err != nil {
		return parts{}, err
	}
	sessions, err := cache.New(cache.Config[policy.Grant]{
		Source: impaired.Source(source), Rate: rate.Limit(o.stsRate), Concurrency: o.stsConcurrency, MaxPerTenant: o.maxGrants, Logger: log,
	})
	if err != nil {
		return parts{}, err
	}
	place, endpoints, err := newPlacement(o, config, sessions, log)
	if err != nil {
		return parts{}, err
	}
	prefetch, err := newPrefetch(directory, place, sessions, log)
	if err != nil {
		return parts{}, err
	}
	budget, err := newBudget(sessions, recorder, self, log)
	if err != nil {
		return parts{}, err
	}
	decisions, err := audit.New(audit.Config{Writer: os.Stdout, Required: o.auditRequired, Logger: log})
	if err != nil {
		return parts{}, err
	}
	p := parts{
		log: log, self: self, pair: pair, trust: publisher, directory: directory, placement: place, endpoints: endpoints, verifier: verifier, commands: commands,
		events: recorder, budget: budget, impaired: impaired, sts: sts, sessions: sessions, prefetch: prefetch, decisions: decisions, metrics: metrics, traces: traces,
	}
	return p, metrics.Watch(p.sources())
}

// newCommands returns the verifier of the tokens that commands need, nil if they need none.
func newCommands(o options, rest *rest.Config) (*verify.Account, error) {
	if o.commandAccount == "" {
		return nil, nil
	}
	if o.namespace == "" {
		return nil, errors.New("--command-account needs --namespace or POD_NAMESPACE outside a cluster")
	}
	return verify.NewAccount(rest, o.namespace, o.commandAccount, o.audience+debugapi.CommandAudience)
}

// verifier is either of the two verifiers of package kube.
type verifier interface {
	identity.Verifier
	Run(ctx context.Context) error
	Ready() bool
	Age() time.Duration
	Waiting() int
}

// newVerifier makes the verifier of --token-verification.
func newVerifier(o options, rest *rest.Config, directory *kube.Directory, log *slog.Logger) (verifier, error) {
	cfg := verify.Config{
		REST: rest, Audience: o.audience, Issuers: o.issuers, MaxLife: o.maxTokenLife, Expected: directory.Expects, Logger: log,
	}
	if o.tokenReview {
		return verify.NewTokenReview(cfg)
	}
	return verify.NewJWKS(cfg)
}

// newTrust makes the publisher of roots; nil if this broker publishes none.
func newTrust(ctx context.Context, o options, rest *rest.Config, pair *certs.KeyPair, log *slog.Logger) (*trust.Trust, error) {
	if o.rootsFile == "" {
		return nil, nil
	}
	if o.rootsRequired {
		// At the start a cluster admin sees an error. Later the broker keeps the roots that it has read.
		if _, err := certs.NewRoots(o.rootsFile, nil); err != nil {
			return nil, fmt.Errorf("--%s: %w", rootsFileFlag, err)
		}
	}
	if o.namespace == "" {
		if o.rootsRequired {
			return nil, fmt.Errorf("--%s: set --namespace outside a cluster", rootsFileFlag)
		}
		log.InfoContext(ctx, "Could not publish roots without a namespace, set --namespace outside a cluster")
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

// ownNamespace returns the namespace of this process's pod; empty outside a cluster.
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

// newPlacement makes the part that decides which sessions this broker owns, and the part that reports to it which brokers there
// are; nil if this broker is the only one.
func newPlacement(o options, rest *rest.Config, sessions *cache.Cache[policy.Grant], log *slog.Logger) (*placement.Placement, *kube.Endpoints, error) {
	p := placement.New(o.settleTime)
	p.OnChange(func() { sessions.ShareRate(p.Brokers()) })
	if o.service == "" {
		self := netip.IPv6Loopback() // the only broker may have any address
		p.Update(placement.Members{Self: self, Ready: []netip.Addr{self}})
		return p, nil, nil
	}
	if o.namespace == "" {
		return nil, nil, errors.New("--service: set --namespace outside a cluster")
	}
	endpoints, err := kube.NewEndpoints(kube.EndpointsConfig{
		REST: rest, Namespace: o.namespace, Service: o.service, Own: o.podIPs, Update: p.Update, Logger: log,
	})
	return p, endpoints, err
}

// newPrefetch makes the prefetch of the sessions that this broker owns. It looks at a pod when the pod or its namespace
// changes, and at all pods when the brokers change.
func newPrefetch(directory *kube.Directory, place *placement.Placement, sessions *cache.Cache[policy.Grant], log *slog.Logger) (*broker.Prefetch, error) {
	prefetch, err := broker.NewPrefetch(broker.PrefetchConfig{Lookup: directory.Pod, Owns: place.Owns, Sessions: sessions, Logger: log})
	if err != nil {
		return nil, err
	}
	directory.OnChange(func(key string) { prefetch.Changed(key) })
	place.OnChange(func() { prefetch.Changed(directory.Pods()...) })
	return prefetch, nil
}

// newBudget makes the early warning that --sts-rate is too low. It writes an Event on this broker's own pod.
func newBudget(sessions *cache.Cache[policy.Grant], recorder *events.Recorder, self policy.Pod, log *slog.Logger) (*broker.Budget, error) {
	return broker.NewBudget(broker.BudgetConfig{
		Stats: sessions.Stats, Logger: log,
		Report: func(note string) {
			if self.UID != "" { // outside a cluster there is no pod to write an Event on
				recorder.Own(self, events.ReasonBudget, note, time.Time{}, 0)
			}
		},
	})
}

// fixes say who fixes an impairment, and how. The message of TOKEN_AUDIENCE says it.
var fixes = map[credential.Reason]string{
	credential.ReasonBrokerCredentials: "a cluster admin must fix this; until then, new pods get no credentials",
	credential.ReasonSTSUnavailable:    "until STS responds, new pods get no credentials; do not restart brokers, their cached sessions are still valid",
	credential.ReasonSTSThrottled:      "a cluster admin must reduce the STS calls of this AWS account, of Credence by a lower --sts-rate (broker.stsRate)",
	credential.ReasonTokenAudience:     "",
}

// newImpairments makes the detection of impairments. It writes Events on this broker's own pod.
func newImpairments(sts *assume.STS, recorder *events.Recorder, self policy.Pod, log *slog.Logger) (*broker.Impairments, error) {
	report := func(reason, note string, is broker.Impairment) {
		if self.UID != "" { // outside a cluster there is no pod to write an Event on
			recorder.Own(self, reason, note, is.Since, is.Count)
		}
	}
	return broker.NewImpairments(broker.ImpairmentsConfig{
		Impaired: func(is broker.Impairment) {
			note := fmt.Sprintf("%s: %s; %s", is.Reason, sts.Explain(is.Err), fixes[is.Reason])
			if is.Reason == credential.ReasonTokenAudience {
				note = fmt.Sprintf("%s: pod %s/%s: %s", is.Reason, is.Pod.Namespace, is.Pod.Name, is.Err.Message)
			}
			report(events.ReasonImpaired, note+fmt.Sprintf("; each failure: kubectl -n %s logs %s", self.Namespace, self.Name), is)
		},
		Recovered: func(is broker.Impairment) {
			report(events.ReasonRecovered, fmt.Sprintf("%s has ended after %s", is.Reason, is.Last.Sub(is.Since).Round(time.Second)), broker.Impairment{})
		},
		Logger: log,
	})
}
