package main

import (
	"context"
	"fmt"
	"net"
	"net/http"

	"golang.org/x/sync/errgroup"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// run runs the parts until ctx ends. On shutdown the gRPC server drains first, and then the parts that it needs stop. If one
// part fails, the server drains too.
func (p parts) run(ctx context.Context, o options, l listeners) error {
	var pages http.Handler
	if l.debug != nil {
		var err error
		if pages, err = p.debugPages(ctx, l.debug.Addr()); err != nil {
			return err
		}
	}
	group, work := errgroup.WithContext(context.WithoutCancel(ctx))
	work, stopWork := context.WithCancel(work)
	defer stopWork()
	serving, stopServing := context.WithCancel(ctx)
	defer context.AfterFunc(work, stopServing)()

	for _, run := range p.background() {
		group.Go(func() error { return run(work) })
	}
	if l.debug != nil {
		group.Go(func() error { return admin.Serve(work, l.debug, pages) })
	}
	if p.trust != nil {
		// It stops when the shutdown begins, so that another broker leads while this one drains.
		group.Go(func() error { return p.trust.Run(serving) })
	}
	deciding := make(chan struct{})
	checks, identity := p.readiness(serving.Done(), deciding)
	group.Go(func() error { return p.watchAWS(serving, identity) })
	ready := func() bool { return admin.Ready(checks) == nil }
	if err := p.metrics.Watch(admin.Sources{Ready: ready}); err != nil {
		return err
	}
	group.Go(func() error { return admin.Serve(work, l.admin, admin.Handler(p.metrics.Handler(), checks...)) })
	group.Go(func() error {
		defer stopWork()
		base := o.base
		if base.IsZero() {
			// The admin endpoint serves meanwhile: a broker that waits for STS is alive.
			var err error
			if base, err = p.sts.AwaitBase(serving, p.log); err != nil {
				return l.calls.Close()
			}
		} else {
			group.Go(func() error { p.sts.AwaitIdentity(serving, p.log); return nil })
		}
		d, err := p.decide(o, base)
		if err != nil {
			return err
		}
		group.Go(func() error { return p.prefetch.Run(work, d.rules) })
		if d.file != nil {
			group.Go(func() error { return d.file.Run(work) })
		}
		close(deciding)
		p.log.InfoContext(ctx, "Serving", "address", l.calls.Addr().String(), "admin", l.admin.Addr().String(),
			"base_arn", base.String(), "region", p.sts.Region(), "version", program.Version())
		return p.serve(serving, d.broker, l.calls, ready)
	})
	return group.Wait()
}

// background returns the Run methods of the parts that need nothing from AWS to start.
func (p parts) background() []func(context.Context) error {
	runs := []func(context.Context) error{p.directory.Run, p.verifier.Run, p.events.Run, p.sessions.Run, p.placement.Run, p.budget.Run, p.decisions.Run}
	if p.endpoints != nil {
		runs = append(runs, p.endpoints.Run)
	}
	if p.traces != nil {
		runs = append(runs, p.traces.Run)
	}
	return runs
}

// serve serves calls on the listener until ctx ends.
func (p parts) serve(ctx context.Context, b *broker.Broker, listener net.Listener, ready func() bool) error {
	if err := p.metrics.Watch(admin.Sources{Connections: b.Connections}); err != nil {
		return err
	}
	return b.Serve(ctx, broker.ServerConfig{
		Listener: listener, TLS: certs.ServerConfig(p.pair), Logger: p.log, Ready: ready, Interceptors: p.interceptors(),
	})
}

// deciders are the parts that need the base ARN, because they decide which role a pod's role name stands for.
type deciders struct {
	rules  *policy.Rules
	file   *rulesfile.Follower // nil: there is no rules file
	broker *broker.Broker
}

// decide makes the deciders.
func (p parts) decide(o options, base credential.RoleBase) (d deciders, err error) {
	d.rules, err = policy.New(policy.Config{Keys: o.keys, Base: base, Cluster: o.cluster, RoleChaining: o.assumeRole != (credential.RoleARN{})})
	if err != nil {
		return deciders{}, fmt.Errorf("--cluster-name: %w", err)
	}
	if o.rulesFile != "" {
		d.file, err = rulesfile.New(rulesfile.Config{
			Path: o.rulesFile, Rules: d.rules, Logger: p.log, OnChange: func() { p.prefetch.Changed(p.directory.Pods()...) },
		})
		if err != nil {
			return deciders{}, fmt.Errorf("--rules-file: %w", err)
		}
		if err := p.metrics.Watch(admin.Sources{RulesFile: func() (admin.RulesFile, bool) {
			status := d.file.Status()
			return admin.RulesFile{Loaded: status.Loaded, OK: status.Err == nil}, true
		}}); err != nil {
			return deciders{}, err
		}
	}
	d.broker, err = broker.New(broker.Config{
		Verifier: p.verifier, Binder: p.directory, Rules: d.rules, Sessions: p.sessions, Audit: p.decisions,
		Region: p.sts.Region(), Logger: p.log, Observers: append(p.observers(), broker.ReportTo(p.events, p.directory.Expects, p.impaired)),
	})
	return d, err
}
