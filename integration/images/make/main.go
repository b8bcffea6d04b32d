// Command make builds the images of Credence as archives, without Docker, and says what to do with them.
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
	flag.StringVar(&config.Folder, "folder", ".build/images", "folder that the archives are written into")
	flag.StringVar(&config.Registry, "registry", "", "begins the images' references (default localhost)")
	flag.StringVar(&config.Tag, "tag", "", "ends the images' references (default the version that git tells, else dev)")
	architectures := flag.String("arch", strings.Join(images.Architectures(), ","), "architectures, with commas")
	flag.Parse()
	config.Architectures = strings.Split(*architectures, ",")
	config.Progress = os.Stderr
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	archives, err := images.Build(ctx, config)
	if err == nil {
		err = tell(os.Stdout, archives)
	}
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "make:", err)
		os.Exit(1)
	}
}

// tell says what was made, and how it comes to where it is needed.
func tell(to io.Writer, archives []images.Archive) error {
	var text strings.Builder
	for _, archive := range archives {
		_, _ = fmt.Fprintf(&text, "%s\n  %s\n  %s\n", archive.Reference, archive.Path, archive.Digest)
		for _, platform := range archive.Platforms {
			_, _ = fmt.Fprintf(&text, "  linux/%s: program %s MB, to download %s MB\n",
				platform.Architecture, megabytes(platform.Program), megabytes(platform.Layer))
		}
	}
	first := archives[0]
	_, _ = fmt.Fprintf(&text, `
Into the store of a node (containerd, k3s):
  ctr -n k8s.io images import %[1]s
Into a cluster of kind:
  kind load image-archive %[1]s
To a registry, all platforms and with the same digest:
  skopeo copy --all oci-archive:%[1]s docker://%[2]s
`, first.Path, first.Reference)
	_, err := io.WriteString(to, text.String())
	return err
}

func megabytes(bytes int64) string { return fmt.Sprintf("%.1f", float64(bytes)/1e6) }
