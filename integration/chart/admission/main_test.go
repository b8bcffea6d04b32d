//go:build unix

// Package admission tests what a real API server makes of the installed chart: that it takes every object, that
// our own pods pass its strictest checks, and that the admission policies hold against whoever tries to get
// around them while everybody else goes on as before. The webhook itself does not run here: what must hold
// without it is what is tested.
package admission

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

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/tools"
)

// What all tests share.
var (
	control *cluster.Cluster
	client  kubernetes.Interface // with all rights
	objects dynamic.Interface    // the same
	node    kubernetes.Interface // a node's kubelet
)

const nodeName = "node-1"

func TestMain(m *testing.M) {
	flag.Parse()
	missing := cluster.Missing(0)
	if !tools.Built(tools.Helm) {
		missing = append(missing, tools.Helm)
	}
	if testing.Short() && len(missing) > 0 {
		fmt.Printf("SKIP: -short, and %v would have to be built first (go run ./integration/tools/install)\n", missing)
		return
	}
	ctx := context.Background()
	var failed error
	code := cluster.RunTests(ctx, cluster.Config{Progress: os.Stderr}, func(c *cluster.Cluster) {
		control = c
		failed = setUp(ctx)
	}, func() int {
		if failed != nil {
			fmt.Fprintln(os.Stderr, "setting up:", failed)
			return 1
		}
		return m.Run()
	})
	os.Exit(code)
}

func setUp(ctx context.Context) (err error) {
	config := control.Config()
	config.WarningHandler = rest.NoWarnings{}
	if client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if objects, err = dynamic.NewForConfig(config); err != nil {
		return err
	}
	kubelet, err := control.User("system:node:"+nodeName, "system:nodes")
	if err != nil {
		return err
	}
	if node, err = kubernetes.NewForConfig(kubelet); err != nil {
		return err
	}
	// Nothing runs on it, but a pod is resized only where there is room.
	room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("4Gi")}
	machine := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}, Status: corev1.NodeStatus{Capacity: room, Allocatable: room}}
	if _, err := client.CoreV1().Nodes().Create(ctx, machine, metav1.CreateOptions{}); err != nil {
		return err
	}
	return installCertManagerTypes(ctx)
}

// installCertManagerTypes makes the API server know cert-manager's objects, and check them, as its release does.
func installCertManagerTypes(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/cert-manager/cert-manager").Output()
	if err != nil {
		return fmt.Errorf("finding cert-manager's module: %w", err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "deploy", "crds", "cert-manager.io_*.yaml"))
	if err != nil {
		return err
	}
	if len(files) < 4 {
		return fmt.Errorf("cert-manager's module has %d definitions in deploy/crds, want those of Issuers, Certificates and more", len(files))
	}
	definitions := objects.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var definition unstructured.Unstructured
		if err := yaml.Unmarshal(text, &definition.Object); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if _, err := definitions.Create(ctx, &definition, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if err := poll(ctx, func() error {
			stored, err := definitions.Get(ctx, definition.GetName(), metav1.GetOptions{})
			if err != nil {
				return err
			}
			conditions, _, _ := unstructured.NestedSlice(stored.Object, "status", "conditions")
			for _, condition := range conditions {
				if c, ok := condition.(map[string]any); ok && c["type"] == "Established" && c["status"] == "True" {
					return nil
				}
			}
			return errors.New("it is not established")
		}); err != nil {
			return fmt.Errorf("%s: %w", definition.GetName(), err)
		}
	}
	return nil
}

// patience bounds what takes an API server well under a second; the machine may be busy.
const patience = time.Minute

// poll calls done until it returns nil.
func poll(ctx context.Context, done func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := done()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited for %v, and still: %w", patience, err)
		case <-ticker.C:
		}
	}
}

// config is how Helm is run on the cluster.
func config() chart.Config { return chart.Config{Kubeconfig: control.Kubeconfig()} }
