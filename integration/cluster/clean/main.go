//go:build unix

// Command clean removes what killed tests and demonstrations left: their folders, cgroups with all processes, and the
// logs of failed ones. It does not touch running tests, and removes no built program.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/credence-iam/credence/integration/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	removed, err := cluster.Clean(ctx)
	for _, dir := range removed {
		_, _ = fmt.Fprintln(os.Stdout, "removed", dir)
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "clean:", err)
		os.Exit(1)
	}
}
