//go:build unix

// Package chart runs the real Helm on our chart: it renders the chart as an installation would, and decodes what
// comes out into the types of Kubernetes and cert-manager, with every field that they do not know an error. It
// needs no cluster for that, and never touches one that it was not given.
//
// Helm is the program of package tools, not a library: it brings more modules than all else here together, and
// none of our programs need it.
package chart

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/credence-iam/credence/integration/tools"
)

const (
	// Namespace is where the chart is installed, unless another one is asked for.
	Namespace = "credence"
	// Release is the name of the release. No name of an object depends on it.
	Release = "credence"
)

// Config configures how Helm is run.
type Config struct {
	// Helm is the program. Default: that of package tools, which is built if need be.
	Helm string
	// Kubeconfig is the file by which Helm finds a cluster. Default: none, and Helm finds no cluster.
	Kubeconfig string
	// Namespace is the namespace of the release. Default [Namespace].
	Namespace string
	// ValueFiles are files of values, later ones over earlier ones.
	ValueFiles []string
	// Set has single values, as KEY=VALUE, over those of the files.
	Set []string
}

// Render returns the objects of an installation, as text. Its error is Helm's own, as a user would see it.
func Render(ctx context.Context, cfg Config) ([]byte, error) {
	return cfg.render(ctx, "template")
}

// Notes returns what Helm tells the user after an installation.
func Notes(ctx context.Context, cfg Config) (string, error) {
	out, err := cfg.render(ctx, "install", "--dry-run=client")
	if err != nil {
		return "", err
	}
	_, notes, ok := strings.Cut(string(out), "\nNOTES:\n")
	if !ok {
		return "", errors.New("helm install has shown no notes")
	}
	return notes, nil
}

// Install installs the chart, or upgrades what is installed, in the cluster of cfg.Kubeconfig, and returns without
// waiting for pods.
func Install(ctx context.Context, cfg Config) error {
	_, err := cfg.render(ctx, "upgrade", "--install", "--create-namespace")
	return err
}

// render runs a command of Helm on copies of the chart and of the files of values. What a test binary reads itself,
// Go's test cache knows it to depend on; what a program reads that it runs, it does not, and would go on showing
// the result of an earlier chart.
func (cfg Config) render(ctx context.Context, args ...string) (_ []byte, err error) {
	chart, err := folder()
	if err != nil {
		return nil, err
	}
	copies, err := os.MkdirTemp("", "credence-chart-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for the chart: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(copies)) }()
	copied := filepath.Join(copies, "chart")
	if err := os.CopyFS(copied, os.DirFS(chart)); err != nil {
		return nil, fmt.Errorf("copying the chart: %w", err)
	}
	args = append(args, Release, copied)
	for n, file := range cfg.ValueFiles {
		values, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("reading values: %w", err)
		}
		file = filepath.Join(copies, fmt.Sprintf("values-%d.yaml", n))
		if err := os.WriteFile(file, values, 0o600); err != nil {
			return nil, fmt.Errorf("copying values: %w", err)
		}
		args = append(args, "--values", file)
	}
	for _, set := range cfg.Set {
		args = append(args, "--set", set)
	}
	return Helm(ctx, cfg, args...)
}

// folder returns charts/credence of the checkout that the caller runs in, at most three folders below its root.
func folder() (string, error) {
	for _, root := range []string{".", "..", "../..", "../../.."} {
		chart := filepath.Join(root, "charts", "credence")
		if _, err := os.Stat(filepath.Join(chart, "Chart.yaml")); err == nil {
			return chart, nil
		}
	}
	return "", errors.New("finding charts/credence: it is not in this folder, nor in one of the three above")
}

// Helm runs Helm in the release's namespace and returns its output. A user's own plugins, repositories and
// clusters change nothing.
func Helm(ctx context.Context, cfg Config, args ...string) ([]byte, error) {
	program := cfg.Helm
	if program == "" {
		var err error
		if program, err = tools.Path(ctx, tools.Helm, os.Stderr); err != nil {
			return nil, err
		}
	}
	home, err := os.MkdirTemp("", "credence-helm-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for Helm: %w", err)
	}
	defer func() { _ = os.RemoveAll(home) }()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, program, append(args, "--namespace", cmp.Or(cfg.Namespace, Namespace))...) //nolint:gosec // our own program and arguments
	cmd.Env = []string{
		"HOME=" + home, "HELM_CACHE_HOME=" + home, "HELM_CONFIG_HOME=" + home, "HELM_DATA_HOME=" + home,
		"KUBECONFIG=" + cmp.Or(cfg.Kubeconfig, os.DevNull),
	}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("helm %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// ServiceMonitor is as much as the chart uses of the Prometheus Operator's type of that name. Its module would
// bring in as much again as Kubernetes' own.
type ServiceMonitor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Selector  metav1.LabelSelector `json:"selector"`
		Endpoints []struct {
			Port     string `json:"port"`
			Interval string `json:"interval"`
		} `json:"endpoints"`
	} `json:"spec"`
}

// DeepCopyObject implements runtime.Object for those who do not change what they decoded.
func (m *ServiceMonitor) DeepCopyObject() runtime.Object { c := *m; return &c }

// Decode returns the objects of a rendered chart, in their order, each of its Go type. A field that the type
// does not have is an error, and so is one that is there twice.
func Decode(rendered []byte) ([]runtime.Object, error) {
	all := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, cmv1.AddToScheme} {
		if err := add(all); err != nil {
			return nil, fmt.Errorf("preparing to decode: %w", err)
		}
	}
	all.AddKnownTypes(schema.GroupVersion{Group: "monitoring.coreos.com", Version: "v1"}, &ServiceMonitor{})
	decoder := serializer.NewCodecFactory(all, serializer.EnableStrict).UniversalDeserializer()
	var objects []runtime.Object
	documents := utilyaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(rendered)))
	defer documents.Close()
	for {
		document := make([]byte, len(rendered)+1)
		n, err := documents.Read(document)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("splitting what was rendered: %w", err)
		}
		document = document[:n]
		object, _, err := decoder.Decode(document, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("decoding an object of the chart: %w\n%s", err, document)
		}
		objects = append(objects, object)
	}
}

// Of returns the objects of one type.
func Of[T runtime.Object](objects []runtime.Object) []T {
	var found []T
	for _, object := range objects {
		if o, ok := object.(T); ok {
			found = append(found, o)
		}
	}
	return found
}
