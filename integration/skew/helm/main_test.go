//go:build linux

// Package helm upgrades Credence with Helm on a real cluster with nodes, from the previous version to this one and back.
// Package skew tests all other orders, without nodes.
//
// "make e2e" runs it and sets CREDENCE_E2E. It needs root and some minutes.
package helm

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/skew"
)

var (
	d        *deployment.Deployment
	previous skew.Version
)

const (
	enabled = "CREDENCE_E2E"
	module  = "github.com/credence-iam/credence"

	// The tags of the images of the two versions. Package deployment has chosen the second one.
	previousTag, thisTag = "previous", "local"
	// callerImage is the image of the caller, without tag.
	callerImage = "localhost/caller"
)

// products are the images that the chart installs, with the names of their values.
var products = []string{"broker", "webhook", "sidecar"}

// shortLife is the real duration of a session that was requested for 15 minutes. It has to be longer than a test needs to
// see that a pod is well after the brokers were uninstalled.
const shortLife = 3 * time.Minute

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Getenv(enabled) == "" {
		fmt.Printf("SKIP: these tests run by make e2e, which sets %s\n", enabled)
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
	fmt.Fprintln(os.Stderr, "the previous version is commit", previous.Commit)
	os.Exit(cluster.RunTests(cluster.Config{Nodes: 1, Progress: os.Stderr}, setUp, m.Run))
}

// setUp prepares both versions and installs nothing. The STS stops when ctx ends.
func setUp(ctx context.Context, c *cluster.Cluster) (err error) {
	if d, err = deployment.Prepare(ctx, deployment.Config{
		Cluster: c, Progress: os.Stderr,
		STS: ststest.Config{SessionDuration: func(requested time.Duration) time.Duration {
			if requested == 15*time.Minute {
				return shortLife
			}
			return requested
		}},
	}); err != nil {
		return err
	}
	folder := filepath.Join(c.Run().Dir(), "skew")
	archive, err := images.BuildLocal(ctx, folder, callerImage+":"+thisTag, module+"/integration/e2e/caller")
	if err != nil {
		return err
	}
	if err := c.LoadImage(ctx, archive.Path); err != nil {
		return err
	}
	references := map[string]string{skew.CallerProgram: callerImage}
	for _, product := range products {
		references["credence-"+product] = "localhost/credence-" + product
	}
	for program, reference := range references {
		image := images.Image{
			Reference: reference + ":" + previousTag, Name: program, Plain: true,
			Programs: map[string]string{runtime.GOARCH: filepath.Join(previous.Programs, program)},
		}
		if archive, err = image.Write(filepath.Join(folder, program+"-previous.tar")); err != nil {
			return err
		}
		if err := c.LoadImage(ctx, archive.Path); err != nil {
			return err
		}
	}
	return nil
}

// previousArguments returns Helm's arguments that install the previous chart and the previous images.
func previousArguments() ([]string, error) {
	folder, err := chart.Folder()
	if err != nil {
		return nil, err
	}
	args := slices.Clone(d.Credence)
	at := slices.Index(args, folder)
	if at < 0 {
		return nil, fmt.Errorf("helm's arguments %q have no chart %s", args, folder)
	}
	args[at] = filepath.Join(previous.Source, "charts", "credence")
	args = slices.DeleteFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--set=check.") }) // It may have no check.
	for _, product := range products {
		args = append(args, "--set=images."+product+".tag="+previousTag)
	}
	return args, nil
}
