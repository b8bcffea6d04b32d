package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/manifests"
)

// clusterTimeout limits how long inject waits for a cluster.
const clusterTimeout = 20 * time.Second

// newInject returns the command inject.
func newInject(c *cluster) *cobra.Command {
	command := &cobra.Command{
		Use:   "inject [-f FILE]...",
		Short: "add the sidecar to manifests, as the webhook adds it to pods",
		Long: `Adds the sidecar to the pods and pod templates in YAML or JSON, as the webhook adds it to pods at their creation.
Writes all documents to standard output. If it refuses a document, it writes nothing.

It takes its settings from the webhook in your cluster, and changes nothing there. Flags take precedence. With --broker
and --sidecar-image it contacts no cluster, and takes all settings from flags.`,
		Example: `  # See what the webhook would add, and why it would refuse a pod.
  credence inject -f app.yaml --diff

  # Apply manifests with the sidecar in them.
  helm template shop ./chart | credence inject -n shop | kubectl apply -n shop -f -

  # Work without a cluster, for example in a pipeline.
  credence inject --broker=credence-broker.credence.svc:9443 --sidecar-image=registry.example/credence-sidecar:v1 -f app.yaml`,
		Version: program.Version(),
		Args:    noArguments,
	}
	in := injectFlags(c, command)
	command.RunE = func(command *cobra.Command, _ []string) error {
		cfg, err := in.config(command.Context())
		if err != nil {
			return err
		}
		cfg.Stdin, cfg.Stdout, cfg.Stderr = command.InOrStdin(), command.OutOrStdout(), command.ErrOrStderr()
		return manifests.Inject(command.Context(), cfg)
	}
	return command
}

// injection has the flags of inject.
type injection struct {
	cluster *cluster
	command *cobra.Command
	cfg     manifests.Config
	shared  *flag.FlagSet // those of the webhook, which are also in command.Flags()
	finish  func() (injectflags.Options, error)
}

// injectFlags defines the flags of inject.
func injectFlags(c *cluster, command *cobra.Command) *injection {
	in := &injection{cluster: c, command: command, shared: flag.NewFlagSet("", flag.ContinueOnError)}
	f := command.Flags()
	f.VarP((*names)(&in.cfg.Files), "filename", "f", "YAML or JSON `file` to inject, - for standard input; may be repeated; default -")
	f.StringVar(&in.cfg.NamespacesFile, "namespaces", "", "`file` with Namespace objects, for example from kubectl get namespaces -o yaml, to check roles with; those in the input have precedence")
	f.BoolVar(&in.cfg.Diff, "diff", false, "write the changes as a unified diff")
	in.finish = injectflags.Define(in.shared)
	in.shared.VisitAll(func(f *flag.Flag) { f.Usage = strings.Replace(f.Usage, " (required)", "", 1) })
	f.AddGoFlagSet(in.shared)
	return in
}

// set reports whether the command line has the flag.
func (in *injection) set(name string) bool { return in.command.Flags().Changed(name) }

// config returns the configuration from flags and from the cluster.
func (in *injection) config(ctx context.Context) (manifests.Config, error) {
	cfg := in.cfg
	if cfg.Namespace = in.cluster.overrides.Context.Namespace; cfg.Namespace != "" && len(validation.IsDNS1123Label(cfg.Namespace)) > 0 {
		return cfg, wrongFlags(fmt.Errorf("--namespace: %q is not a valid namespace name", cfg.Namespace))
	}
	if len(cfg.Files) == 0 {
		cfg.Files = []string{"-"}
	}
	stdins := 0
	for _, name := range append(cfg.Files, cfg.NamespacesFile) {
		if name == "-" {
			stdins++
		}
	}
	if stdins > 1 {
		return cfg, wrongFlags(errors.New("standard input can be read only once; use - only once for -f and --namespaces (it is the default of -f)"))
	}
	if in.set("broker") && in.set("sidecar-image") {
		o, err := in.finish()
		if err != nil {
			return cfg, wrongFlags(err)
		}
		cfg.Injector, cfg.Rules, cfg.RulesFile, cfg.SettingsFile = o.Injector, o.Rules, o.RulesFile, o.SettingsFile
		return cfg, nil
	}
	return in.fromCluster(ctx, cfg)
}

// names is a flag that may be repeated.
type names []string

// String implements [pflag.Value].
func (n *names) String() string { return strings.Join(*n, ", ") }

// Type implements [pflag.Value].
func (n *names) Type() string { return "file" }

// Set implements [pflag.Value].
func (n *names) Set(name string) error {
	if name == "" {
		return errors.New("the file name is empty")
	}
	*n = append(*n, name)
	return nil
}
