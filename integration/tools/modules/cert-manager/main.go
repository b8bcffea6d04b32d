// Command cert-manager runs cert-manager from its library, for tests and the demonstration. The module of cert-manager
// does not contain its programs, and its images need a registry.
//
// MODE lists the parts to run, with commas: controller, cainjector, webhook, and startupapicheck, which exits
// when the others are ready. The command accepts the official chart's flags and ignores those that it does not
// need. It lacks leader election, so each part needs exactly one replica; ACME, Venafi and Vault; and
// certificates for the CertificateSigningRequest API.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"

	certmanagerwebhook "github.com/cert-manager/cert-manager/internal/webhook"
	cmapi "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	"github.com/cert-manager/cert-manager/pkg/controller"
	"github.com/cert-manager/cert-manager/pkg/controller/cainjector"
	"github.com/cert-manager/cert-manager/pkg/healthz"
	"github.com/cert-manager/cert-manager/pkg/logs"
	"github.com/cert-manager/cert-manager/pkg/util"
	"github.com/cert-manager/cert-manager/pkg/util/cmapichecker"
	"github.com/cert-manager/cert-manager/pkg/webhook/options"

	// Each import registers a controller or a kind of issuer.
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/approver"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/ca"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/selfsigned"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/issuing"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/keymanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/readiness"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/requestmanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/revisionmanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/trigger"
	_ "github.com/cert-manager/cert-manager/pkg/controller/clusterissuers"
	_ "github.com/cert-manager/cert-manager/pkg/controller/issuers"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/ca"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/selfsigned"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	logs.InitLogs()
	defer logs.FlushLogs()
	if err := run(ctx, strings.Split(os.Getenv("MODE"), ","), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cert-manager:", err)
		logs.FlushLogs()
		os.Exit(1)
	}
}

// settings are the values of the flags.
type settings struct {
	kubeconfig string // empty: that of a pod
	namespace  string // of Secrets that ClusterIssuers use
	livez      string // an address; empty: none
	wait       time.Duration
	rest       *rest.Config
}

func run(ctx context.Context, modes, args []string) error {
	webhook, err := options.NewWebhookConfiguration()
	if err != nil {
		return err
	}
	var s settings
	flags := pflag.NewFlagSet("cert-manager", pflag.ContinueOnError)
	flags.ParseErrorsAllowlist.UnknownFlags = true
	options.AddConfigFlags(flags, webhook)
	flags.StringVar(&s.namespace, "cluster-resource-namespace", "cert-manager", "namespace of Secrets that ClusterIssuers use")
	flags.StringVar(&s.livez, "livez", "", "address of the controller's health check")
	flags.DurationVar(&s.wait, "wait", time.Minute, "how long startupapicheck retries")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := logs.ValidateAndApply(&webhook.Logging); err != nil {
		return err
	}
	ctx = logs.NewContext(ctx, logs.Log)
	ctrl.SetLogger(logs.Log)
	s.kubeconfig = webhook.KubeConfig
	if s.rest, err = clientcmd.BuildConfigFromFlags("", s.kubeconfig); err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, mode := range modes {
		switch mode {
		case "controller":
			group.Go(func() error { return s.controllers(ctx) })
		case "cainjector":
			group.Go(func() error { return s.cainjector(ctx) })
		case "webhook":
			group.Go(func() error {
				server, err := certmanagerwebhook.NewCertManagerWebhookServer(logs.Log, *webhook)
				if err != nil {
					return err
				}
				return server.Run(ctx)
			})
		case "startupapicheck":
			group.Go(func() error { return s.startupAPICheck(ctx) })
		default:
			return fmt.Errorf("unknown part %q in MODE; want controller, cainjector, webhook or startupapicheck", mode)
		}
	}
	return group.Wait()
}

// workers is the number of objects that each controller reconciles at a time, as in the real program.
const workers = 5

// controllers issues and renews certificates.
func (s *settings) controllers(ctx context.Context) error {
	var o controller.ContextOptions
	o.Kubeconfig = s.kubeconfig
	o.KubernetesAPIQPS, o.KubernetesAPIBurst = 20, 50
	o.ClusterResourceNamespace = s.namespace
	o.CertificateRequestMinimumBackoffDuration = time.Hour
	o.CertificateRequestMaximumBackoffDuration = 32 * time.Hour
	factory, err := controller.NewContextFactory(ctx, o)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	for name, construct := range controller.Known() {
		c, err := construct(factory)
		if err != nil {
			return fmt.Errorf("making controller %s: %w", name, err)
		}
		group.Go(func() error { return c.Run(workers, ctx) })
	}
	all, err := factory.Build()
	if err != nil {
		return err
	}
	all.SharedInformerFactory.Start(ctx.Done())
	all.KubeSharedInformerFactory.Start(ctx.Done())
	if s.livez != "" {
		listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", s.livez)
		if err != nil {
			return err
		}
		group.Go(func() error { return healthz.NewServer(time.Minute).Start(ctx, listener) })
	}
	return group.Wait()
}

// cainjector writes CA certificates into webhook configurations and other annotated objects.
func (s *settings) cainjector(ctx context.Context) error {
	types := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		scheme.AddToScheme, cmapi.AddToScheme, apiextensionsv1.AddToScheme, apiregistrationv1.AddToScheme,
	} {
		if err := add(types); err != nil {
			return err
		}
	}
	// The user agent becomes the owner of the fields that it writes.
	manager, err := ctrl.NewManager(util.RestConfigWithUserAgent(s.rest, "cainjector"), ctrl.Options{
		Scheme:  types,
		Metrics: server.Options{BindAddress: "0"},
		Cache:   cache.Options{ReaderFailOnMissingInformer: true},
		// Secrets are cached as metadata only, and read when needed.
		Client: client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}}}},
	})
	if err != nil {
		return err
	}
	if err := cainjector.RegisterAllInjectors(ctx, manager, cainjector.SetupOptions{
		EnableCertificatesDataSource: true,
		EnabledReconcilersFor: map[string]bool{
			cainjector.MutatingWebhookConfigurationName:   true,
			cainjector.ValidatingWebhookConfigurationName: true,
			cainjector.APIServiceName:                     true,
			cainjector.CustomResourceDefinitionName:       true,
		},
	}); err != nil {
		return err
	}
	return manager.Start(ctx)
}

// startupAPICheck returns when a request for a certificate passes the webhook. This takes some moments after the
// webhook's pod is ready: cainjector has to write its CA certificate first.
func (s *settings) startupAPICheck(ctx context.Context) error {
	checker, err := cmapichecker.New(s.rest, os.Getenv("POD_NAMESPACE"))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.wait)
	defer cancel()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		err := checker.Check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-ticker.C:
		}
	}
}
