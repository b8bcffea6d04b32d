//go:build unix

package skew_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/skew"
	"github.com/credence-iam/credence/integration/stack"
)

// All tests share one control plane, and Credence's rights and STS on it.
var (
	control  *cluster.Cluster
	credence *stack.Stack
	previous skew.Version
	versions [2]version // the previous one and this one
)

// version is a version of Credence. Its name is the tag of its sidecar's image.
type version struct{ name, programs, memory string }

func (v version) image() string { return "credence-sidecar:" + v.name }

// shortLife is the real duration of a session that was requested for 15 minutes, the minimum of STS. It is long enough
// that the minimum RefreshAfter, 30 s, is less than half of it.
const shortLife = 70 * time.Second

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		fmt.Println("SKIP: -short, and these tests build the previous version")
		return
	}
	var err error
	if previous, err = skew.Previous(context.Background(), os.Stderr); errors.Is(err, skew.ErrNoHistory) {
		fmt.Println("SKIP:", err)
		return
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(cluster.RunTests(cluster.Config{Progress: os.Stderr}, setUp, func() int {
		defer credence.Close()
		return m.Run()
	}))
}

func setUp(ctx context.Context, c *cluster.Cluster) (err error) {
	control = c
	if credence, err = stack.Start(ctx, stack.Config{
		Cluster: c, Progress: os.Stderr, STS: ststest.Config{SessionDuration: stack.MinimumLasts(shortLife)},
	}); err != nil {
		return err
	}
	versions = [2]version{{"previous", previous.Programs, "16Mi"}, {"this", filepath.Join(c.Run().Dir(), "bin"), "17Mi"}}
	for name, pkg := range map[string]string{"credence": "../../cmd/credence", skew.CallerProgram: "../e2e/caller"} {
		if err := skew.Build(ctx, pkg, filepath.Join(versions[1].programs, name)); err != nil {
			return err
		}
	}
	for _, v := range versions {
		text, err := skew.Describe(v.programs)
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "%s version:\n%s", v.name, text)
	}
	fmt.Fprintln(os.Stderr, "the previous version is commit", previous.Commit)
	return nil
}

// TestSourcesAreRead makes Go's test cache depend on the sources of the programs that the tests run.
func TestSourcesAreRead(t *testing.T) {
	t.Parallel()
	if n, err := stack.ReadSources(t.Context()); err != nil || n < 50 {
		t.Errorf("read %d sources: %v", n, err)
	}
}
