// Command make builds the images of Credence as archives, without Docker, and prints how to use them.
//
//	go run ./integration/images/make [-folder .build/images] [-registry localhost] [-tag version] [-arch amd64,arm64]
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/credence-iam/credence/integration/images"
)

func main() {
	var config images.Config
	flag.StringVar(&config.Folder, "folder", ".build/images", "folder of the archives")
	flag.StringVar(&config.Registry, "registry", "", "registry in the names of the images (default localhost)")
	flag.StringVar(&config.Tag, "tag", "", "tag of the images (default: the version from git, or dev)")
	architectures := flag.String("arch", strings.Join(images.Architectures(), ","), "architectures, separated by commas")
	flag.Parse()
	config.Architectures = strings.Split(*architectures, ",")
	config.Progress = os.Stderr
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	archives, err := images.Build(ctx, config)
	if err == nil {
		err = report(os.Stdout, archives)
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "make:", err)
		os.Exit(1)
	}
}

// report prints the archives and the commands that import or push them.
func report(to io.Writer, archives []images.Archive) error {
	var text strings.Builder
	for _, archive := range archives {
		_, _ = fmt.Fprintf(&text, "%s\n  %s\n  %s\n", archive.Reference, archive.Path, archive.Digest)
		for _, platform := range archive.Platforms {
			_, _ = fmt.Fprintf(&text, "  linux/%s: program %s MB, download %s MB\n",
				platform.Architecture, megabytes(platform.Program), megabytes(platform.Layer))
		}
	}
	first := archives[0]
	_, _ = fmt.Fprintf(&text, `
To import into a node (containerd, k3s):
  ctr -n k8s.io images import %[1]s
To import into a cluster of kind:
  kind load image-archive %[1]s
To push to a registry, with all platforms and the same digest:
  skopeo copy --all oci-archive:%[1]s docker://%[2]s
`, first.Path, first.Reference)
	_, err := io.WriteString(to, text.String())
	return err
}

func megabytes(bytes int64) string { return fmt.Sprintf("%.1f", float64(bytes)/1e6) }
