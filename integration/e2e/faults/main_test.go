//go:build linux

// Package faults breaks a real installation, and requires that "credence explain" names the cause first and that the
// remedy that it prints fixes it. It makes the set-ups of operator/explain/testdata/faults.yaml, whose snapshots the tests of
// package explain only imitate, runs the printed commands with a shell, and waits until the pod has credentials. The text
// that users read is in testdata, without names and times.
//
// "make e2e" runs it and sets CREDENCE_E2E. It needs root and some minutes. What the command of a viewer sees, and the
// sessions that it shows, is tested in integration/e2e.
package faults

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/images"
)

// All tests share one cluster.
var d *deployment.Deployment

func TestMain(m *testing.M) {
	os.Exit(deployment.RunTests(cluster.Config{Nodes: 1}, deployment.Config{}, setUp, m.Run))
}

// setUp installs Credence, and puts the programs that remedies call on the PATH.
func setUp(ctx context.Context, prepared *deployment.Deployment) error {
	d = prepared
	bin := filepath.Join(d.Cluster.Run().Dir(), "faults")
	if err := images.CompileFor(ctx, "github.com/credence-iam/credence/cmd/credence", runtime.GOOS, runtime.GOARCH, filepath.Join(bin, "credence")); err != nil {
		return err
	}
	for name, path := range map[string]string{"kubectl": d.Kubectl, "helm": d.Helm} {
		if err := os.Symlink(path, filepath.Join(bin, name)); err != nil {
			return err
		}
	}
	if err := os.Setenv("PATH", bin+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	return d.Install(ctx)
}
