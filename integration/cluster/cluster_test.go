//go:build unix

package cluster_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/integration/cluster"
)

// ownerVariable makes the test binary the owner of a cluster, in the folder that it names.
const ownerVariable = "CLUSTER_TEST_OWNER"

// shared is the cluster of all tests; nil under -short if it has to be built first.
var shared *cluster.Cluster

func TestMain(m *testing.M) {
	flag.Parse()
	if runs := os.Getenv(ownerVariable); runs != "" {
		own(context.Background(), runs)
	}
	if testing.Short() && len(cluster.Missing(0)) > 0 {
		os.Exit(m.Run())
	}
	os.Exit(cluster.RunTests(cluster.Config{Progress: os.Stderr}, func(_ context.Context, c *cluster.Cluster) error {
		shared = c
		return nil
	}, m.Run))
}

// own starts a cluster and prints its folder.
func own(ctx context.Context, runs string) {
	c, err := cluster.Start(ctx, cluster.Config{Runs: runs})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(c.Run().Dir())
	time.Sleep(time.Hour)
}

func sharedCluster(t *testing.T) *cluster.Cluster {
	t.Helper()
	if shared == nil {
		t.Skipf("-short, and %v are not built (go run ./integration/tools/install)", cluster.Missing(0))
	}
	return shared
}

func client(t *testing.T, config *rest.Config) *kubernetes.Clientset {
	t.Helper()
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// eventually polls. Its limit only ends a failed test.
func eventually(t *testing.T, what string, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for err := condition(); err != nil; err = condition() {
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func pod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app"}}},
	}
}

func TestPinnedKubernetesRuns(t *testing.T) {
	c := sharedCluster(t)
	version, err := client(t, c.Config()).Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	if version.GitVersion != "v1.37.2" || version.Major != "1" || version.Minor != "37" {
		t.Errorf("the API server has version %v", version)
	}
}

// TestUsersHaveTheRightsOfRBAC guards the tests of rights: with all rights they would pass.
func TestUsersHaveTheRightsOfRBAC(t *testing.T) {
	c := sharedCluster(t)
	list := func(user string, groups ...string) error {
		config, err := c.User(user, groups...)
		if err != nil {
			t.Fatal(err)
		}
		_, err = client(t, config).CoreV1().Pods(metav1.NamespaceDefault).List(t.Context(), metav1.ListOptions{})
		return err
	}
	if err := list("jane"); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `User "jane"`) {
		t.Errorf("a user without rights: got %v, want forbidden", err)
	}
	if err := list("jane", "system:masters"); err != nil {
		t.Errorf("a user of system:masters: %v", err)
	}
	config, err := c.ServiceAccount(t.Context(), metav1.NamespaceDefault, "default")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, config).CoreV1().Pods("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a ServiceAccount without rights: got %v, want forbidden", err)
	}
}

// TestAPIServerStopsAndStarts guards the tests of outages.
func TestAPIServerStopsAndStarts(t *testing.T) {
	c := sharedCluster(t)
	api := client(t, c.Config())
	if _, err := api.CoreV1().Pods(metav1.NamespaceDefault).Create(t.Context(), pod("lasting"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.StopAPIServer()
	c.StopAPIServer()
	if _, err := api.Discovery().ServerVersion(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the stopped API server: got %v, want connection refused", err)
	}
	for range 2 { // the second call does nothing
		if err := c.StartAPIServer(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := api.CoreV1().Pods(metav1.NamespaceDefault).Get(t.Context(), "lasting", metav1.GetOptions{}); err != nil {
		t.Errorf("the data is lost: %v", err)
	}
	// The controller manager continues.
	if _, err := api.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "after"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new namespace has its ServiceAccount", func() error {
		_, err := api.CoreV1().ServiceAccounts("after").Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
}

// TestNothingIsLeftOfAKilledOwner also shows that two clusters run side by side.
func TestNothingIsLeftOfAKilledOwner(t *testing.T) {
	c := sharedCluster(t)
	if runtime.GOOS != "linux" {
		t.Skip("the test needs /proc")
	}
	runs := t.TempDir()
	owner := exec.CommandContext(t.Context(), os.Args[0])
	owner.Env = append(os.Environ(), ownerVariable+"="+runs)
	owner.Stderr = os.Stderr
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	dir := strings.TrimSpace(line)
	if running := processesOf(t, dir); len(running) != 3 {
		t.Fatalf("the owner's cluster runs %v, want 3 programs", running)
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait() // it was killed

	second, err := cluster.Start(t.Context(), cluster.Config{Runs: runs})
	if err != nil {
		t.Fatal(err)
	}
	if left := processesOf(t, dir); len(left) > 0 {
		t.Errorf("the first cluster left %v", left)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the first cluster left its folder: %v", err)
	}
	for _, running := range []*cluster.Cluster{c, second} {
		if _, err := client(t, running.Config()).Discovery().ServerVersion(); err != nil {
			t.Error(err)
		}
	}

	for range 2 {
		if err := second.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	if left := processesOf(t, runs); len(left) > 0 {
		t.Errorf("Stop left %v", left)
	}
	if _, err := os.Stat(second.Run().Dir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Stop left the folder: %v", err)
	}
}

// processesOf returns the programs whose working folder is in dir, as that of all components.
func processesOf(t *testing.T, dir string) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, link := range links {
		cwd, err := os.Readlink(link)
		if err != nil || !strings.HasPrefix(cwd, dir) {
			continue // it has exited, or is another one
		}
		name, err := os.ReadFile(filepath.Join(filepath.Dir(link), "comm"))
		if err != nil {
			continue
		}
		found = append(found, strings.TrimSpace(string(name)))
	}
	return found
}

func TestWrongIPFamiliesAreRefused(t *testing.T) {
	for _, families := range [][]corev1.IPFamily{{"IPv5"}, {corev1.IPv4Protocol, corev1.IPv4Protocol}} {
		c, err := cluster.Start(t.Context(), cluster.Config{Runs: t.TempDir(), IPFamilies: families})
		if err == nil {
			t.Errorf("a cluster started with the IP families %v: %v", families, c.Stop())
		} else if !strings.Contains(err.Error(), fmt.Sprint(families)) {
			t.Errorf("the IP families %v: got %v, want an error that names them", families, err)
		}
	}
}
