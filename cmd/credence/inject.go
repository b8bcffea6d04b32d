package main

import (
	"errors"
	"flag"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/manifests"
)

// newInject returns the command inject.
func newInject(c *cluster) *cobra.Command {
	command := &cobra.Command{
		Use:   "inject --broker=ADDRESS --sidecar-image=IMAGE [-f FILE]...",
		Short: "change manifests as the webhook changes pods",
		Long: `Changes the pods and pod templates in YAML or JSON as the webhook changes pods at their creation.
Writes all documents to standard output. If it refuses a document, it writes nothing.`,
		Version: program.Version(),
		Args:    noArguments,
	}
	finish := injectFlags(command.Flags())
	command.RunE = func(command *cobra.Command, _ []string) error {
		cfg, err := finish(c.overrides.Context.Namespace)
		if err != nil {
			return wrongFlags(err)
		}
		cfg.Stdin, cfg.Stdout, cfg.Stderr = command.InOrStdin(), command.OutOrStdout(), command.ErrOrStderr()
		return manifests.Inject(command.Context(), cfg)
	}
	return command
}

// injectFlags defines the flags of inject, and returns the function that parses their values.
func injectFlags(f *pflag.FlagSet) func(namespace string) (manifests.Config, error) {
	var cfg manifests.Config
	f.VarP((*names)(&cfg.Files), "filename", "f", "YAML or JSON `file` to inject, - for standard input; may be repeated; default -")
	f.StringVar(&cfg.NamespacesFile, "namespaces", "", "`file` with Namespace objects, for example from kubectl get namespaces -o yaml, to check roles with; those in the input have precedence")
	f.BoolVar(&cfg.Diff, "diff", false, "write the changes as a unified diff")
	shared := flag.NewFlagSet("", flag.ContinueOnError)
	injection := injectflags.Define(shared)
	f.AddGoFlagSet(shared)
	return func(namespace string) (manifests.Config, error) {
		if cfg.Namespace = namespace; namespace != "" && len(validation.IsDNS1123Label(namespace)) > 0 {
			return manifests.Config{}, fmt.Errorf("--namespace: %q is not a valid namespace name", namespace)
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
			return manifests.Config{}, errors.New("standard input can be read only once; use - only once for -f and --namespaces (it is the default of -f)")
		}
		o, err := injection()
		cfg.Injector, cfg.Rules, cfg.RulesFile, cfg.SettingsFile = o.Injector, o.Rules, o.RulesFile, o.SettingsFile
		return cfg, err
	}
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
