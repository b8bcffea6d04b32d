// Command credence-broker exchanges the identities of injected pods for AWS credentials.
//
// It serves gRPC over TLS on --listen, and health and readiness over plain HTTP on --admin-listen.
// Its own AWS credentials come from the AWS SDK's default chain. Logs go to standard error and audit
// lines to standard output, both as JSON.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/cmd/internal/program"
)

func main() {
	program.Program[options]{Name: "credence-broker", Usage: usage, Flags: flags, Run: run}.Main()
}

// run builds the parts and runs them until ctx ends: first the server drains, then what it needs
// stops.
func run(ctx context.Context, o options) error {
	log := slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: o.level}))
	pair, err := certs.NewKeyPair(o.tlsCert, o.tlsKey, log)
	if err != nil {
		return err
	}
	rest, err := clientcmd.BuildConfigFromFlags("", o.kubeconfig)
	if err != nil {
		return fmt.Errorf("reaching the API server (set --kubeconfig outside a cluster): %w", err)
	}
	directory, err := kube.NewDirectory(rest, o.keys, log)
	if err != nil {
		return err
	}
	verifier, err := kube.NewJWKS(kube.JWKSConfig{REST: rest, Audience: o.audience, Issuers: o.issuers, Logger: log})
	if err != nil {
		return err
	}
	sts, err := assume.New(ctx, assume.Config{Region: o.region, Endpoint: o.stsEndpoint, FirstHop: o.firstHop})
	if err != nil {
		return err
	}
	base := o.base
	if base.IsZero() {
		if base, err = sts.AwaitBase(ctx, log); err != nil {
			return err
		}
	}
	rules, err := policy.New(policy.Config{Keys: o.keys, Base: base, Cluster: o.cluster})
	if err != nil {
		return fmt.Errorf("--cluster-name: %w", err)
	}
	sessions, err := cache.New(cache.Config[policy.Grant]{Source: sts, Logger: log})
	if err != nil {
		return err
	}
	decisions, err := audit.New(audit.Config{Writer: os.Stdout, Required: o.auditRequired, Logger: log})
	if err != nil {
		return err
	}
	prefetch, err := broker.NewPrefetch(broker.PrefetchConfig{Lookup: directory.Pod, Rules: rules, Sessions: sessions, Logger: log})
	if err != nil {
		return err
	}
	if err := directory.OnChange(prefetch.Changed); err != nil {
		return err
	}
	b, err := broker.New(broker.Config{
		Verifier: verifier, Binder: directory, Rules: rules, Sessions: sessions, Audit: decisions,
		Region: sts.Region(), Logger: log,
	})
	if err != nil {
		return err
	}
	listen := &net.ListenConfig{}
	listener, err := listen.Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	adminListener, err := listen.Listen(ctx, "tcp", o.adminListen)
	if err != nil {
		return fmt.Errorf("--admin-listen: %w", err)
	}
	log.InfoContext(ctx, "Serving", "address", listener.Addr().String(), "admin", adminListener.Addr().String(),
		"base_arn", base.String(), "region", sts.Region(), "version", program.Version())

	checks := []admin.Check{
		{Name: "informers", Err: func() error {
			return unless(directory.Synced(), "not all pods, namespaces and service accounts are listed yet")
		}},
		{Name: "signing keys", Err: func() error { return unless(verifier.Ready(), "not fetched yet") }},
		{Name: "sessions", Err: warm(sessions.Warm)},
	}
	// What the server needs outlives it: first it drains, then they stop. Should one of them fail, it
	// drains too.
	group, work := errgroup.WithContext(context.WithoutCancel(ctx))
	work, stopWork := context.WithCancel(work)
	serving, stopServing := context.WithCancel(ctx)
	defer context.AfterFunc(work, stopServing)()
	for _, part := range []func(context.Context) error{directory.Run, verifier.Run, sessions.Run, prefetch.Run, decisions.Run} {
		group.Go(func() error { return part(work) })
	}
	group.Go(func() error { return admin.Serve(work, adminListener, admin.Handler(checks...)) })
	group.Go(func() error {
		defer stopWork()
		return broker.Serve(serving, listener, b, certs.ServerConfig(pair), func() bool { return admin.Ready(checks) == nil }, log)
	})
	return group.Wait()
}
