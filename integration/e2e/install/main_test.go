//go:build linux

// Package install installs, upgrades and uninstalls Credence on a real cluster with nodes, as users do. Pods must be
// injected as soon as an installation has ended, running pods must notice no upgrade, and what Helm and docs/install.md
// promise must be true. Package skew upgrades in all other orders, without nodes.
//
// "make e2e" runs it and sets CREDENCE_E2E. It needs root and some minutes. Each test begins with the installation that it
// needs, so that it does not matter which one an earlier test has left.
package install

import (
	"context"
	"os"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/stack"
)

// All tests share one cluster.
var d *deployment.Deployment

const (
	roleKey = "iam.amazonaws.com/role"
	// callerImage is the image of the caller, without tag.
	callerImage = "localhost/caller"
	// thisTag is the tag of the images of this version. Package deployment has chosen it.
	thisTag = "local"
)

// shortLife is the real duration of a session that was requested for 15 minutes. It has to be longer than a test needs to
// see that a pod is well after the brokers were uninstalled.
const shortLife = 2 * time.Minute

func TestMain(m *testing.M) {
	os.Exit(deployment.RunTests(cluster.Config{Nodes: 1}, deployment.Config{
		STS:    ststest.Config{SessionDuration: stack.MinimumLasts(shortLife)},
		Images: map[string]string{callerImage + ":" + thisTag: "e2e/caller"},
	}, func(ctx context.Context, prepared *deployment.Deployment) error {
		d = prepared
		_, err := d.Run(ctx, "", d.Helm, d.CertManager...)
		return err
	}, m.Run))
}

// app returns an annotated pod whose application uses credentials all the time.
func app(name string) *corev1.Pod {
	return d.App(name, map[string]string{roleKey: "cart", "iam.amazonaws.com/duration": "15m"}, "watch", "1h")
}
