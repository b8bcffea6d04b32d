//go:build unix

// Package siege_test attacks a broker and a webhook on a real control plane. Both run as programs with the memory
// limits of the chart. Meanwhile a running pod calls the broker, and pods are created. When first tried, each attack
// killed a program or blocked its other clients.
package siege_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/siege/attack"
	"github.com/credence-iam/credence/integration/stack"
)

const (
	roleKey      = "iam.amazonaws.com/role"
	permittedKey = "iam.amazonaws.com/permitted"
)

// attackers are the addresses that attacks come from. Everything else comes from 127.0.0.1.
var attackers = []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}

var (
	credence *stack.Stack
	limited  bool              // the programs have the chart's memory limits
	length   = 3 * time.Second // of each attack; CREDENCE_SIEGE sets it
)

func TestMain(m *testing.M) {
	if attack.Main() {
		return
	}
	if stack.Race {
		fmt.Println("SKIP: programs with the race detector need many times the memory limit")
		return
	}
	os.Exit(cluster.RunTests(cluster.Config{Progress: os.Stderr}, setUp, func() int {
		defer credence.Close()
		return m.Run()
	}))
}

func setUp(ctx context.Context, c *cluster.Cluster) (err error) {
	if text := os.Getenv("CREDENCE_SIEGE"); text != "" {
		if length, err = time.ParseDuration(text); err != nil {
			return fmt.Errorf("CREDENCE_SIEGE: %w", err)
		}
	}
	const files = 20_000 // the largest attack has 8,000 connections, here and in a program
	if err := allowFiles(files); err != nil {
		return fmt.Errorf("allowing %d open files: %w", files, err)
	}
	config := stack.Config{Cluster: c, Progress: os.Stderr}
	if err := process.CgroupsPossible(); err != nil {
		fmt.Println("the programs have no memory limit:", err)
	} else {
		limited = true
		if config.BrokerMemory, config.WebhookMemory, err = stack.ChartMemory(); err != nil {
			return err
		}
	}
	credence, err = stack.Start(ctx, config)
	return err
}

// allowFiles lets this process, and the programs that it starts, open n files.
func allowFiles(n uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur >= n {
		return err
	}
	limit.Cur, limit.Max = n, max(limit.Max, n)
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
}

// siege runs one attack beside the traffic of a running pod. It fails the test if a call of the traffic fails or a program
// ends, and returns the pod's calls of the broker.
func siege(t *testing.T, run func(context.Context) string) (calls *record) {
	t.Helper()
	pod, broker := running(t)
	programs := map[string]*stack.Program{"broker": credence.Broker, "webhook": credence.Webhook}
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	calls, endTraffic := traffic(t, pod, broker)
	t.Logf("attack:       %s", run(ctx))
	endTraffic()
	for name, program := range programs {
		if program.Ended() {
			t.Fatalf("the %s ended: %v", name, program.Err())
		}
		if limited {
			peak, err := program.MemoryPeak()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("memory:       %s at most %d MB since its start", name, peak/1e6)
		}
	}
	return calls
}

// record has the duration of each call, and the errors of those that failed.
type record struct {
	took   []time.Duration
	failed []error
}

func (r *record) String() string {
	if len(r.took) == 0 {
		return "none"
	}
	return fmt.Sprintf("%d, %d failed, median %s, p99 %s, longest %s", len(r.took), len(r.failed), r.quantile(0.5), r.quantile(0.99), r.quantile(1))
}

// quantile returns the duration that this fraction of the calls did not exceed.
func (r *record) quantile(fraction float64) time.Duration {
	slices.Sort(r.took)
	return r.took[int(fraction*float64(len(r.took)-1))].Round(100 * time.Microsecond)
}

// traffic calls the broker as the pod's sidecar would, and creates pods, until end. end fails the test for failed calls.
func traffic(t *testing.T, pod *corev1.Pod, broker *client.Client) (calls *record, end func()) {
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	repeat := func(once func(context.Context) error) *record {
		r := new(record)
		running.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				err := once(context.WithoutCancel(ctx)) // only whole calls count
				r.took = append(r.took, time.Since(began))
				if err != nil {
					r.failed = append(r.failed, err)
				}
				time.Sleep(20 * time.Millisecond) // leaves the processors to the attack and the programs
			}
		})
		return r
	}
	calls = repeat(func(ctx context.Context) error {
		_, err := broker.Credentials(ctx)
		return err
	})
	admissions := repeat(func(ctx context.Context) error {
		created, err := credence.Client.CoreV1().Pods(pod.Namespace).Create(ctx, stack.Pod("beside", map[string]string{roleKey: "beside"}),
			metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil && len(created.Spec.InitContainers) == 0 {
			err = errors.New("a pod was not injected")
		}
		return err
	})
	return calls, func() {
		t.Helper()
		stop()
		running.Wait()
		t.Logf("broker calls: %s", calls)
		t.Logf("admissions:   %s", admissions)
		for _, r := range []*record{calls, admissions} {
			if len(r.took) < 3 {
				t.Errorf("the traffic made only %d calls", len(r.took))
			}
			for _, err := range r.failed[:min(len(r.failed), 3)] {
				t.Errorf("a call failed during the attack: %v", err)
			}
		}
	}
}

// running makes a pod with a role, runs its sidecar, and returns a client that calls the broker with its token.
func running(t *testing.T) (*corev1.Pod, *client.Client) {
	t.Helper()
	pod := create(t, namespace(t, ".*"), "app", "cart")
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
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token(t, pod)), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Target: credence.Broker.Address, TLS: brokerTLS(t), TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	return pod, c
}

func namespace(t *testing.T, permitted string) string {
	t.Helper()
	name := strings.Trim(strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name())), "-")
	name = strings.TrimRight(name[:min(len(name), 50)], "-")
	if permitted != ".*" {
		name += "-hog"
	}
	if err := credence.Namespace(t.Context(), name, map[string]string{permittedKey: permitted}); err != nil {
		t.Fatal(err)
	}
	return name
}

func create(t *testing.T, namespace, name, role string) *corev1.Pod {
	t.Helper()
	pod, err := credence.Client.CoreV1().Pods(namespace).Create(t.Context(), stack.Pod(name, map[string]string{roleKey: role}), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func token(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	text, err := credence.Token(t.Context(), pod, stack.Audience, stack.TokenSeconds)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func brokerTLS(t *testing.T) *tls.Config {
	t.Helper()
	roots, err := certs.NewRoots(credence.WriteRoots(t.TempDir()), nil)
	if err != nil {
		t.Fatal(err)
	}
	return certs.ClientConfig(roots, "")
}

// Go's test cache must not keep a result of other sources.
func TestSourcesAreRead(t *testing.T) {
	t.Parallel()
	if n, err := stack.ReadSources(t.Context()); err != nil || n < 50 {
		t.Errorf("%d sources were read: %v", n, err)
	}
}
