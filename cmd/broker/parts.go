package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
)

// parts are what the broker is made of.
type parts struct {
	log       *slog.Logger
	pair      *certs.KeyPair
	directory *kube.Directory
	verifier  *kube.JWKS
	sts       *assume.STS
	sessions  *cache.Cache[policy.Grant]
	decisions *audit.Log
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
	if p.directory, err = kube.NewDirectory(rest, o.keys, p.log); err != nil {
		return parts{}, err
	}
	if p.verifier, err = kube.NewJWKS(kube.JWKSConfig{REST: rest, Audience: o.audience, Issuers: o.issuers, Logger: p.log}); err != nil {
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
