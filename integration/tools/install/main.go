//go:build unix

// Command install builds the named tools, or a Kubernetes control plane when none is named, into the cache
// folder, and prints the path of each. What is built already costs nothing.
//
//	go run ./integration/tools/install [-nodes] [tool...]
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/credence-iam/credence/integration/tools"
)

func main() {
	nodes := flag.Bool("nodes", false, "also build what a cluster with nodes runs, and what puts Credence on it")
	flag.Usage = func() {
		_, _ = fmt.Fprintf(flag.CommandLine.Output(), "usage: install [-nodes] [tool...]\n\nTools: %v\nWithout arguments: %v\nWith -nodes: %v\n",
			tools.All(), tools.ControlPlane(), tools.Deployment())
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	wanted := tools.ControlPlane()
	if *nodes {
		wanted = tools.Deployment()
	}
	if err := run(ctx, wanted, flag.Args(), os.Stdout, os.Stderr); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "install:", err)
		os.Exit(1)
	}
}

// run builds the named tools, or those that are wanted when none is named.
func run(ctx context.Context, wanted []tools.Tool, names []string, stdout, stderr io.Writer) error {
	if len(names) > 0 {
		wanted = nil
		for _, name := range names {
			wanted = append(wanted, tools.Tool(name))
		}
	}
	for _, tool := range wanted {
		path, err := tools.Path(ctx, tool, stderr)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintln(stdout, path); err != nil {
			return fmt.Errorf("printing the path of %s: %w", tool, err)
		}
	}
	return nil
}
