//go:build unix

// Package certmanager puts the real cert-manager into clusters of tests and of the demonstration: its
// controllers, its cainjector and its webhook, from its library, with its own chart and its own CRDs. See
// package tools for how it is built.
//
// There are two ways. On nodes, import the image that Archive makes, and run Helm. On a control plane without
// nodes, apply the CRDs and run what Command describes: everything but the webhook, which is what validates
// and defaults, and records who has made a request.
//
// Left out are leader election, so there is one replica of each part, and issuers that need somebody else's
// service.
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
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

// Namespace is where it is installed.
const Namespace = "cert-manager"

// release is the name that Helm knows it by.
const release = "cert-manager"

// Reference names the image that the chart is told to use.
const Reference = "localhost/cert-manager:local"

//go:embed values.yaml
var values []byte

// timeout is what Helm waits for, of several things each. They take seconds on an idle machine.
const timeout = "5m"

// Archive writes the image into folder, for this machine's architecture, after building cert-manager if need
// be.
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

// Chart returns the folder of the official chart, of the version that is built. It is read-only.
func Chart(ctx context.Context) (string, error) {
	return below(ctx, "deploy", "charts", "cert-manager")
}

// CRDs returns the folder of the official CustomResourceDefinitions. Server-side apply takes them; they are
// too large for the annotation that the other kind of apply makes. Helm needs none: the chart has them.
func CRDs(ctx context.Context) (string, error) { return below(ctx, "deploy", "crds") }

func below(ctx context.Context, names ...string) (string, error) {
	source, err := tools.Source(ctx, tools.CertManager)
	if err != nil {
		return "", err
	}
	folder := filepath.Join(append([]string{source}, names...)...)
	if _, err := os.Stat(folder); err != nil {
		return "", fmt.Errorf("looking for a folder of cert-manager: %w", err)
	}
	return folder, nil
}

// Command describes cert-manager without its webhook as a process, with the rights in a kubeconfig file.
func Command(ctx context.Context, kubeconfig string, progress io.Writer) (process.Command, error) {
	program, err := tools.Path(ctx, tools.CertManager, progress)
	if err != nil {
		return process.Command{}, err
	}
	return process.Command{
		Name: "cert-manager",
		Path: program,
		Args: []string{"--kubeconfig=" + kubeconfig},
		Env:  []string{"MODE=controller,cainjector"},
	}, nil
}

// Helm returns the arguments with which helm installs the official chart, and waits until certificates can be
// asked for. The nodes must have the image. A file of values is written into folder.
func Helm(ctx context.Context, folder string) ([]string, error) {
	chart, err := Chart(ctx)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(folder, "cert-manager-values.yaml")
	if err := os.WriteFile(file, values, 0o600); err != nil {
		return nil, fmt.Errorf("writing the values of cert-manager's chart: %w", err)
	}
	return []string{
		"install", release, chart, "--namespace=" + Namespace, "--create-namespace", "--values=" + file, "--wait", "--timeout=" + timeout,
	}, nil
}
