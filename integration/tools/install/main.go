//go:build unix

// Command install builds tools into the cache folder and prints their paths. A tool that is built is not built
// again. Without arguments it builds a Kubernetes control plane.
//
//	go run ./integration/tools/install [-nodes] [tool...]
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
	flag.Usage = func() {
		_, _ = fmt.Fprintf(flag.CommandLine.Output(), "usage: install [-nodes] [tool...]\n\nTools: %v\nWithout arguments: %v\nWith -nodes: %v\n",
			tools.All(), tools.ControlPlane(), tools.Deployment())
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	list := tools.ControlPlane()
	if *nodes {
		list = tools.Deployment()
	}
	if flag.NArg() > 0 {
		list = nil
		for _, name := range flag.Args() {
			list = append(list, tools.Tool(name))
		}
	}
	for _, tool := range list {
		path, err := tools.Path(ctx, tool, os.Stderr)
		if err != nil {
			_, _ = fmt.Fprintln(os.Stderr, "install:", err)
			os.Exit(1)
		}
		_, _ = fmt.Fprintln(os.Stdout, path)
	}
}
