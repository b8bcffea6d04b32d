//go:build linux

// Package e2e tests Credence on a real cluster with real nodes, installed with Helm next to a real cert-manager. It
// tests how a kubelet runs the sidecar, and how workloads get credentials. Failures, rotations and upgrades must not
// affect running pods.
//
// "make e2e" runs it and sets CREDENCE_E2E. It needs root and several minutes. What needs no nodes is tested in package
// integration and in integration/chart/admission.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/tools"
)

// All tests share one cluster.
var (
	world *cluster.Cluster
	d     *deployment.Deployment
)

// variable enables these tests. Without it they would run with all other tests, which do not need root.
const variable = "CREDENCE_E2E"

const (
	// bucket may be read and written by the role of the same name only.
	bucket = "shelf"
	// callerImage calls the broker all the time, plainImage calls the sidecar without an SDK, and chrootImage runs programs
	// of the node.
	callerImage = "localhost/caller:1"
	plainImage  = "localhost/plain:1"
	chrootImage = "localhost/chroot:1"
	// pauseImage does nothing.
	pauseImage = "localhost/credence-pause:1"
	module     = "github.com/credence-iam/credence"
)

// shortLife is the real duration of a session that was requested for 15 minutes, the minimum of STS, so that tests can
// wait for renewals.
const shortLife = 3 * time.Minute

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(variable) == "" {
		fmt.Printf("SKIP: these tests run by make e2e, which sets %s\n", variable)
		return
	}
	config := cluster.Config{Nodes: 1, Progress: os.Stderr}
	// Before Kubernetes 1.37, the API server keeps using connections to a webhook that is no longer an endpoint. This is
	// the harder case for a terminating webhook.
	if version, err := tools.Kubernetes(); err == nil && version >= "v1.37" { // older ones do not know the gate
		config.APIServerFlags = []string{"--feature-gates=WebhookRoundTripLoadBalancing=false"}
	}
	os.Exit(cluster.RunTests(config, setUp, m.Run))
}

// setUp installs Credence. Its STS stops when ctx ends.
func setUp(ctx context.Context, c *cluster.Cluster) (err error) {
	world = c
	began := time.Now()
	step := func(what string) {
		fmt.Fprintf(os.Stderr, "%s: %.1f s\n", what, time.Since(began).Seconds())
		began = time.Now()
	}
	if d, err = deployment.Prepare(ctx, deployment.Config{
		Cluster: world, Progress: os.Stderr, Buckets: []string{bucket},
		STS: ststest.Config{SessionDuration: func(requested time.Duration) time.Duration {
			if requested == 15*time.Minute {
				return shortLife
			}
			return requested
		}},
	}); err != nil {
		return err
	}
	folder := filepath.Join(world.Run().Dir(), "e2e")
	for reference, pkg := range map[string]string{callerImage: "caller", plainImage: "plain", chrootImage: "chroot"} {
		archive, err := images.BuildLocal(ctx, folder, reference, module+"/integration/e2e/"+pkg)
		if err != nil {
			return err
		}
		if err := world.LoadImage(ctx, archive.Path); err != nil {
			return err
		}
	}
	step("preparing images, STS and S3")
	if err := d.Install(ctx); err != nil {
		return err
	}
	step("installing cert-manager and Credence with Helm")
	return nil
}
