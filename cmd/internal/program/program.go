// Package program is what the programs of Credence share: signals, exit codes, error output, --help, --version, the log
// format, the memory limit and proxies. It does not know what a program does.
package program

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// These are the exit codes. Shells and package flag also use 2 for an invalid command line.
const (
	exitFailed = 1
	exitUsage  = 2
)

// Program is one program, with options of type O.
type Program[O any] struct {
	// Name begins the program's messages.
	Name string
	// Usage says in a few lines what the program does and how to call it. The list of flags follows it.
	Usage string
	// Flags defines the flags. finish is called after they are parsed. It returns the options, or the error of an invalid
	// command line.
	Flags func(f *flag.FlagSet) (finish func(args []string) (O, error))
	// Run runs the program until it is done, or until ctx ends after SIGINT or SIGTERM.
	Run func(ctx context.Context, options O) error
}

// Main runs the program with the process's arguments and exits. The exit code is 0 after success, 1 after a failure,
// and 2 if the command line is invalid. It prints an error as one line on standard error.
func (p Program[O]) Main() {
	os.Exit(p.main(os.Args[1:], os.Stdout, os.Stderr))
}

func (p Program[O]) main(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	f := flag.NewFlagSet(p.Name, flag.ContinueOnError)
	f.SetOutput(io.Discard) // main prints errors itself, on one line
	showVersion := f.Bool("version", false, "print the version and exit")
	finish := p.Flags(f)
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		_, _ = io.WriteString(stdout, p.Usage+"\n\nFlags:\n")
		f.SetOutput(stdout)
		f.PrintDefaults()
		return 0
	case err == nil && *showVersion:
		_, _ = fmt.Fprintln(stdout, p.Name, Version())
		return 0
	}
	var options O
	if err == nil {
		options, err = finish(f.Args())
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "%s: %v\n%s: --help lists the flags\n", p.Name, err, p.Name)
		return exitUsage
	}
	if err := p.Run(ctx, options); err != nil {
		_, _ = fmt.Fprintf(stderr, "%s: %v\n", p.Name, err)
		return exitFailed
	}
	return 0
}

// NoArguments returns an error if there are arguments.
func NoArguments(args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q; use flags only", args[0])
	}
	return nil
}
