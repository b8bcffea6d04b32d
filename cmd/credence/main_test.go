package main

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"credence": main, plugin: main, completer: main})
}

// TestScripts runs the program as a program.
func TestScripts(t *testing.T) {
	if scripts, err := filepath.Glob("testdata/*.txt"); err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts in testdata: %v", err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("SETTINGS", "--broker=credence-broker.credence.svc:9443")
			env.Setenv("IMAGE", "--sidecar-image=registry.example/credence-sidecar:v1")
			return nil
		},
	})
}

// TestExitCodes: a command that found something has said so itself. Other errors are one line, with the command's name.
func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		args, stderr string
		code         int
	}{
		{"credence --help", "", 0},
		{"credence help inject", "", 0},
		{"credence", "credence: a command is missing\ncredence: --help lists the commands\n", exitUsage},
		{"credence injcet", "credence: unknown command \"injcet\"\ncredence: --help lists the commands\n", exitUsage},
		{"kubectl-credence injcet", "kubectl credence: unknown command \"injcet\"\nkubectl credence: --help lists the commands\n", exitUsage},
		{"kubectl-credence.exe injcet", "kubectl credence: unknown command \"injcet\"\nkubectl credence: --help lists the commands\n", exitUsage},
		{"/bin/credence version --output=xml", "credence version: invalid argument \"xml\" for \"-o, --output\" flag: must be json\ncredence version: --help lists the flags\n", exitUsage},
		{"credence version extra", "credence version: unexpected argument \"extra\"; use flags only\ncredence version: --help lists the flags\n", exitUsage},
		{"credence version --kubeconfig=/dev/null/none", "credence version: error loading config file \"/dev/null/none\": open /dev/null/none: not a directory\n", exitFailed},
		{"credence version --client", "", 0},
	} {
		if code, _, stderr := call(t, "", strings.Fields(tt.args)...); code != tt.code || stderr != tt.stderr {
			t.Errorf("%s: exit code %d and %q, want %d and %q", tt.args, code, stderr, tt.code, tt.stderr)
		}
	}
	if code := execute(t.Context(), failing(errFound), io.Discard); code != exitFailed {
		t.Errorf("after a finding, the exit code is %d, want %d", code, exitFailed)
	}
}

// failing returns a command that fails.
func failing(err error) *cobra.Command {
	command := &cobra.Command{Use: "credence", SilenceErrors: true, SilenceUsage: true, RunE: func(*cobra.Command, []string) error { return err }}
	command.SetArgs([]string{})
	return command
}

// TestHelp: each command has a summary, a description and, unless it needs none, an example. Each flag has a description.
func TestHelp(t *testing.T) {
	root := newRoot("credence")
	if len(root.Commands()) < 4 {
		t.Fatalf("there are only %d commands", len(root.Commands()))
	}
	each(root, func(command *cobra.Command) {
		if command.Name() == "help" || command == root {
			return
		}
		if command.Short == "" || command.Long == "" || command.Example == "" {
			t.Errorf("%s lacks Short, Long or Example", command.CommandPath())
		}
		command.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s --%s has no description", command.Name(), f.Name)
			}
		})
		for line := range strings.SplitSeq(command.Long, "\n") {
			if len(line) > 120 {
				t.Errorf("%s: its description has a line of %d characters: %s", command.Name(), len(line), line)
			}
		}
	})
}

// TestCommandsAreDocumented: docs/cli.md lists each command, and no other.
func TestCommandsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, want []string
	for _, row := range regexp.MustCompile("(?m)^\\| \\[?`credence ([a-z]+)`").FindAllSubmatch(page, -1) {
		documented = append(documented, string(row[1]))
	}
	for _, command := range newRoot("credence").Commands() {
		if command.Name() != "help" {
			want = append(want, command.Name())
		}
	}
	if slices.Sort(documented); !slices.Equal(documented, want) {
		t.Errorf("the first table of docs/cli.md has %q, the commands are %q", documented, want)
	}
}

// TestNoTemplates: a template of cobra makes the program 18 MB larger, see newRoot.
func TestNoTemplates(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"Version", "Usage", "Help"} {
			if strings.Contains(string(text), ".Set"+name+"Template(") {
				t.Errorf("%s calls Set%sTemplate", file, name)
			}
		}
	}
}

// TestFlagsOfKubectl: the flags that choose a cluster work as kubectl's. --help shows only the frequent ones.
func TestFlagsOfKubectl(t *testing.T) {
	var shown, hidden []string
	newRoot("credence").PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			hidden = append(hidden, f.Name)
		} else {
			shown = append(shown, f.Name)
		}
	})
	if want := []string{"context", "credence-namespace", "kubeconfig", "namespace"}; !slices.Equal(shown, want) {
		t.Errorf("--help shows %q, want %q", shown, want)
	}
	for _, name := range []string{"as", "as-group", "cluster", "request-timeout", "server", "token", "user"} {
		if !slices.Contains(hidden, name) {
			t.Errorf("there is no flag --%s", name)
		}
	}
}
