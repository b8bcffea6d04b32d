// Command credence-broker exchanges the identities of injected pods for AWS credentials.
//
// It serves gRPC over TLS on --listen, and over plain HTTP health, readiness and metrics on
// --admin-listen, and the state of each grant on --debug-listen.
// Its own AWS credentials come from the AWS SDK's default chain. Logs go to standard error and audit
// lines to standard output, both as JSON.
package main

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/cmd/internal/program"
)

func main() {
	program.Program[options]{Name: "credence-broker", Usage: usage, Flags: flags, Run: run}.Main()
}

// run builds the parts and runs them until ctx ends: first the server drains, then what it needs
// stops.
func run(ctx context.Context, o options) error {
	program.LimitMemory()
	proxies, err := program.DirectCalls()
	if err != nil {
		return err
	}
	p, err := build(ctx, o)
	if err != nil {
		return err
	}
	if proxies != (program.Proxies{}) {
		p.log.InfoContext(ctx, "Calling AWS through a proxy", "https_proxy", proxies.HTTPS, "http_proxy", proxies.HTTP)
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
	debugListener, debugPages, err := p.debugPages(ctx, o)
	if err != nil {
		return err
	}
	// Should one part fail, the server drains too.
	group, work := errgroup.WithContext(context.WithoutCancel(ctx))
	work, stopWork := context.WithCancel(work)
	defer stopWork()
	serving, stopServing := context.WithCancel(ctx)
	defer context.AfterFunc(work, stopServing)()
	for _, run := range []func(context.Context) error{p.directory.Run, p.verifier.Run, p.events.Run, p.sessions.Run, p.placement.Run, p.budget.Run, p.decisions.Run} {
		group.Go(func() error { return run(work) })
	}
	if p.endpoints != nil {
		group.Go(func() error { return p.endpoints.Run(work) })
	}
	if p.traces != nil {
		group.Go(func() error { return p.traces.Run(work) })
	}
	if debugPages != nil {
		group.Go(func() error { return admin.Serve(work, debugListener, debugPages) })
	}
	if p.trust != nil {
		// Given up as soon as this broker is told to end, so that another one leads while it drains.
		group.Go(func() error { return p.trust.Run(serving) })
	}
	var prefetched atomic.Pointer[broker.Prefetch]
	checks, proof := p.readiness(serving, &prefetched)
	group.Go(func() error { return proof.run(serving, p.reportIdentity) })
	ready := func() bool { return admin.Ready(checks) == nil }
	if err := p.metrics.Watch(admin.Sources{Ready: ready}); err != nil {
		return err
	}
	group.Go(func() error { return admin.Serve(work, adminListener, admin.Handler(p.metrics.Handler(), checks...)) })
	group.Go(func() error {
		defer stopWork()
		base := o.base
		if base.IsZero() {
			// The admin endpoint is up meanwhile: a broker that waits for STS is alive.
			if base, err = p.sts.AwaitBase(serving, p.log); err != nil {
				return listener.Close()
			}
		} else {
			group.Go(func() error { p.sts.AwaitIdentity(serving, p.log); return nil })
		}
		d, err := p.decide(o, base)
		if err != nil {
			return err
		}
		group.Go(func() error { return d.prefetch.Run(work) })
		if d.rules != nil {
			group.Go(func() error { return d.rules.Run(work) })
		}
		prefetched.Store(d.prefetch)
		if err := p.metrics.Watch(admin.Sources{Connections: d.broker.Connections}); err != nil {
			return err
		}
		p.log.InfoContext(ctx, "Serving", "address", listener.Addr().String(), "admin", adminListener.Addr().String(),
			"base_arn", base.String(), "region", p.sts.Region(), "version", program.Version())
		return d.broker.Serve(serving, broker.ServerConfig{
			Listener: listener, TLS: certs.ServerConfig(p.pair), Logger: p.log,
			Ready: ready, Interceptors: p.interceptors(),
		})
	})
	return group.Wait()
}
