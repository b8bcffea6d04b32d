//go:build unix

// Command install builds tools into the cache folder and prints their paths. A tool that is built is not built
// again. Without arguments it builds a Kubernetes control plane. Package tools describes the environment.
//
//	go run ./integration/tools/install [-nodes | -version] [tool...]
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/credence-iam/credence/integration/tools"
)

func main() {
	nodes := flag.Bool("nodes", false, "build the programs of a cluster with nodes, and those that install Credence there")
	version := flag.Bool("version", false, "build nothing, and print the version of Kubernetes that the environment chooses")
	flag.Usage = func() {
		_, _ = fmt.Fprintf(flag.CommandLine.Output(), "usage: install [-nodes | -version] [tool...]\n\nTools: %v\nWithout arguments: %v\nWith -nodes: %v\n",
			tools.All(), tools.ControlPlane(), tools.Deployment())
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *nodes, *version, flag.Args()); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "install:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, nodes, version bool, names []string) error {
	if version {
		kubernetes, err := tools.Kubernetes()
		if err == nil {
			_, _ = fmt.Fprintln(os.Stdout, kubernetes)
		}
		return err
	}
	list := tools.ControlPlane()
	if nodes {
		list = tools.Deployment()
	}
	if len(names) > 0 {
		list = nil
		for _, name := range names {
			list = append(list, tools.Tool(name))
		}
	}
	paths, err := tools.Paths(ctx, list, os.Stderr)
	if err != nil {
		return err
	}
	for _, tool := range list {
		_, _ = fmt.Fprintln(os.Stdout, paths[tool])
	}
	return nil
}
