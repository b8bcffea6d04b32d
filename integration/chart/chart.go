//go:build unix

// Package chart runs the real Helm on our chart. It renders the chart as an installation does, and decodes the result into
// the types of Kubernetes and cert-manager; a field that these types do not have is an error. It needs no cluster for
// that, and accesses only a cluster that the caller names.
//
// Helm is a program of package tools, not a library: the library has more modules than all our other dependencies, and no
// program of ours needs it.
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
	"slices"
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
	// Namespace is the default namespace of the release.
	Namespace = "credence"
	// Release is the name of the release. No object's name depends on it.
	Release = "credence"
)

// Config configures how Helm is run.
type Config struct {
	// Helm is the path of the program. Default: the one of package tools, which builds it if necessary.
	Helm string
	// Kubeconfig is the file that names the cluster. Default: no cluster.
	Kubeconfig string
	// Chart is the folder of the chart. Default: that of [Folder].
	Chart string
	// Release is the name of the release. Default [Release].
	Release string
	// Namespace is the namespace of the release. Default [Namespace].
	Namespace string
	// KubeVersion is the version of Kubernetes to render for. Default: that of the cluster, or Helm's own.
	KubeVersion string
	// ValueFiles are files of values. Later ones override earlier ones.
	ValueFiles []string
	// Set has single values, as KEY=VALUE, which override the files.
	Set []string
	// SetString has single values that are texts, even if they look like numbers.
	SetString []string
}

// Render returns the objects of an installation as text. Its error has Helm's message, as users see it.
func Render(ctx context.Context, cfg Config) ([]byte, error) {
	return cfg.render(ctx, "template")
}

// Notes returns the notes that Helm prints after an installation.
func Notes(ctx context.Context, cfg Config) (string, error) {
	out, err := cfg.render(ctx, "install", "--dry-run=client")
	if err != nil {
		return "", err
	}
	_, notes, ok := strings.Cut(string(out), "\nNOTES:\n")
	if !ok {
		return "", errors.New("helm install printed no notes")
	}
	return notes, nil
}

// Install installs or upgrades the chart in the cluster of cfg.Kubeconfig, and returns Helm's output. It does not wait for
// pods. Without a node, which could run the check, it must get "--no-hooks".
func Install(ctx context.Context, cfg Config, args ...string) ([]byte, error) {
	return cfg.render(ctx, append([]string{"upgrade", "--install", "--create-namespace"}, args...)...)
}

// render runs a command of Helm on copies of the chart and the files of values. Go's test cache knows only the files that
// the test binary reads itself: if Helm read the originals, a cached result of an earlier chart would pass.
func (cfg Config) render(ctx context.Context, args ...string) (_ []byte, err error) {
	chart := cfg.Chart
	if chart == "" {
		if chart, err = Folder(); err != nil {
			return nil, err
		}
	}
	copies, err := os.MkdirTemp("", "credence-chart-")
	if err != nil {
		return nil, fmt.Errorf("creating a folder for the chart: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(copies)) }()
	copied := filepath.Join(copies, "chart")
	if err := os.CopyFS(copied, os.DirFS(chart)); err != nil {
		return nil, fmt.Errorf("copying the chart: %w", err)
	}
	args = append(args, cmp.Or(cfg.Release, Release), copied)
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
	for _, set := range cfg.SetString {
		args = append(args, "--set-string", set)
	}
	if cfg.KubeVersion != "" {
		args = append(args, "--kube-version", cfg.KubeVersion)
	}
	return Helm(ctx, cfg, args...)
}

// Folder returns the folder of the chart, in the checkout around the working folder.
func Folder() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the chart: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		chart := filepath.Join(dir, "charts", "credence")
		if _, err := os.Stat(filepath.Join(chart, "Chart.yaml")); err == nil {
			return chart, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no charts/credence at or above the working folder; run this within the checkout")
		}
	}
}

// Helm runs Helm in the release's namespace and returns its output. The plugins, repositories and clusters of the user have
// no effect.
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
		return nil, fmt.Errorf("creating a folder for Helm: %w", err)
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

type (
	// ServiceMonitor has the fields of the Prometheus Operator's type that the chart uses. Its module is as large as that of
	// Kubernetes.
	ServiceMonitor struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
		Spec              struct {
			Selector  metav1.LabelSelector `json:"selector"`
			Endpoints []monitorEndpoint    `json:"endpoints"`
		} `json:"spec"`
	}
	// PodMonitor has the fields of that type that the chart uses.
	PodMonitor struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
		Spec              struct {
			Selector            metav1.LabelSelector `json:"selector"`
			PodMetricsEndpoints []monitorEndpoint    `json:"podMetricsEndpoints"`
		} `json:"spec"`
	}
	// PrometheusRule has the fields of that type that the chart uses.
	PrometheusRule struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
		Spec              RuleFile `json:"spec"`
	}
	// RuleFile is a file of rules for Prometheus, with the fields that the chart uses.
	RuleFile struct {
		Groups []struct {
			Name  string  `json:"name"`
			Rules []Alert `json:"rules"`
		} `json:"groups"`
	}
	// Alert is a rule of a RuleFile.
	Alert struct {
		Alert       string            `json:"alert"`
		Expr        string            `json:"expr"`
		For         string            `json:"for,omitempty"`
		Labels      map[string]string `json:"labels"`
		Annotations map[string]string `json:"annotations"`
	}
	monitorEndpoint struct {
		Port              string    `json:"port"`
		Interval          string    `json:"interval"`
		ScrapeTimeout     string    `json:"scrapeTimeout"`
		Relabelings       []relabel `json:"relabelings"`
		MetricRelabelings []relabel `json:"metricRelabelings"`
	}
	relabel struct {
		SourceLabels []string `json:"sourceLabels"`
		TargetLabel  string   `json:"targetLabel"`
		Regex        string   `json:"regex"`
		Action       string   `json:"action"`
	}
)

// DeepCopyObject implements [runtime.Object]. The copy is shallow, because nobody changes decoded objects.
func (m *ServiceMonitor) DeepCopyObject() runtime.Object { c := *m; return &c }

// DeepCopyObject implements [runtime.Object]. The copy is shallow.
func (m *PodMonitor) DeepCopyObject() runtime.Object { c := *m; return &c }

// DeepCopyObject implements [runtime.Object]. The copy is shallow.
func (r *PrometheusRule) DeepCopyObject() runtime.Object { c := *r; return &c }

// Alerts returns the rules that the chart creates with cfg.
func Alerts(ctx context.Context, cfg Config) (RuleFile, error) {
	cfg.Set = append(slices.Clone(cfg.Set), "metrics.prometheusRule.enabled=true")
	rendered, err := Render(ctx, cfg)
	if err != nil {
		return RuleFile{}, err
	}
	objects, err := Decode(rendered)
	if err != nil {
		return RuleFile{}, err
	}
	rules := Of[*PrometheusRule](objects)
	if len(rules) != 1 || len(rules[0].Spec.Groups) != 1 {
		return RuleFile{}, errors.New("the chart has not one PrometheusRule with one group")
	}
	return rules[0].Spec, nil
}

// Decode returns the objects of a rendered chart in their order, each as its Go type. An unknown or repeated field is an
// error.
func Decode(rendered []byte) ([]runtime.Object, error) {
	all := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, cmv1.AddToScheme} {
		if err := add(all); err != nil {
			return nil, fmt.Errorf("preparing to decode: %w", err)
		}
	}
	all.AddKnownTypes(schema.GroupVersion{Group: "monitoring.coreos.com", Version: "v1"}, &ServiceMonitor{}, &PodMonitor{}, &PrometheusRule{})
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
			return nil, fmt.Errorf("splitting the rendered chart: %w", err)
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
