// Command credence-webhook is the admission webhook that injects pods.
//
// It serves admission reviews, health and readiness over HTTPS on --listen. It watches namespaces, to refuse pods that the
// broker would refuse. It logs JSON to standard error. It exits with 1 after a failure, and with 2 if a flag is invalid.
//
// With the argument check it waits until the API server calls a running webhook, and exits.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/configfile"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/rulesfile"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/webhook"
	"github.com/credence-iam/credence/webhook/metrics"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

func main() {
	if isCheck(os.Args) {
		one := program.Program[checkOptions]{Name: "credence-webhook check", Usage: checkUsage, Flags: checkFlags, Run: check}
		program.Commands{Name: "credence-webhook", Commands: []program.Command{one.Command("wait until pods can be injected")}}.Main()
	}
	program.Program[options]{Name: "credence-webhook", Usage: usage, Flags: flags, Run: run}.Main()
}

// run makes the parts and runs them until ctx ends. It drains the server before it stops the watch, which the server needs.
func run(ctx context.Context, o options) error {
	program.LimitMemory()
	log := program.NewLogger(os.Stderr, o.level)
	klog.SetSlogLogger(log) // the log of client-go
	if err := useDNS(ctx, o, log); err != nil {
		return err
	}
	pair, err := certs.NewKeyPair(o.tlsCert, o.tlsKey, log)
	if err != nil {
		return fmt.Errorf("--tls-cert, --tls-key: %w", err)
	}
	var (
		runs            []func(context.Context) error
		rules, settings *configfile.Follower // nil without the file
	)
	if o.RulesFile != "" {
		rules, err = rulesfile.New(rulesfile.Config{Path: o.RulesFile, Rules: o.Rules, Logger: log})
		if err != nil {
			return fmt.Errorf("--rules-file: %w", err)
		}
		runs = append(runs, rules.Run)
	}
	if o.SettingsFile != "" {
		settings, err = settingsfile.New(settingsfile.Config{Path: o.SettingsFile, Injector: o.Injector, Logger: log})
		if err != nil {
			return fmt.Errorf("--sidecar-settings-file: %w", err)
		}
		runs = append(runs, settings.Run)
	}
	rest, err := apiServer(o.kubeconfig)
	if err != nil {
		return err
	}
	namespaces, err := kube.NewNamespaces(rest, o.Rules.Keys(), log)
	if err != nil {
		return err
	}
	var server *webhook.Server // set before the first scrape
	metrics, err := metrics.New(program.Version(), metrics.Sources{
		Ready:       func() bool { return server.Ready() },
		Connections: func() connlimit.Stats { return server.Connections() },
		Certificate: pair.NotAfter, InformerAge: namespaces.Age, LiveReads: namespaces.Reads,
		RulesFile: following(rules), SettingsFile: following(settings),
	})
	if err != nil {
		return err
	}
	server, err = webhook.New(webhook.Config{
		Injector:   o.Injector,
		Rules:      o.Rules,
		Namespaces: namespaces,
		KeyPair:    pair,
		Ready: map[string]func() error{"namespaces": func() error {
			if !namespaces.Synced() {
				return errors.New("not all are listed yet")
			}
			return nil
		}},
		Logger:  log,
		Observe: metrics.Observe,
	})
	if err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	if o.adminListen != "" {
		adminListener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.adminListen)
		if err != nil {
			return fmt.Errorf("--admin-listen: %w", err)
		}
		runs = append(runs, func(ctx context.Context) error {
			return admin.Serve(ctx, adminListener, admin.Handler(admin.MetricsHandler(metrics.Registry(), log)))
		})
	}
	log.InfoContext(ctx, "Serving", "address", listener.Addr().String(), "version", program.Version())

	group, work := errgroup.WithContext(context.WithoutCancel(ctx))
	work, stopWork := context.WithCancel(work)
	ctx, stopServing := context.WithCancel(ctx)
	defer context.AfterFunc(work, stopServing)()
	for _, run := range append(runs, namespaces.Run) {
		group.Go(func() error { return run(work) })
	}
	group.Go(func() error {
		defer stopWork()
		return server.Run(ctx, listener)
	})
	return group.Wait()
}
