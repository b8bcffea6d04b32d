// Package program is what the mains of Credence share: how a program is told to end, what it prints
// when it cannot go on, and the answers to --help and --version. It knows nothing of what they do.
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

// Exit codes. 2 is what the shell and package flag use for a command line that cannot be right.
const (
	exitFailed = 1
	exitUsage  = 2
)

// Program is one program, with options of type O.
type Program[O any] struct {
	// Name is the program's name, as its messages begin.
	Name string
	// Usage says in a few lines what it does and how it is called. The flags are listed below it.
	Usage string
	// Flags defines the flags. finish is called when they are parsed, and returns what they mean or
	// why they cannot be right.
	Flags func(f *flag.FlagSet) (finish func(args []string) (O, error))
	// Run runs the program until it is done or ctx ends, on SIGINT or SIGTERM.
	Run func(ctx context.Context, options O) error
}

// Main runs the program with the process's arguments, and exits: with 0 when it did what it was asked
// to, 1 when it could not, and 2 when its command line cannot be right. An error is one line on
// standard error.
func (p Program[O]) Main() {
	os.Exit(p.main(os.Args[1:], os.Stdout, os.Stderr))
}

func (p Program[O]) main(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	f := flag.NewFlagSet(p.Name, flag.ContinueOnError)
	f.SetOutput(io.Discard) // its errors are printed below, on one line
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

// NoArguments is the error for arguments of a program that takes none.
func NoArguments(args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("unexpected argument %q: everything is set by flags", args[0])
	}
	return nil
}
