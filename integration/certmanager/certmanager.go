//go:build unix

// Package certmanager installs the real cert-manager into clusters of tests and of the demonstration: its controllers,
// its cainjector and its webhook, from its library, with its own chart and CRDs. Package tools builds it.
//
// It lacks leader election, so each part has one replica, and issuers that need an external service.
package certmanager

import (
	"context"
	_ "embed" // for the values
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/tools"
)

// Namespace is the namespace of cert-manager.
const Namespace = "cert-manager"

// release is the name of Helm's release.
const release = "cert-manager"

// Reference names the image in the values.
const Reference = "localhost/cert-manager:local"

//go:embed values.yaml
var values []byte

// timeout limits each wait of Helm, which takes seconds on an idle machine.
const timeout = "5m"

// Archive writes the image into folder, for this machine's architecture. It builds cert-manager first if necessary.
func Archive(ctx context.Context, folder string, progress io.Writer) (images.Archive, error) {
	program, err := tools.Path(ctx, tools.CertManager, progress)
	if err != nil {
		return images.Archive{}, err
	}
	return images.Image{
		Reference: Reference,
		Name:      "cert-manager",
		Programs:  map[string]string{runtime.GOARCH: program},
		Plain:     true,
	}.Write(filepath.Join(folder, "cert-manager.tar"))
}

// Helm returns helm's arguments to install the official chart, of the version that is built, and to wait until
// cert-manager issues certificates. The nodes must have the image. Helm writes a file of values into folder.
func Helm(ctx context.Context, folder string) ([]string, error) {
	source, err := tools.Source(ctx, tools.CertManager)
	if err != nil {
		return nil, err
	}
	chart := filepath.Join(source, "deploy", "charts", "cert-manager")
	if _, err := os.Stat(chart); err != nil {
		return nil, fmt.Errorf("finding cert-manager's chart: %w", err)
	}
	file := filepath.Join(folder, "cert-manager-values.yaml")
	if err := os.WriteFile(file, values, 0o600); err != nil {
		return nil, fmt.Errorf("writing the values of cert-manager's chart: %w", err)
	}
	return []string{
		"install", release, chart, "--namespace=" + Namespace, "--create-namespace", "--values=" + file, "--wait", "--timeout=" + timeout,
	}, nil
}
