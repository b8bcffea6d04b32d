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

	"github.com/credence-iam/credence/cmd/internal/program"
)

// These are the exit codes. Shells also use 2 for an invalid command line.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run runs the command that args name, and returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot(filepath.Base(args[0]))
	root.SetArgs(args[1:])
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	command, err := root.ExecuteContextC(ctx)
	if err == nil || errors.Is(err, errFound) {
		return map[bool]int{true: 0, false: exitFailed}[err == nil]
	}
	name := command.CommandPath()
	_, _ = fmt.Fprintf(stderr, "%s: %v\n", name, err)
	if wrong, ok := errors.AsType[usageError](err); ok {
		_, _ = fmt.Fprintf(stderr, "%s: --help lists the %s\n", name, wrong.lists)
		return exitUsage
	}
	return exitFailed
}

// errFound ends a command that has printed what it found, and found something wrong.
var errFound = errors.New("found something wrong")

// usageError is an error of the command line.
type usageError struct {
	error
	lists string // what --help lists
}

// wrongFlags returns err as an error of the command line.
func wrongFlags(err error) error { return usageError{err, "flags"} }

// newRoot returns the command with all of its commands. It names itself as its user calls it.
func newRoot(called string) *cobra.Command {
	root := &cobra.Command{
		Use:   "credence",
		Short: "credence helps manifest authors and those who run Credence in a cluster.",
		Long: `credence helps manifest authors and those who run Credence in a cluster.
It uses the rights of your kubeconfig, as kubectl does, and changes nothing unless a command says so.`,
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
	if strings.HasPrefix(called, "kubectl-") {
		root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl credence"}
	}
	// Not SetVersionTemplate and the like: text/template calls methods by name, so the linker would keep all methods of all
	// types of Kubernetes, 18 MB.
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return wrongFlags(err) })
	c := newCluster(root)
	root.AddCommand(newInject(c), newVersion(c))
	return root
}

// noArguments refuses arguments that are no flags.
func noArguments(_ *cobra.Command, args []string) error {
	if err := program.NoArguments(args); err != nil {
		return wrongFlags(err)
	}
	return nil
}
