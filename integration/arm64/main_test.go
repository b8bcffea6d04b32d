//go:build unix

// Package arm64 runs the programs for arm64 on a real control plane: webhook, broker and sidecar give a pod credentials,
// and end in order. On machines of other architectures, qemu-user runs them.
//
// It shows that the programs work there, not how fast they are. Package integration has the tests of behavior.
package arm64

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

const (
	architecture = "arm64"
	module       = "github.com/credence-iam/credence"
	role         = "cart"
	// stopGrace limits the end of a program.
	stopGrace = 10 * time.Second
)

// All tests share one control plane, and one Credence on it.
var (
	control  *cluster.Cluster
	credence *stack.Stack
)

func TestMain(m *testing.M) {
	flag.Parse()
	if _, err := stack.Emulator(architecture); err != nil {
		fmt.Printf("SKIP: programs for %s cannot run here: %v\n", architecture, err)
		return
	}
	os.Exit(cluster.RunTests(cluster.Config{Progress: os.Stderr}, func(ctx context.Context, c *cluster.Cluster) (err error) {
		control = c
		credence, err = stack.Start(ctx, stack.Config{Cluster: c, Architecture: architecture, Progress: os.Stderr})
		return err
	}, func() int {
		defer credence.Close()
		return m.Run()
	}))
}

// TestSourcesAreRead makes Go's test cache depend on the sources of the programs that the tests run.
func TestSourcesAreRead(t *testing.T) {
	if n, err := stack.ReadSources(t.Context(), "credence"); err != nil || n < 50 {
		t.Errorf("read %d sources: %v", n, err)
	}
}

func TestPodGetsCredentials(t *testing.T) {
	awsclient, err := credence.BuildAWSClient(t.Context()) // an application needs no emulator
	if err != nil {
		t.Fatal(err)
	}
	ns := kubetest.Namespace(t, credence.Client, map[string]string{"iam.amazonaws.com/inject": "enabled"},
		map[string]string{"iam.amazonaws.com/permitted": stack.RoleARN(role)})
	if err := credence.AwaitTrust(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	check := func(name string) {
		t.Helper()
		pod := kubetest.Create(t, credence.Client, ns, stack.Pod(name, map[string]string{
			"iam.amazonaws.com/role": role, "iam.amazonaws.com/region": stack.Region,
		}))
		sidecar, err := credence.RunSidecar(t.Context(), pod)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			sidecar.Stop(stopGrace)
			if code := sidecar.ExitCode(); code != 0 {
				t.Errorf("the sidecar exited with status %d after SIGTERM, want 0", code)
			}
		}()
		env, err := sidecar.AppEnv()
		if err != nil {
			t.Fatal(err)
		}
		app := exec.CommandContext(t.Context(), awsclient, "whoami")
		app.Env = append(append(env, stack.NoAWSFiles()...), "AWS_ENDPOINT_URL_STS="+credence.STS.URL())
		out, err := app.CombinedOutput()
		want := "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/credence"
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("an SDK in pod %s is %q (%v), want %q", name, got, err, want)
		}
	}
	check("first")

	for name, program := range map[string]*stack.Program{"broker": credence.Broker, "webhook": credence.Webhook} {
		program.ShutDown()
		if code := program.ExitCode(); code != 0 {
			t.Errorf("the %s exited with status %d after SIGTERM, want 0", name, code)
		}
	}
	if err := errors.Join(credence.StartBroker(t.Context()), credence.StartWebhook(t.Context())); err != nil {
		t.Fatal(err)
	}
	check("after-restart")
}

func TestCommandInjects(t *testing.T) {
	credenceProgram := filepath.Join(control.Run().Dir(), "bin", "credence")
	if err := images.Compile(t.Context(), module+"/cmd/credence", architecture, credenceProgram); err != nil {
		t.Fatal(err)
	}
	emulator, err := stack.Emulator(architecture)
	if err != nil {
		t.Fatal(err)
	}
	command := append([]string{credenceProgram, "inject"}, credence.InjectFlags()...)
	if emulator != "" {
		command = append([]string{emulator}, command...)
	}
	cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
	cmd.Stdin = strings.NewReader(`apiVersion: v1
kind: Pod
metadata: {name: app, namespace: shop, annotations: {iam.amazonaws.com/role: cart}}
spec: {containers: [{name: app, image: "app:1"}]}
`)
	out, err := cmd.Output()
	if err != nil || strings.Count(string(out), `"name": "`+stack.SidecarName+`"`) != 1 {
		t.Errorf("credence inject: %v; it printed\n%s", err, out)
	}
}
