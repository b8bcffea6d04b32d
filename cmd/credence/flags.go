package main

import (
	"errors"
	"flag"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/credence-iam/credence/cmd/internal/injectflags"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator"
)

const usage = `credence helps manifest authors and cluster admins.

Usage: credence COMMAND [flags]

"credence COMMAND --help" lists the flags of a command.`

const injectUsage = `credence inject changes the pods and pod templates in YAML or JSON as the webhook changes pods at their creation.
It writes all documents to standard output. If it refuses a document, it writes nothing.

Usage: credence inject --broker=ADDRESS --sidecar-image=IMAGE [-f FILE]... [flags]`

// injectFlags defines the flags of inject, and returns the function that parses their values.
func injectFlags(f *flag.FlagSet) func(args []string) (operator.InjectConfig, error) {
	var (
		cfg   operator.InjectConfig
		files names
	)
	f.Var(&files, "f", "YAML or JSON `file` to inject, - for standard input; may be repeated; default -")
	f.StringVar(&cfg.Namespace, "namespace", "", "`name` of the namespace of objects without one; empty: not known")
	f.StringVar(&cfg.NamespacesFile, "namespaces", "", "`file` with Namespace objects, for example from kubectl get namespaces -o yaml, to check roles with; those in the input have precedence")
	f.BoolVar(&cfg.Diff, "diff", false, "write the changes as a unified diff")
	injection := injectflags.Define(f)
	return func(args []string) (operator.InjectConfig, error) {
		if err := program.NoArguments(args); err != nil {
			return operator.InjectConfig{}, err
		}
		if cfg.Namespace != "" && len(validation.IsDNS1123Label(cfg.Namespace)) > 0 {
			return operator.InjectConfig{}, fmt.Errorf("--namespace: %q is not a valid namespace name", cfg.Namespace)
		}
		cfg.Files = files
		if len(files) == 0 {
			cfg.Files = []string{"-"}
		}
		stdins := 0
		for _, name := range append(cfg.Files, cfg.NamespacesFile) {
			if name == "-" {
				stdins++
			}
		}
		if stdins > 1 {
			return operator.InjectConfig{}, errors.New("standard input can be read only once; use - only once for -f and --namespaces (it is the default of -f)")
		}
		o, err := injection()
		cfg.Injector, cfg.Rules, cfg.RulesFile, cfg.SettingsFile = o.Injector, o.Rules, o.RulesFile, o.SettingsFile
		return cfg, err
	}
}

// names is a flag that may be repeated.
type names []string

// String implements [flag.Value].
func (n *names) String() string { return strings.Join(*n, ", ") }

// Set implements [flag.Value].
func (n *names) Set(name string) error {
	if name == "" {
		return errors.New("the file name is empty")
	}
	*n = append(*n, name)
	return nil
}
