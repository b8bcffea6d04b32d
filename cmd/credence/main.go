// Command credence helps manifest authors and those who run Credence in a cluster. Installed as kubectl-credence, it is a
// plugin of kubectl.
//
// It writes its result to standard output and messages to standard error. It exits with status 1 if it refuses or finds
// something, or fails, and with 2 if its command line is wrong.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/cmd/internal/program"
	"github.com/credence-iam/credence/operator/finding"
)

// These are the exit codes. Shells also use 2 for an invalid command line.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal ends the program at once, whatever it waits for.
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run runs the command that args name, and returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	called, args := strings.TrimSuffix(filepath.Base(args[0]), ".exe"), args[1:]
	if called == completer {
		args = append([]string{cobra.ShellCompRequestCmd}, args...)
	}
	root := newRoot(called)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return execute(ctx, root, stderr)
}

// execute executes the command and returns the exit code. It prints errors.
func execute(ctx context.Context, root *cobra.Command, stderr io.Writer) int {
	command, err := root.ExecuteContextC(ctx)
	if err == nil || errors.Is(err, errFound) {
		return map[bool]int{true: 0, false: exitFailed}[err == nil]
	}
	name := command.CommandPath()
	_, _ = fmt.Fprintf(stderr, "%s: %s\n", name, readable(err))
	if wrong, ok := errors.AsType[usageError](err); ok {
		_, _ = fmt.Fprintf(stderr, "%s: --help lists the %s\n", name, wrong.lists)
		return exitUsage
	}
	return exitFailed
}

// readable returns the text of an error for a terminal. It can quote what pods, files and the API server say.
func readable(err error) string {
	lines := strings.Split(clip.Bytes(err.Error(), maxMessage), "\n")
	for n, line := range lines {
		lines[n] = finding.Printable(strings.ReplaceAll(line, "\t", " "))
	}
	return strings.Join(lines, "\n")
}

// maxMessage limits an error, in bytes. That of inject has a line for each document.
const maxMessage = 64 << 10

// errFound ends a command that has printed what it found, and found something wrong.
var errFound = errors.New("found something wrong")

// usageError is an error of the command line.
type usageError struct {
	error
	lists string // what --help lists
}

// wrongFlags returns err as an error of the command line.
func wrongFlags(err error) error { return usageError{err, "flags"} }

// These are the names under which kubectl calls a plugin, and asks it for completions.
const (
	plugin    = "kubectl-credence"
	completer = "kubectl_complete-credence"
)

// newRoot returns the command with all of its commands. It names itself as its user calls it.
func newRoot(called string) *cobra.Command {
	root := &cobra.Command{
		Use:   "credence",
		Short: "credence helps you give pods AWS credentials with Credence.",
		Long: `credence helps you give pods AWS credentials with Credence. It says why a pod has no credentials and what is wrong with
an installation, shows and steers the AWS sessions of the brokers, and adds the sidecar to manifests.

It uses the cluster and the rights of your kubeconfig, as kubectl does, and changes nothing unless a command says so.
Exit codes: 0 success, 1 a problem was found or the command failed, 2 the command line is wrong.`,
		Version:       program.Version(),
		SilenceErrors: true, // run prints them, on one line
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("a command is missing"), "commands"}
			}
			return usageError{fmt.Errorf("unknown command %q", args[0]), "commands"}
		},
		RunE: func(*cobra.Command, []string) error { return nil }, // Args refuses before
	}
	name := root.Use
	if called == plugin {
		name = "kubectl credence"
		root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: name}
	}
	// Not SetVersionTemplate and the like: text/template calls methods by name, so the linker would keep all methods of all
	// types of Kubernetes, 18 MB.
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return wrongFlags(err) })
	c := newCluster(root)
	root.AddCommand(newCheck(c), newDashboard(c), newExplain(c), newInject(c), newSessions(c), newVersion(c), newCompletion())
	each(root, func(command *cobra.Command) {
		command.Example = strings.ReplaceAll(command.Example, "credence ", name+" ")
	})
	root.InitDefaultHelpCmd()
	if help, _, err := root.Find([]string{"help"}); err == nil {
		help.Short = "show the help of a command"
	}
	complete(root, c)
	return root
}

// each calls f for the command and all commands below it.
func each(command *cobra.Command, f func(*cobra.Command)) {
	f(command)
	for _, below := range command.Commands() {
		each(below, f)
	}
}

// noArguments refuses arguments that are no flags.
func noArguments(_ *cobra.Command, args []string) error {
	if err := program.NoArguments(args); err != nil {
		return wrongFlags(err)
	}
	return nil
}
