//go:build unix

// Command make makes a release of Credence from the clean tag that is checked out, without publishing it.
//
//	go run ./integration/release/make -version v1.2.3 [-folder .build/release] [-platforms linux/amd64,…]
//
// It checks first that tag, chart, changelog and version of Go agree, and names the fix if not.
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
	config := release.Config{Progress: os.Stderr}
	flag.StringVar(&config.Version, "version", "", "version, such as v1.2.3")
	flag.StringVar(&config.Folder, "folder", ".build/release", "folder of the release")
	platforms := flag.String("platforms", "", "platforms of the credence command, separated by commas (default "+strings.Join(release.Platforms(), ",")+")")
	flag.StringVar(&config.Builder, "builder", "", "URI of what runs this build, for the provenance (default a build by hand)")
	flag.StringVar(&config.Invocation, "invocation", "", "URI of this run, for the provenance")
	flag.Parse()
	if *platforms != "" {
		config.Platforms = strings.Split(*platforms, ",")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := release.Build(ctx, config); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "make release:", err)
		os.Exit(1)
	}
	_, _ = fmt.Fprintln(os.Stdout, config.Folder)
}
