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

const usage = `credence helps those who write manifests and those who run a cluster.

Usage: credence COMMAND [flags]

"credence COMMAND --help" lists the flags of a command.`

const injectUsage = `credence inject does to the pods and pod templates in YAML or JSON what the webhook does to pods
when they are created, and writes all documents to standard output. Nothing is written when one is refused.

Usage: credence inject --broker=ADDRESS --sidecar-image=IMAGE [-f FILE]... [flags]`

// injectFlags defines the flags of inject; what it returns parses their values.
func injectFlags(f *flag.FlagSet) func(args []string) (operator.InjectConfig, error) {
	var (
		cfg   operator.InjectConfig
		files names
	)
	f.Var(&files, "f", "YAML or JSON `file` to inject, - for standard input; may be repeated; default -")
	f.StringVar(&cfg.Namespace, "namespace", "", "`name` of the namespace of objects that do not say theirs; empty: it is not known")
	f.StringVar(&cfg.NamespacesFile, "namespaces", "", "`file` with Namespace objects, such as of kubectl get namespaces -o yaml, by which roles are judged; those in the input count more")
	f.BoolVar(&cfg.Diff, "diff", false, "write what would change as a unified diff, and nothing if nothing would")
	injection := injectflags.Define(f)
	return func(args []string) (operator.InjectConfig, error) {
		if err := program.NoArguments(args); err != nil {
			return operator.InjectConfig{}, err
		}
		if cfg.Namespace != "" && len(validation.IsDNS1123Label(cfg.Namespace)) > 0 {
			return operator.InjectConfig{}, fmt.Errorf("--namespace: %q is no name of a namespace", cfg.Namespace)
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
			return operator.InjectConfig{}, errors.New("standard input can be read once: give - once to -f and --namespaces (it is the default of -f)")
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
		return errors.New("the name of a file is empty")
	}
	*n = append(*n, name)
	return nil
}
