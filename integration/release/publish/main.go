//go:build unix

// Command publish pushes the images and the chart of a release to a registry, with the SBOM and the provenance of each
// image, and prints their digests. It can be repeated, and never changes what is published.
//
//	go run ./integration/release/publish [-folder .build/release] [-registry ghcr.io/credence-iam]
//
// Credentials are those of docker login, helm registry login or another program that writes Docker's configuration.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/credence-iam/credence/integration/release"
)

func main() {
	folder := flag.String("folder", ".build/release", "folder of the release")
	registry := flag.String("registry", release.Registry, "registry, with a path")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	published, err := release.Publish(ctx, *folder, *registry, nil)
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "publish:", err)
		os.Exit(1)
	}
	for _, p := range published {
		_, _ = fmt.Fprintln(os.Stdout, strings.TrimSpace(p.Name+"@"+p.Digest+" "+p.SBOM))
	}
}
