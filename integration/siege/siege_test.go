//go:build unix

// Package siege_test attacks a broker and a webhook as programs, with the memory of the chart's limits, on a real control
// plane, while a running pod calls the broker and pods are created. Each attack is one that took a program down, or
// kept others waiting, when it was first tried.
package siege_test

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
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
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/siege/attack"
	"github.com/credence-iam/credence/integration/stack"
)

// variable names how long each attack lasts, as time.ParseDuration reads it. Default: short.
const variable = "CREDENCE_SIEGE"

// short is as long as an attack lasts in a usual test run.
const short = 3 * time.Second

// files is how many files this process and the programs may have open: the largest attack has 8,000 connections.
const files = 20_000

const (
	roleKey      = "iam.amazonaws.com/role"
	permittedKey = "iam.amazonaws.com/permitted"
)

// attackers are the addresses that attacks come from. Everything else comes from 127.0.0.1.
var attackers = []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"}

var (
	credence *stack.Stack
	limited  bool // the programs have the chart's memory limits
)

func TestMain(m *testing.M) {
	if attack.Main() {
		return
	}
	flag.Parse()
	if missing := cluster.Missing(0); testing.Short() && len(missing) > 0 {
		fmt.Printf("SKIP: -short, and %v would have to be built first (go run ./integration/tools/install)\n", missing)
		return
	}
	if stack.Race {
		fmt.Println("SKIP: programs with the race detector need many times the memory that is the limit here")
		return
	}
	ctx := context.Background()
	var failed error
	code := cluster.RunTests(ctx, cluster.Config{Progress: os.Stderr}, func(c *cluster.Cluster) {
		failed = setUp(ctx, c)
	}, func() int {
		if failed != nil {
			fmt.Fprintln(os.Stderr, "setting up:", failed)
			return 1
		}
		defer credence.Close()
		return m.Run()
	})
	os.Exit(code)
}

func setUp(ctx context.Context, c *cluster.Cluster) error {
	if err := allowFiles(files); err != nil {
		return err
	}
	config := stack.Config{Cluster: c, Progress: os.Stderr}
	if err := process.CgroupsPossible(); err != nil {
		fmt.Println("the programs' memory is not limited, and only read at the end:", err)
	} else {
		limited = true
		if config.BrokerMemory, config.WebhookMemory, err = chartLimits(); err != nil {
			return err
		}
	}
	var err error
	credence, err = stack.Start(ctx, config)
	return err
}

// chartLimits returns the memory limits of the broker and the webhook in the chart, in bytes.
func chartLimits() (broker, webhook int64, err error) {
	text, err := os.ReadFile(filepath.Join("..", "..", "charts", "credence", "values.yaml"))
	if err != nil {
		return 0, 0, err
	}
	type component struct {
		Resources corev1.ResourceRequirements `json:"resources"`
	}
	var values struct {
		Broker  component `json:"broker"`
		Webhook component `json:"webhook"`
	}
	if err := yaml.Unmarshal(text, &values); err != nil {
		return 0, 0, err
	}
	for _, limit := range []struct {
		of component
		to *int64
	}{{values.Broker, &broker}, {values.Webhook, &webhook}} {
		quantity, ok := limit.of.Resources.Limits[corev1.ResourceMemory]
		if !ok || quantity.Cmp(resource.Quantity{}) <= 0 {
			return 0, 0, errors.New("the chart has no memory limit for the broker or the webhook")
		}
		*limit.to = quantity.Value()
	}
	return broker, webhook, nil
}

// allowFiles lets this process, and the programs that it starts, open that many files.
func allowFiles(n uint64) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading how many files may be open: %w", err)
	}
	if limit.Cur >= n {
		return nil
	}
	limit.Cur, limit.Max = n, max(limit.Max, n)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("%d files must be open at once, and the limit cannot be raised: %w", n, err)
	}
	return nil
}

// length is how long each attack lasts.
func length(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return short
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return d
}

// traffic is the ordinary load during an attack: a running pod calls the broker as its sidecar would, and pods are created.
type traffic struct {
	stop context.CancelFunc
	done sync.WaitGroup

	calls, admissions record
}

// record has how long each of some calls took, and why those failed that did.
type record struct {
	took   []time.Duration
	failed []error
}

func (r *record) add(began time.Time, err error) {
	r.took = append(r.took, time.Since(began))
	if err != nil {
		r.failed = append(r.failed, err)
	}
}

func (r *record) String() string {
	if len(r.took) == 0 {
		return "none"
	}
	return fmt.Sprintf("%d, %d failed, median %s, p99 %s, longest %s", len(r.took), len(r.failed), r.quantile(0.5), r.quantile(0.99), r.quantile(1))
}

// quantile returns the time that this part of the calls did not exceed.
func (r *record) quantile(part float64) time.Duration {
	slices.Sort(r.took)
	return r.took[int(part*float64(len(r.took)-1))].Round(100 * time.Microsecond)
}

// pause between two calls of the traffic, which leaves the processors to the attack and the programs.
const pause = 20 * time.Millisecond

// start starts the traffic of a pod.
func start(ctx context.Context, pod *corev1.Pod, broker *client.Client) *traffic {
	ctx, cancel := context.WithCancel(ctx)
	t := &traffic{stop: cancel}
	repeat := func(r *record, once func(context.Context) error) {
		t.done.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				// What has begun is let finish: only whole calls count.
				r.add(began, once(context.WithoutCancel(ctx)))
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
	}
	repeat(&t.calls, func(ctx context.Context) error {
		_, err := broker.Credentials(ctx)
		return err
	})
	repeat(&t.admissions, func(ctx context.Context) error {
		created, err := credence.Client.CoreV1().Pods(pod.Namespace).Create(ctx, stack.Pod("beside", map[string]string{roleKey: "beside"}),
			metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil && len(created.Spec.InitContainers) == 0 {
			err = errors.New("a pod was not injected")
		}
		return err
	})
	return t
}

// end ends the traffic and fails the test for each call that failed.
func (t *traffic) end(tb testing.TB) {
	tb.Helper()
	t.stop()
	t.done.Wait()
	tb.Logf("broker calls: %s", &t.calls)
	tb.Logf("admissions:   %s", &t.admissions)
	for _, r := range []*record{&t.calls, &t.admissions} {
		if len(r.took) < 3 {
			tb.Errorf("only %d calls were made", len(r.took))
		}
		for _, err := range r.failed[:min(len(r.failed), 3)] {
			tb.Errorf("failed beside the attack: %v", err)
		}
	}
}

// running makes a pod with a role, runs its sidecar, and returns it with a client that calls the broker as it.
func running(t *testing.T) (*corev1.Pod, *client.Client) {
	t.Helper()
	ns := namespace(t, ".*")
	pod := create(t, ns, "app", "cart")
	sidecar, err := credence.RunSidecar(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		sidecar.Stop(10 * time.Second)
		if err := sidecar.Err(); err != nil {
			t.Errorf("the sidecar did not end well: %v", err)
		}
	})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token(t, pod)), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Target: credence.BrokerAddress(), TLS: brokerTLS(t), TokenFile: file})
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

// A result that Go's test cache holds is of the programs as they are.
func TestSourcesAreRead(t *testing.T) {
	t.Parallel()
	if n, err := stack.ReadSources(t.Context()); err != nil || n < 50 {
		t.Errorf("%d sources were read: %v", n, err)
	}
}

// siege runs one attack beside traffic, and fails the test if a call of the traffic fails or a program ends. It returns the
// traffic's calls of the broker.
func siege(t *testing.T, run func(context.Context) string) (calls *record) {
	t.Helper()
	pod, broker := running(t)
	programs := map[string]*process.Process{"broker": credence.Broker(), "webhook": credence.Webhook()}
	beside := start(t.Context(), pod, broker)
	ctx, cancel := context.WithTimeout(t.Context(), length(t))
	defer cancel()
	t.Logf("attack:       %s", run(ctx))
	beside.end(t)
	for name, program := range programs {
		if program.Ended() {
			t.Fatalf("the %s ended: %v", name, program.Err())
		}
	}
	if limited {
		for name, peak := range map[string]func() (int64, error){"broker": credence.BrokerMemoryPeak, "webhook": credence.WebhookMemoryPeak} {
			bytes, err := peak()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("memory:       %s %d MB at most since its start", name, bytes/1e6)
		}
	}
	return &beside.calls
}

// restartBroker starts the broker again with more flags.
func restartBroker(t *testing.T, flags ...string) {
	t.Helper()
	credence.StopBroker()
	// Not the test's context, which has ended when this is deferred.
	if err := credence.StartBroker(context.WithoutCancel(t.Context()), flags...); err != nil {
		t.Fatal(err)
	}
}
