//go:build unix

// Command pin prints the checksums of the official binaries of all tools, for Kubernetes' minor version in KUBERNETES.
// integration/tools downloads only what has its checksum in integration/tools/official.sha256. A maintainer adds the
// lines there and reviews them:
//
//	go run ./integration/tools/pin >> integration/tools/official.sha256
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/credence-iam/credence/integration/tools"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := tools.Pin(ctx, os.Stdout); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "pin:", err)
		os.Exit(1)
	}
}
