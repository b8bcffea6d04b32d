//go:build unix

// Package integration tests Credence end to end on a real control plane. It runs the real programs of the webhook and
// the broker, and the injected sidecar as in its pod's spec. Unmodified AWS SDKs use the credentials on an S3 double,
// which verifies them.
//
// The tests see Credence only from outside. There are no nodes: package e2e has them. Each package's own tests and the
// wiring tests of the programs hold the details, such as flags, metrics and the kinds of tokens.
package integration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// All tests share one control plane, and one Credence on it.
var (
	control   *cluster.Cluster
	credence  *stack.Stack
	awsclient string // the path of the program
)

const (
	// bucket may be read and written by the role "shelf" only.
	bucket = "shelf"
	// The keys that users write.
	roleKey      = "iam.amazonaws.com/role"
	permittedKey = "iam.amazonaws.com/permitted"
	durationKey  = "iam.amazonaws.com/duration"
	regionKey    = "iam.amazonaws.com/region"
	injectLabel  = "iam.amazonaws.com/inject"
)

// shortLife is the real duration of a session that was requested for 15 minutes, the minimum of STS. It is long enough
// that the minimum RefreshAfter, 30 s, is less than half of it.
const shortLife = 70 * time.Second

func TestMain(m *testing.M) {
	os.Exit(cluster.RunTests(cluster.Config{Progress: os.Stderr}, setUp, func() int {
		defer credence.Close()
		return m.Run()
	}))
}

// TestSourcesAreRead makes Go's test cache depend on the sources of the programs that the tests run.
func TestSourcesAreRead(t *testing.T) {
	t.Parallel()
	if n, err := stack.ReadSources(t.Context(), "credence"); err != nil || n < 50 {
		t.Errorf("read %d sources: %v", n, err)
	}
}

func setUp(ctx context.Context, c *cluster.Cluster) (err error) {
	control = c
	if credence, err = stack.Start(ctx, stack.Config{
		Cluster: control, Progress: os.Stderr, Buckets: []string{bucket}, STS: ststest.Config{SessionDuration: stack.MinimumLasts(shortLife)},
	}); err != nil {
		return err
	}
	awsclient, err = credence.BuildAWSClient(ctx)
	return err
}

func logger(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// arn returns the ARN of a role in the broker's account.
func arn(role string) string { return stack.RoleARN(role) }

// assumed is the ARN that STS gives a session of role with the default session name.
func assumed(role string) string {
	return "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/credence"
}

// role annotates a pod with a role.
func role(name string) map[string]string { return map[string]string{roleKey: name} }

// namespaceWith creates a namespace, and waits for the broker's roots in it if it is opted in.
func namespaceWith(t *testing.T, labels, annotations map[string]string) string {
	t.Helper()
	name := kubetest.Namespace(t, credence.Client, labels, annotations)
	if labels[injectLabel] == "enabled" {
		if err := credence.AwaitTrust(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	return name
}

// namespace creates an opted-in namespace that permits the roles that the expression matches.
func namespace(t *testing.T, permitted string) string {
	t.Helper()
	return namespaceWith(t, map[string]string{injectLabel: "enabled"}, map[string]string{permittedKey: permitted})
}

// create creates a pod with these annotations and that of its region, and returns it as stored.
func create(t *testing.T, namespace, name string, annotations map[string]string) *corev1.Pod {
	t.Helper()
	annotations[regionKey] = stack.Region
	return kubetest.Create(t, credence.Client, namespace, stack.Pod(name, annotations))
}

// injected returns what an injected pod lacks, or nil.
func injected(pod *corev1.Pod) error {
	if n := sidecars(pod); n != 1 {
		return fmt.Errorf("pod %s has %d sidecars", pod.Name, n)
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name != stack.SidecarName && kubetest.Variable(c, "AWS_CONTAINER_CREDENTIALS_FULL_URI") == "" {
			return fmt.Errorf("container %s of pod %s has no AWS_CONTAINER_CREDENTIALS_FULL_URI", c.Name, pod.Name)
		}
	}
	if pod.Labels["iam.amazonaws.com/injected"] != "true" {
		return fmt.Errorf("pod %s has labels %v", pod.Name, pod.Labels)
	}
	return nil
}

func sidecars(pod *corev1.Pod) (n int) {
	for _, c := range pod.Spec.InitContainers {
		if c.Name == stack.SidecarName {
			n++
		}
	}
	return n
}

func initNames(pod *corev1.Pod) (names []string) {
	for _, c := range pod.Spec.InitContainers {
		names = append(names, c.Name)
	}
	return names
}

// app runs the pod's sidecar until the test ends, and returns the environment of the pod's application. Its region is the
// one of the pod's annotation. The endpoints of AWS are those of the test's doubles.
func app(t *testing.T, pod *corev1.Pod) ([]string, *stack.Sidecar) {
	t.Helper()
	sidecar, err := credence.RunSidecar(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		sidecar.Stop(10 * time.Second)
		if code := sidecar.ExitCode(); code != 0 { // 66 after a data race
			t.Errorf("the sidecar exited with code %d: %v", code, sidecar.Err())
		}
	})
	env, err := sidecar.AppEnv()
	if err != nil {
		t.Fatal(err)
	}
	return slices.Concat(env, stack.NoAWSFiles(), []string{
		"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH"),
		"AWS_ENDPOINT_URL_STS=" + credence.STS.URL(), "AWS_ENDPOINT_URL_S3=" + credence.Store.URL(),
	}), sidecar
}

// command runs a program with that environment and returns its output.
func command(t *testing.T, env []string, stdin, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env, cmd.Stdin = env, strings.NewReader(stdin)
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%s %q: %w: %s", filepath.Base(name), args, err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}

// token requests the pod's token for the broker.
func token(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	text, err := credence.Token(t.Context(), pod, stack.Audience, stack.TokenSeconds)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// call requests credentials from the broker with a pod's token, through the client that sidecars use.
func call(t *testing.T, token string) (credential.Lease, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	roots, err := certs.NewRoots(credence.WriteRoots(t.TempDir()), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Target: credence.Broker.Address, TLS: certs.ClientConfig(roots, ""), TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return c.Credentials(ctx)
}

// refused returns nil if the broker refused a call with that reason and sent no credentials.
func refused(lease credential.Lease, err error, reason credential.Reason) error {
	if credential.ReasonOf(err) != reason || lease.AccessKeyID != "" {
		return fmt.Errorf("got access key %q, reason %q (%s), want a refusal with %q", lease.AccessKeyID, credential.ReasonOf(err), fmt.Sprint(err), reason)
	}
	return nil
}

// restartWebhook restarts the webhook with more flags until the test ends.
func restartWebhook(t *testing.T, flags ...string) {
	t.Helper()
	restart(t, credence.Webhook.ShutDown, credence.StartWebhook, flags)
}

// restartBroker restarts the broker with more flags until the test ends.
func restartBroker(t *testing.T, flags ...string) {
	t.Helper()
	restart(t, credence.Broker.ShutDown, credence.StartBroker, flags)
}

func restart(t *testing.T, stop func(), start func(context.Context, ...string) error, flags []string) {
	t.Helper()
	stop()
	t.Cleanup(func() {
		stop()
		if err := start(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	})
	if err := start(t.Context(), flags...); err != nil {
		t.Fatal(err)
	}
}
