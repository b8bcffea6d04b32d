//go:build linux

// Package e2e tests Credence on a real cluster with real nodes, installed with Helm next to a real cert-manager. It
// tests how a kubelet runs the sidecar, and how workloads get credentials. Failures, rotations and new brokers must not
// affect running pods. Package install tests how Credence is installed, upgraded and uninstalled there.
//
// "make e2e" runs it and sets CREDENCE_E2E. It needs root and several minutes. What needs no nodes is tested in package
// integration and in integration/chart/admission.
package e2e

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// All tests share one deployment.
var d *deployment.Deployment

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
)

// shortLife is the real duration of a session that was requested for 15 minutes. Sidecars renew it after half of it. The
// other half must be longer than brokers need to start.
const shortLife = 2 * time.Minute

func TestMain(m *testing.M) {
	config := cluster.Config{Nodes: 1}
	// Before Kubernetes 1.37, the API server keeps using connections to a webhook that is no longer an endpoint. This is
	// the harder case for a terminating webhook.
	if version, err := tools.Kubernetes(); err == nil && version >= "v1.37" { // older ones do not know the gate
		config.APIServerFlags = []string{"--feature-gates=WebhookRoundTripLoadBalancing=false"}
	}
	os.Exit(deployment.RunTests(config, deployment.Config{
		STS:     ststest.Config{SessionDuration: stack.MinimumLasts(shortLife)},
		Buckets: []string{bucket},
		Images:  map[string]string{callerImage: "e2e/caller", plainImage: "e2e/plain", chrootImage: "e2e/chroot"},
	}, func(ctx context.Context, prepared *deployment.Deployment) error {
		d = prepared
		return d.Install(ctx)
	}, m.Run))
}
