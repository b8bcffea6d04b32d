//go:build unix

// Package admission installs the chart on a real API server and tests the effects. The API server accepts each object,
// and Credence's own pods pass its strictest checks. The admission policies stop all attempts to bypass them, and do
// not affect other pods. The webhook does not run here, because the policies must hold without it.
package admission

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/tools"
)

// All tests share one control plane.
var (
	control *cluster.Cluster
	client  kubernetes.Interface // has all rights
	objects dynamic.Interface    // has all rights
	node    kubernetes.Interface // acts as a node's kubelet
)

const nodeName = "node-1"

func TestMain(m *testing.M) {
	os.Exit(cluster.RunTests(cluster.Config{Progress: os.Stderr}, setUp, m.Run, tools.Helm))
}

func setUp(ctx context.Context, c *cluster.Cluster) (err error) {
	control = c
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
	// No pod runs on this node, but it needs free resources for a resize.
	room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("4Gi")}
	machine := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}, Status: corev1.NodeStatus{Capacity: room, Allocatable: room}}
	if _, err := client.CoreV1().Nodes().Create(ctx, machine, metav1.CreateOptions{}); err != nil {
		return err
	}
	return installCertManagerTypes(ctx)
}

// installCertManagerTypes installs the definitions of cert-manager's objects, as its release does, so that the API server
// validates them.
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
		return fmt.Errorf("cert-manager's module has %d definitions in deploy/crds, want at least 4", len(files))
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
		if err := await.Poll(ctx, func() error {
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

// config runs Helm on the cluster.
func config() chart.Config { return chart.Config{Kubeconfig: control.Kubeconfig()} }

// since reports whether the API server's minor version is at least the first one that has a feature, and logs if a test
// leaves it out.
func since(t *testing.T, first int, feature string) bool {
	t.Helper()
	minor, err := control.Minor()
	if err != nil {
		t.Fatal(err)
	}
	if minor < first {
		t.Logf("without %s, which Kubernetes 1.%d lacks", feature, minor)
	}
	return minor >= first
}
