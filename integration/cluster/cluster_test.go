//go:build unix

package cluster_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/tools"
)

// ownerVariable makes the test binary the owner of a cluster in the folder that it names.
const ownerVariable = "CLUSTER_TEST_OWNER"

// shared is the cluster of all tests; nil where it would have to be built first and -short is set.
var shared *cluster.Cluster

func TestMain(m *testing.M) {
	flag.Parse()
	ctx := context.Background()
	if runs := os.Getenv(ownerVariable); runs != "" {
		own(ctx, runs)
	}
	if testing.Short() && len(cluster.Missing(0)) > 0 {
		os.Exit(m.Run())
	}
	os.Exit(cluster.RunTests(ctx, cluster.Config{Progress: os.Stderr}, func(c *cluster.Cluster) { shared = c }, m.Run))
}

// own starts a cluster, names its folder, and waits to be killed.
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

// eventually polls. Its bound only keeps a failed test from hanging.
func eventually(t *testing.T, what string, condition func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for err := condition(); err != nil; err = condition() {
		if time.Now().After(deadline) {
			t.Fatalf("still not so: %s: %v", what, err)
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

func TestItIsThePinnedKubernetes(t *testing.T) {
	c := sharedCluster(t)
	version, err := client(t, c.Config()).Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	if version.GitVersion != "v1.37.2" || version.Major != "1" || version.Minor != "37" {
		t.Errorf("the API server calls itself %v", version)
	}
}

func TestPodsCanBeMadeAtOnce(t *testing.T) {
	c := sharedCluster(t)
	made, err := client(t, c.Config()).CoreV1().Pods(metav1.NamespaceDefault).
		Create(t.Context(), pod("at-once"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(made.Spec.Volumes) != 1 || made.Spec.ServiceAccountName != "default" {
		t.Errorf("ServiceAccount admission has not seen the pod: %+v", made.Spec)
	}
}

func TestTokensAreThoseOfMostClusters(t *testing.T) {
	c := sharedCluster(t)
	config, err := c.ServiceAccount(t.Context(), metav1.NamespaceDefault, "default")
	if err != nil {
		t.Fatal(err)
	}
	var header struct{ Alg string }
	var claims struct{ Iss, Sub string }
	parts := strings.Split(config.BearerToken, ".")
	for i, into := range []any{&header, &claims} {
		raw, err := base64.RawURLEncoding.DecodeString(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(raw, into); err != nil {
			t.Fatal(err)
		}
	}
	if header.Alg != "RS256" || claims.Iss != cluster.Issuer || claims.Sub != "system:serviceaccount:default:default" {
		t.Errorf("got algorithm %s, issuer %s, subject %s", header.Alg, claims.Iss, claims.Sub)
	}

	// RBAC's defaults: the discovery document is for ServiceAccounts, and not for everybody.
	discovery := func(config *rest.Config) ([]byte, error) {
		return client(t, config).CoreV1().RESTClient().Get().AbsPath("/.well-known/openid-configuration").DoRaw(t.Context())
	}
	if _, err := discovery(rest.AnonymousClientConfig(c.Config())); !apierrors.IsForbidden(err) {
		t.Errorf("discovery by anonymous: got %v, want forbidden", err)
	}
	raw, err := discovery(config)
	if err != nil {
		t.Fatal(err)
	}
	var document struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(raw, &document); err != nil {
		t.Fatal(err)
	}
	if document.Issuer != cluster.Issuer || document.Keys != c.Config().Host+"/openid/v1/jwks" {
		t.Errorf("got discovery document %s", raw)
	}
}

func TestUsersHaveTheRightsThatRBACGives(t *testing.T) {
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
		t.Errorf("a user of an almighty group: %v", err)
	}
	config, err := c.ServiceAccount(t.Context(), metav1.NamespaceDefault, "default")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, config).CoreV1().Pods("").List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a ServiceAccount without rights: got %v, want forbidden", err)
	}
}

func TestWebhooksAreCalledByURL(t *testing.T) {
	c := sharedCluster(t)
	hook := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review struct{ Request struct{ UID string } }
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			t.Error(err)
		}
		_, _ = fmt.Fprintf(w, `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview",`+
			`"response":{"uid":%q,"allowed":false,"status":{"message":"not today"}}}`, review.Request.UID)
	}))
	t.Cleanup(hook.Close)
	hooks := client(t, c.Config()).AdmissionregistrationV1().ValidatingWebhookConfigurations()
	none := admissionregistrationv1.SideEffectClassNone
	config := &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "refuse"},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{
			Name: "refuse.example.com",
			ClientConfig: admissionregistrationv1.WebhookClientConfig{
				URL:      &hook.URL,
				CABundle: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: hook.Certificate().Raw}),
			},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}},
			}},
			NamespaceSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: metav1.NamespaceDefault}},
			SideEffects:             &none,
			AdmissionReviewVersions: []string{"v1"},
		}},
	}
	if _, err := hooks.Create(t.Context(), config, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// t.Context has ended here.
		if err := hooks.Delete(context.Background(), config.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	eventually(t, "the webhook refuses", func() error { // the API server learns of it by watching
		_, err := client(t, c.Config()).CoreV1().ConfigMaps(metav1.NamespaceDefault).Create(t.Context(),
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "refused-"}}, metav1.CreateOptions{})
		if err == nil || !strings.Contains(err.Error(), "not today") {
			return fmt.Errorf("got %w", errors.Join(err, errors.New("want not today")))
		}
		return nil
	})
}

func TestAPIServerGoesAndComesBack(t *testing.T) {
	c := sharedCluster(t)
	api := client(t, c.Config())
	if _, err := api.CoreV1().Pods(metav1.NamespaceDefault).Create(t.Context(), pod("lasting"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.StopAPIServer()
	c.StopAPIServer()
	if _, err := api.Discovery().ServerVersion(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("while it is stopped: got %v, want connection refused", err)
	}
	for range 2 { // the second has nothing to do
		if err := c.StartAPIServer(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := api.CoreV1().Pods(metav1.NamespaceDefault).Get(t.Context(), "lasting", metav1.GetOptions{}); err != nil {
		t.Errorf("the data did not last: %v", err)
	}
	// The controller manager lived through it.
	if _, err := api.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "after"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new namespace gets its ServiceAccount", func() error {
		_, err := api.CoreV1().ServiceAccounts("after").Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
}

func TestKubeconfigIsForKubectl(t *testing.T) {
	c := sharedCluster(t)
	kubectl, err := tools.Path(t.Context(), tools.Kubectl, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	output, err := exec.CommandContext(t.Context(), kubectl, "--kubeconfig", c.Kubeconfig(), "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}").CombinedOutput()
	if err != nil || string(output) != "admin" {
		t.Errorf("kubectl auth whoami: %v: %s", err, output)
	}
}

func TestConfigIsACopy(t *testing.T) {
	c := sharedCluster(t)
	c.Config().Host = "changed"
	if c.Config().Host == "changed" {
		t.Error("a caller can change the configuration of all")
	}
}

func TestFailureNamesTheLogAndKeepsIt(t *testing.T) {
	sharedCluster(t)
	runs := t.TempDir()
	_, err := cluster.Start(t.Context(), cluster.Config{Runs: runs, APIServerFlags: []string{"--no-such-flag"}})
	logs, globErr := filepath.Glob(filepath.Join(runs, "*", "logs", "kube-apiserver.log"))
	if globErr != nil || len(logs) != 1 {
		t.Fatalf("kept logs: %v, %v", logs, globErr)
	}
	if err == nil || !strings.Contains(err.Error(), logs[0]) || !strings.Contains(err.Error(), "unknown flag: --no-such-flag") {
		t.Errorf("the error does not name %s and show its end: %v", logs[0], err)
	}
	if left := processesOf(t, runs); len(left) > 0 {
		t.Errorf("a failed start left %v", left)
	}
}

func TestALostPortIsTriedAgain(t *testing.T) {
	sharedCluster(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	runs := t.TempDir()
	// The last of two equal flags wins, so each try loses again.
	port := strconv.Itoa(taken.Addr().(*net.TCPAddr).Port)
	_, err = cluster.Start(t.Context(), cluster.Config{Runs: runs, APIServerFlags: []string{"--secure-port=" + port}})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want EADDRINUSE", err)
	}
	tries, err := filepath.Glob(filepath.Join(runs, "cluster-*"))
	if err != nil || len(tries) != 3 {
		t.Errorf("tries: %v, %v, want 3", tries, err)
	}
}

// TestNothingIsLeftOfAKilledOwner also shows that two clusters run side by side: the shared one runs on.
func TestNothingIsLeftOfAKilledOwner(t *testing.T) {
	c := sharedCluster(t)
	if runtime.GOOS != "linux" {
		t.Skip("looks for processes in /proc")
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

// processesOf returns the programs whose working folder is in dir, as all components' is.
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
			continue // gone, or somebody else's
		}
		name, err := os.ReadFile(filepath.Join(filepath.Dir(link), "comm"))
		if err != nil {
			continue
		}
		found = append(found, strings.TrimSpace(string(name)))
	}
	return found
}
