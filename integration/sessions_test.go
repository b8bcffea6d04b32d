//go:build unix

package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/kubelettest"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/operator/installation"
)

// operator runs the credence command as its user does.
type operator struct {
	t                   *testing.T
	program, kubeconfig string
	namespace           string   // of Credence
	secrets             []string // that no output may have
}

// newOperator builds the command.
func newOperator(t *testing.T, namespace string) *operator {
	t.Helper()
	file := filepath.Join(t.TempDir(), "credence")
	if err := images.CompileFor(t.Context(), "github.com/credence-iam/credence/cmd/credence", runtime.GOOS, runtime.GOARCH, file); err != nil {
		t.Fatal(err)
	}
	return &operator{t: t, program: file, kubeconfig: control.Kubeconfig(), namespace: namespace}
}

// run runs the command and returns its output and its exit code.
func (o *operator) run(args ...string) (stdout, stderr string, code int) {
	o.t.Helper()
	args = append([]string{"--kubeconfig=" + o.kubeconfig, "--credence-namespace=" + o.namespace}, args...)
	cmd := exec.CommandContext(o.t.Context(), o.program, args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else if err != nil {
		o.t.Fatal(err)
	}
	for _, secret := range o.secrets {
		if strings.Contains(out.String()+errs.String(), secret) {
			o.t.Errorf("%q prints a secret", args)
		}
	}
	return out.String(), errs.String(), code
}

// fields returns the table's rows as fields.
func fields(table string) (rows [][]string) {
	for line := range strings.Lines(table) {
		rows = append(rows, strings.Fields(line))
	}
	return rows
}

// TestSessionsOfAllBrokers shows and drops the sessions of a real broker, beside one of an older version and one that is
// gone, and finds the pods of a key.
func TestSessionsOfAllBrokers(t *testing.T) {
	freePort, err := process.FreePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	debug := net.JoinHostPort("127.0.0.1", strconv.Itoa(freePort))
	restartBroker(t, "--debug-listen="+debug)
	ns := namespace(t, ".*")
	keys, secrets := map[string]string{}, []string{}
	for _, name := range []string{"cart-1", "cart-2", "other-1"} {
		role, _, _ := strings.Cut(name, "-")
		pod := create(t, ns, name, map[string]string{roleKey: "sessions-" + role})
		bearer := token(t, pod)
		lease, err := call(t, bearer)
		if err != nil {
			t.Fatal(err)
		}
		keys[name], secrets = lease.AccessKeyID, append(secrets, bearer, lease.SecretAccessKey.Reveal(), lease.SessionToken.Reveal())
	}
	kubelet := kubelettest.Start(t, credence.Client)
	system := kubetest.Namespace(t, credence.Client, nil, nil)
	posts := make(chan string, 10)
	older := pages(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			posts <- r.URL.Path + " " + r.FormValue("role")
			_, _ = fmt.Fprint(w, `{"sessions":1}`)
			return
		}
		if r.FormValue("pod") != "" {
			http.Error(w, `unknown parameter "pod"; use role`, http.StatusBadRequest)
			return
		}
		_, _ = fmt.Fprintf(w, `{"time":"2026-11-29T00:00:00Z","grants":[{"role":%q,"session_name":"x\u001b[2Jy","pods":3,"failures":2,"reason":"STS_ACCESS_DENIED","message":"no\u0007"}]}`, arn("sessions-cart"))
	})
	kubelet.Run(t, system, brokerPod("credence-broker-1-real"), port(debug))
	kubelet.Run(t, system, brokerPod("credence-broker-1-older"), port(older))
	o := newOperator(t, system)
	o.secrets = secrets
	if _, err := credence.Client.AppsV1().Deployments(system).Create(t.Context(), noReplicas(installation.BrokerName), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}

	await.Until(t, "the broker retains the pods", func() error {
		out, _, _ := o.run("sessions", "-o=json", "--role=sessions-cart")
		if !strings.Contains(out, `"`+ns+`/cart-2"`) {
			return errors.New(out)
		}
		return nil
	})
	out, stderr, code := o.run("sessions", "--role=sessions-cart")
	rows := fields(out)
	if code != 0 || stderr != "" || len(rows) != 3 || strings.Contains(out, "\x1b") || strings.Join(rows[0], " ") != "ROLE SESSION NAMESPACES PODS AGE LEFT RENEWAL BROKER LAST ERROR" ||
		!slices.Equal(rows[1][:4], []string{"sessions-cart", "credence", ns, "2"}) || rows[1][7] != "real" ||
		!slices.Equal(rows[2], []string{"sessions-cart", "x?[2Jy", "-", "3", "-", "-", "-", "older", "STS_ACCESS_DENIED", "(2", "times)"}) {
		t.Errorf("sessions: %d\n%s\n%s", code, out, stderr)
	}
	t.Log("\n" + out)
	if out, _, code := o.run("sessions", "--failing"); code != 1 || len(fields(out)) != 2 {
		t.Errorf("sessions --failing: %d\n%s", code, out)
	}
	out, _, code = o.run("sessions", "--pod=other-1", "-n="+ns, "-o=wide")
	if code != 1 || !strings.Contains(out, arn("sessions-other")) || !strings.Contains(out, keys["other-1"]) || strings.Contains(out, "sessions-cart") || !strings.Contains(out, "broker credence-broker-1-older: the broker is older") {
		t.Errorf("sessions --pod: %d\n%s", code, out)
	}

	kubelet.Run(t, system, brokerPod("credence-broker-1-gone"), kubelettest.Pod{})
	out, _, code = o.run("sessions", "-o=json")
	var shown struct {
		Brokers []struct {
			Name, Error string
			Sessions    int
		}
		Sessions []struct {
			Broker, Role string
			Owner        bool
		}
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil || code != 1 || len(shown.Brokers) != 3 || !strings.Contains(shown.Brokers[0].Error, "connection refused") || shown.Brokers[1].Error != "" || len(shown.Sessions) < 3 {
		t.Errorf("sessions -o json: %d %v\n%s", code, err, out)
	}

	testDrop(t, o, keys, posts)
	testWho(t, o, kubelet, ns, keys)
}

// testDrop drops the sessions of a role.
func testDrop(t *testing.T, o *operator, keys map[string]string, posts <-chan string) {
	t.Helper()
	if out, stderr, code := o.run("sessions", "drop", "--role=sessions-cart"); code != 1 || !strings.Contains(stderr, "use --yes") || out != "" || len(posts) > 0 {
		t.Errorf("sessions drop without a terminal: %d\n%s%s", code, out, stderr)
	}
	out, stderr, code := o.run("sessions", "drop", "--role=sessions-cart", "--yes")
	var got []string
	for len(posts) > 0 {
		got = append(got, <-posts)
	}
	if code != 1 || !strings.Contains(stderr, arn("sessions-cart")+" in 3 brokers") || !slices.Equal(got, []string{"/debug/grants/drop " + arn("sessions-cart")}) {
		t.Errorf("sessions drop: %d\n%s%s%q", code, out, stderr, got)
	}
	for _, want := range []string{"broker credence-broker-1-gone: failed: ", "broker credence-broker-1-older: dropped 1 sessions\n", "broker credence-broker-1-real: dropped 1 sessions\n", "1 of 3 brokers failed; "} {
		if !strings.Contains(out, want) {
			t.Errorf("sessions drop prints\n%s\nand not %q", out, want)
		}
	}
	out, _, _ = o.run("sessions", "--role="+arn("sessions-cart"), "-o=wide")
	if strings.Contains(out, keys["cart-1"]) {
		t.Errorf("the session still exists:\n%s", out)
	}
	if out, _, _ := o.run("sessions", "--role=sessions-other", "-o=wide"); !strings.Contains(out, keys["other-1"]) {
		t.Errorf("the session of another role does not exist:\n%s", out)
	}
}

// testWho finds the pods of keys in the log of the broker, and in files.
func testWho(t *testing.T, o *operator, kubelet *kubelettest.Kubelet, ns string, keys map[string]string) {
	t.Helper()
	logs, err := filepath.Glob(filepath.Join(control.Logs(), "*broker*"))
	if err != nil || len(logs) == 0 {
		t.Fatalf("no log of the broker: %v", err)
	}
	var log strings.Builder
	for _, file := range logs {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		log.Write(text)
	}
	kubelet.Behave(o.namespace, "credence-broker-1-gone", kubelettest.Pod{Previous: log.String()})
	out, _, code := o.run("sessions", "who", keys["cart-1"])
	if code != 1 || !strings.Contains(out, "role "+arn("sessions-cart")+", session credence, expires ") || !strings.Contains(out, "broker credence-broker-1-gone: not read to its end: ") {
		t.Errorf("sessions who: %d\n%s", code, out)
	}
	for _, pod := range []string{"cart-1", "cart-2"} {
		if !slices.ContainsFunc(fields(out), func(row []string) bool { return len(row) == 6 && row[0] == ns && row[1] == pod && row[4] == "1" }) {
			t.Errorf("sessions who prints\n%s\nwithout pod %s", out, pod)
		}
	}
	if strings.Contains(out, "other-1") {
		t.Errorf("sessions who prints a pod with another key:\n%s", out)
	}
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := os.WriteFile(file, []byte(log.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, stderr, code := o.run("sessions", "who", keys["cart-1"], "--files-only", "--audit="+file); code != 0 || !strings.Contains(out, "cart-2") {
		t.Errorf("sessions who --files-only: %d\n%s%s", code, out, stderr)
	}
	if out, _, code := o.run("sessions", "who", "ASIAUNKNOWN00000", "--files-only", "--audit="+file); code != 1 || !strings.Contains(out, "no pod is known") {
		t.Errorf("sessions who of an unknown key: %d\n%s", code, out)
	}
}

// noReplicas returns a Deployment of that name without pods.
func noReplicas(name string) *appsv1.Deployment {
	labels := map[string]string{"none": name}
	return &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.DeploymentSpec{
		Replicas: new(int32(0)), Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: brokerPod("").Spec},
	}}
}
