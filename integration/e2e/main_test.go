//go:build linux

// Package e2e tests Credence on a real cluster with real nodes, installed with Helm beside a real cert-manager:
// what a kubelet makes of the sidecar, what the API server and its policies let through, and what running pods
// notice of failures, rotations and upgrades.
//
// It runs as make e2e, which sets CREDENCE_E2E: it needs root, and minutes.
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
)

// What all tests share.
var (
	world *cluster.Cluster
	d     *deployment.Deployment
)

// variable asks for the tests. Without it they would run with all others, which need no root.
const variable = "CREDENCE_E2E"

const (
	// bucket is what the role of its name may read and write, and no other role may.
	bucket = "shelf"
	// callerImage asks the broker for credentials, over and over; plainImage asks the sidecar without an SDK;
	// chrootImage runs programs of the node.
	callerImage = "localhost/caller:1"
	plainImage  = "localhost/plain:1"
	chrootImage = "localhost/chroot:1"
	// pauseImage asks for nothing.
	pauseImage = "localhost/credence-pause:1"
	module     = "github.com/credence-iam/credence"
)

// shortLife is what a session asked for 15 minutes, the shortest that STS gives, really lasts here, so that
// renewals can be waited for.
const shortLife = 3 * time.Minute

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(variable) == "" {
		fmt.Printf("SKIP: these tests run by make e2e, which sets %s\n", variable)
		return
	}
	os.Exit(runTests(m.Run))
}

func runTests(run func() int) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel() // ends the STS
	var failed error
	return cluster.RunTests(ctx, cluster.Config{
		Nodes: 1, Progress: os.Stderr,
		// As before Kubernetes 1.37: the API server goes on using its connections to a webhook that is no endpoint any
		// longer. It is the harder case for a webhook that ends.
		APIServerFlags: []string{"--feature-gates=WebhookRoundTripLoadBalancing=false"},
	}, func(c *cluster.Cluster) {
		world = c
		failed = setUp(ctx)
	}, func() int {
		if failed != nil {
			fmt.Fprintln(os.Stderr, "setting up:", failed)
			return 1
		}
		return run()
	})
}

func setUp(ctx context.Context) (err error) {
	began := time.Now()
	step := func(what string) {
		fmt.Fprintf(os.Stderr, "%s: %.1f s\n", what, time.Since(began).Seconds())
		began = time.Now()
	}
	if d, err = deployment.Prepare(ctx, deployment.Config{
		Cluster: world, Progress: os.Stderr, Buckets: []string{bucket},
		STS: ststest.Config{SessionLife: func(asked time.Duration) time.Duration {
			if asked == 15*time.Minute {
				return shortLife
			}
			return asked
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
	step("preparing images, STS and MinIO")
	if err := d.Install(ctx); err != nil {
		return err
	}
	step("installing cert-manager and Credence with Helm")
	return nil
}
