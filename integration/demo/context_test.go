//go:build unix

package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// TestOwnCluster runs the demo on a cluster that it did not make, through a kubeconfig file with two contexts. The current
// one leads nowhere.
func TestOwnCluster(t *testing.T) {
	if missing := append(cluster.Missing(0), notBuilt([]tools.Tool{tools.Kubectl})...); testing.Short() && len(missing) > 0 {
		t.Skipf("-short, and %v are not built (go run ./integration/tools/install)", missing)
	}
	c, err := cluster.Start(t.Context(), cluster.Config{Runs: t.TempDir(), Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	}()
	kubectl, err := tools.Path(t.Context(), tools.Kubectl, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	files, err := clientcmd.LoadFromFile(c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	files.Contexts["mine"] = files.Contexts[files.CurrentContext]
	delete(files.Contexts, files.CurrentContext)
	files.CurrentContext = "nowhere"
	files.Contexts["nowhere"] = files.Contexts["mine"].DeepCopy()
	files.Contexts["nowhere"].Cluster = "nowhere"
	files.Clusters["nowhere"] = files.Clusters[files.Contexts["mine"].Cluster].DeepCopy()
	files.Clusters["nowhere"].Server = "https://127.0.0.1:1"
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*files, file); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", file)
	t.Setenv("PATH", filepath.Dir(kubectl)+":"+os.Getenv("PATH"))
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		t.Fatal(err)
	}
	// run runs a demo, and returns its output. Afterwards the cluster must not have its namespace.
	run := func(ctx context.Context, d *demo, out *watcher, name, input string) (string, error) {
		t.Helper()
		d.printer = &printer{out: out}
		p, err := onContext(ctx, d, name, strings.NewReader(input))
		if err == nil {
			err = d.run(ctx, p)
		}
		if names := left(t, client); len(names) > 0 {
			t.Errorf("the demo left %q", names)
		}
		return out.shown.String(), err
	}
	refused := func(what string, d *demo, name, input string, wants ...string) {
		t.Helper()
		out, err := run(t.Context(), d, &watcher{}, name, input)
		for _, want := range wants {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want an error with %q", what, err, want)
			}
		}
		if strings.Contains(out, "create namespace") {
			t.Errorf("%s: the demo made a namespace:\n%s", what, out)
		}
	}
	refused("wrong name", &demo{}, "prod", "yes\n", `no context "prod"`, `["mine" "nowhere"]`)
	refused("unreachable", &demo{}, "nowhere", "yes\n", "https://127.0.0.1:1 of context nowhere")
	refused("no answer", &demo{}, "mine", "", "not confirmed", "CONFIRM=yes")
	refused("another answer", &demo{}, "mine", "y\n", "not confirmed")
	refused("a role's name", &demo{role: "reports"}, "mine", "yes\n", "not an ARN", stack.RoleARN("reports"))
	refused("no Credence", &demo{}, "mine", "yes\n", "no Credence in the cluster of context mine", "docs/install.md")

	credence, err := stack.Start(t.Context(), stack.Config{Cluster: c, Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer credence.Close()
	const role = "arn:aws:iam::210987654321:role/cart"
	t.Setenv("CONFIRM", "yes")
	out, err := run(t.Context(), &demo{role: role}, &watcher{}, "mine", "")
	if err != nil {
		t.Errorf("the demo failed: %v", err)
	}
	for _, want := range []string{
		"context  mine", c.Config().Host, "$ kubectl create namespace credence-demo-", "permitted=" + role + " --context=mine\n",
		"CREDENCE_BROKER\n", "does not permit role arn:aws:iam::210987654321:role/admin", "did you mean", "is removed",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the demo did not show %q", want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out2, err := run(ctx, &demo{}, &watcher{text: "The output has what the webhook added", seen: cancel}, "mine", "")
	if err == nil || !strings.Contains(err.Error(), "interrupted") || !strings.Contains(out2, "create namespace") {
		t.Errorf("the interrupted demo ended with %v:\n%s", err, out2)
	}
	if t.Failed() {
		t.Logf("the demo showed:\n%s", out)
	}
}

// left returns the namespaces of demos.
func left(t *testing.T, client kubernetes.Interface) (names []string) {
	t.Helper()
	list, err := client.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range list.Items {
		if strings.HasPrefix(ns.Name, "credence-demo") {
			names = append(names, ns.Name)
		}
	}
	return names
}
