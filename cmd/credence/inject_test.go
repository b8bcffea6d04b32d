package main

import (
	"io"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/credence-iam/credence/operator/manifests"
)

// parse parses the flags of inject. The flag of the namespace is that of all commands.
func parse(args []string) (cfg manifests.Config, err error) {
	root := &cobra.Command{Use: "credence"}
	c := newCluster(root)
	command := &cobra.Command{Use: "inject", Args: noArguments}
	finish := injectFlags(command.Flags())
	command.RunE = func(*cobra.Command, []string) (err error) {
		cfg, err = finish(c.overrides.Context.Namespace)
		return err
	}
	root.AddCommand(command)
	root.SetArgs(append([]string{"inject"}, args...))
	root.SetErr(io.Discard)
	root.SetOut(io.Discard)
	return cfg, root.Execute()
}

func TestFlags(t *testing.T) {
	good := []string{"--broker=broker:9443", "--sidecar-image=registry.example/credence-sidecar:v1"}
	cfg, err := parse(append(slices.Clone(good), "-f", "a", "-f=-", "--namespace=shop", "--namespaces=n", "--rules-file=r", "--diff"))
	if err != nil || !slices.Equal(cfg.Files, []string{"a", "-"}) || cfg.Namespace != "shop" || cfg.NamespacesFile != "n" || cfg.RulesFile != "r" || !cfg.Diff || cfg.Injector == nil || cfg.Rules == nil {
		t.Errorf("%+v, %v", cfg, err)
	}
	if cfg, err := parse(good); err != nil || !slices.Equal(cfg.Files, []string{"-"}) {
		t.Errorf("without files: %+v, %v", cfg, err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{good[:1], "--broker and --sidecar-image are required"},
		{append(slices.Clone(good), "a.yaml"), `unexpected argument "a.yaml"; use flags only`},
		{append(slices.Clone(good), "--namespace=A"), `--namespace: "A" is not a valid namespace name`},
		{append(slices.Clone(good), "-f", ""), `invalid argument "" for "-f, --filename" flag: the file name is empty`},
		{append(slices.Clone(good), "-f=-", "-f=-"), "standard input can be read only once"},
		{append(slices.Clone(good), "--namespaces=-"), "standard input can be read only once"},
		{append(slices.Clone(good), "--sidecar-port=80"), "--sidecar-port: 80 is out of bounds: from 1024 to 65535"},
	} {
		if _, err := parse(tt.args); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%q: error is %v, want %s", tt.args, err, tt.want)
		}
	}
}

// docs/inject.md has every flag, and no other.
func TestSettingsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/inject.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, want []string
	for _, row := range regexp.MustCompile("(?m)^\\| `--?([a-z-]+)` \\|").FindAllSubmatch(page, -1) {
		documented = append(documented, string(row[1]))
	}
	f := pflag.NewFlagSet("credence inject", pflag.ContinueOnError)
	injectFlags(f)
	f.VisitAll(func(f *pflag.Flag) { want = append(want, f.Name) })
	if !slices.Equal(documented, want) {
		t.Errorf("documented are\n%q, there are\n%q", documented, want)
	}
}
