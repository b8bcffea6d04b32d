//go:build linux

package deployment

import (
	"context"
	"fmt"
	"os"

	"github.com/credence-iam/credence/integration/cluster"
)

// Variable enables the tests on clusters with nodes, which need root and minutes. make e2e and make soak set it.
const Variable = "CREDENCE_E2E"

// RunTests is the body of a TestMain whose tests share a cluster with nodes, and returns the exit code. It prepares cfg on
// the cluster, and passes the result to setUp. See [cluster.RunTests]. Without [Variable], it skips the tests.
func RunTests(nodes cluster.Config, cfg Config, setUp func(context.Context, *Deployment) error, run func() int) int {
	if os.Getenv(Variable) == "" {
		fmt.Printf("SKIP: these tests run by make e2e, which sets %s\n", Variable)
		return 0
	}
	nodes.Progress, cfg.Progress = os.Stderr, os.Stderr
	return cluster.RunTests(nodes, func(ctx context.Context, c *cluster.Cluster) error {
		cfg.Cluster = c
		d, err := Prepare(ctx, cfg)
		if err != nil {
			return err
		}
		return setUp(ctx, d)
	}, run)
}
