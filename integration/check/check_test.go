//go:build linux

// Package check runs "credence check" on a real API server: before an installation, with and without rights, and with ten
// thousand pods, where it shows that the memory of the command is bounded. Nothing runs in the cluster, because it has no
// nodes. Package e2e checks an installation that runs.
package check

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/tools"
	"github.com/credence-iam/credence/operator/check"
	"github.com/credence-iam/credence/operator/finding"
	"github.com/credence-iam/credence/operator/installation"
)

const (
	manyNamespaces = 50
	podsOfEach     = 200
	// without is how many pods have no sidecar.
	without = 3
	// maxMemory limits what the command may use with 10,000 pods, in kilobytes.
	maxMemory = 200_000
)

// All tests share one control plane.
var (
	control *cluster.Cluster
	client  kubernetes.Interface
)

func TestMain(m *testing.M) {
	os.Exit(cluster.RunTests(cluster.Config{Progress: os.Stderr}, func(_ context.Context, c *cluster.Cluster) (err error) {
		control = c
		client, err = kubernetes.NewForConfig(c.Config())
		return err
	}, m.Run, tools.Helm))
}

// TestCheck goes from an empty cluster to an installation with many pods.
func TestCheck(t *testing.T) {
	program := filepath.Join(t.TempDir(), "credence")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", program, "../../cmd/credence").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := run(t, program, "--pre")
	expect(t, before, map[string]string{"cert-manager": "failed: cert-manager is not installed: the API server does not know Certificates"})
	if out, err := command(t, program).CombinedOutput(); err == nil || !strings.Contains(string(out), "found no Credence in this cluster") {
		t.Errorf("without an installation: %v, %s", err, out)
	}

	createPods(t) // before the installation, whose webhook does not run here
	install(t)
	await.Until(t, "the pods of brokers and webhooks exist", func() error {
		list, err := client.CoreV1().Pods(chart.Namespace).List(t.Context(), metav1.ListOptions{})
		if err == nil && len(list.Items) != 4 {
			err = fmt.Errorf("there are %d", len(list.Items))
		}
		return err
	})
	after := run(t, program)
	t.Run("TenThousandPods", func(t *testing.T) {
		if after.memory > maxMemory {
			t.Errorf("the command used %d kB, more than %d kB", after.memory, maxMemory)
		}
		t.Logf("%d pods: %d kB, %.1f s of CPU", manyNamespaces*podsOfEach, after.memory, after.cpu)
		expect(t, after, map[string]string{
			"webhook-pods": "failed: not ready, nor is any other, so ", "broker-pods": "failed: not ready, nor is any other, so ",
			"injection": "failed: Internal error occurred: failed calling webhook", "trust": "failed: ConfigMap credence-trust does not exist",
			"pods-not-injected": fmt.Sprintf("failed: %d pods of opted-in namespaces annotated but without a sidecar", without),
			"permits-any-role":  "warning: 1 namespace permitting all roles of all accounts: many-7",
			"sidecar-versions":  fmt.Sprintf("ok: %d sidecars: %d of 0.1.0", manyNamespaces*podsOfEach-without, manyNamespaces*podsOfEach-without),
			"rights":            "ok: brokers and webhook have their", "admission-policies": "ok: 3 present and bound",
			"webhook-configuration": "ok: the API server calls it",
		})
	})
	t.Run("OneNamespace", func(t *testing.T) {
		one := run(t, program, "-n", "many-1")
		expect(t, one, map[string]string{"sidecar-versions": fmt.Sprintf("ok: %d sidecars", podsOfEach), "permits-any-role": "ok: "})
	})
	t.Run("WithoutRights", withoutRights)
	t.Run("RightsOfTheBrokers", func(t *testing.T) {
		if err := client.RbacV1().ClusterRoleBindings().Delete(t.Context(), "credence-broker", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		expect(t, run(t, program), map[string]string{"rights": "failed: 15 rights missing: broker: get pods --all-namespaces, "})
	})
	if again := run(t, program, "--pre"); !slices.ContainsFunc(again.findings(), func(f finding.Finding) bool {
		return f.Step == "existing-installation" && f.State == finding.Warning && strings.HasSuffix(f.Text, "in namespace credence")
	}) {
		t.Errorf("--pre beside an installation: %+v", again.findings())
	}
}

// withoutRights shows that a user without any right gets a finding for each check, none of which blames the cluster.
func withoutRights(t *testing.T) {
	config, err := control.User("nobody")
	if err != nil {
		t.Fatal(err)
	}
	nobody, err := installation.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	found, err := nobody.Find(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	result, err := check.Run(t.Context(), nobody, found, check.Config{})
	if err != nil {
		t.Fatal(err)
	}
	unknown := 0
	for _, g := range result.Groups {
		for _, f := range g.Findings {
			if f.State != finding.OK && f.State != finding.Unknown {
				t.Errorf("%+v", f)
			}
			if f.State == finding.Unknown && strings.Contains(f.Text, "needs: ") {
				unknown++
			}
		}
	}
	if unknown < 20 {
		t.Errorf("%d findings name a missing right, want at least 20: %+v", unknown, result)
	}
}

// output is what one run of the command printed and used.
type output struct {
	check.Result
	memory int64   // its maximum, in kilobytes
	cpu    float64 // seconds
}

func (o output) findings() (all []finding.Finding) {
	for _, g := range o.Groups {
		all = append(all, g.Findings...)
	}
	return all
}

func command(t *testing.T, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), program, append([]string{"check", "-o", "json"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+control.Kubeconfig())
	return cmd
}

// run runs the command, which finds something wrong.
func run(t *testing.T, program string, args ...string) (o output) {
	t.Helper()
	cmd := command(t, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
		t.Fatalf("%v: %s%s", err, &stdout, &stderr)
	}
	if err := json.Unmarshal(stdout.Bytes(), &o.Result); err != nil {
		t.Fatalf("%v: %s%s", err, &stdout, &stderr)
	}
	if stderr.Len() > 0 {
		t.Errorf("it wrote %s", &stderr)
	}
	usage, _ := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	o.memory, o.cpu = usage.Maxrss, (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	return o
}

// expect wants a finding with that state and beginning for each check.
func expect(t *testing.T, o output, want map[string]string) {
	t.Helper()
	for id, text := range want {
		if !slices.ContainsFunc(o.findings(), func(f finding.Finding) bool {
			return f.Step == id && strings.HasPrefix(string(f.State)+": "+f.Text, text)
		}) {
			t.Errorf("%s: want %q", id, text)
		}
	}
	if t.Failed() {
		for _, f := range o.findings() {
			t.Logf("%s %s: %s %s", f.State, f.Step, f.Subject, f.Text)
		}
	}
}

// createPods creates pods as the webhook of the chart makes them, and some without a sidecar.
func createPods(t *testing.T) {
	text, err := os.ReadFile("../../webhook/inject/testdata/containers.out.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := yaml.UnmarshalStrict(text, &pod); err != nil {
		t.Fatal(err)
	}
	pod.Spec.InitContainers[0].Image = "ghcr.io/credence-iam/credence-sidecar:0.1.0"
	pod.Spec.AutomountServiceAccountToken = new(false)
	var group errgroup.Group
	group.SetLimit(16)
	for n := range manyNamespaces {
		name := fmt.Sprintf("many-%d", n)
		ctx := t.Context()
		if _, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.CoreV1().ServiceAccounts(name).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil && !strings.Contains(err.Error(), "already exists") {
			t.Fatal(err)
		}
		for i := range podsOfEach {
			group.Go(func() error {
				p := pod.DeepCopy()
				p.Name = fmt.Sprintf("pod-%d", i)
				if n == 0 && i < without {
					p.Spec.InitContainers = nil
				}
				_, err := client.CoreV1().Pods(name).Create(ctx, p, metav1.CreateOptions{})
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
}

// install installs the chart with the user's own certificates, and opts the namespaces in.
func install(t *testing.T) {
	values := filepath.Join(t.TempDir(), "values.yaml")
	text, err := yaml.Marshal(map[string]any{"certificates": map[string]any{"source": "secrets", "roots": string(certstest.NewCA(t).PEM)}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(values, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := chart.Install(t.Context(), chart.Config{Kubeconfig: control.Kubeconfig(), ValueFiles: []string{values}}, "--no-hooks"); err != nil {
		t.Fatal(err)
	}
	for n := range manyNamespaces {
		permitted := fmt.Sprintf("arn:aws:iam::123456789012:role/team-%d-.*", n)
		if n == 7 {
			permitted = ".*"
		}
		patch := fmt.Appendf(nil, `{"metadata":{"labels":{"iam.amazonaws.com/inject":"enabled"},"annotations":{"iam.amazonaws.com/permitted":%q}}}`, permitted)
		if _, err := client.CoreV1().Namespaces().Patch(t.Context(), fmt.Sprintf("many-%d", n), types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}
