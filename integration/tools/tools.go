//go:build unix

// Package tools provides the programs that tests, the demonstration and the checks run: a Kubernetes control plane and
// its nodes, Helm, linters and code generators. Each has a pinned version. The package builds them from the Go module
// proxy, so only a Go toolchain is needed. It downloads the binary of a program's authors instead if its checksum is
// pinned and its host can be reached.
//
// KUBERNETES in the environment chooses the minor version of Kubernetes, such as 1.30; the default is the newest.
// CREDENCE_TOOLS chooses between builds and downloads: auto (the default), build or download.
//
// A program stays in the cache folder, outside the checkout. Its path has its version and a hash of all pins that
// determine it, so a changed pin never runs an old program. Two processes build a program only once. An interrupted
// build leaves no program.
//
// The package never removes programs of other versions.
package tools

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Tool is the file name of a program that this package can provide.
type Tool string

// The programs.
const (
	Etcd                  Tool = "etcd"
	KubeAPIServer         Tool = "kube-apiserver"
	KubeControllerManager Tool = "kube-controller-manager"
	Kubectl               Tool = "kubectl"
	KubeScheduler         Tool = "kube-scheduler"
	KubeProxy             Tool = "kube-proxy"
	Kubelet               Tool = "kubelet"
	Containerd            Tool = "containerd"
	ContainerdShim        Tool = "containerd-shim-runc-v2"
	Ctr                   Tool = "ctr"
	CoreDNS               Tool = "coredns"
	CNIPtp                Tool = "ptp"
	CNIHostLocal          Tool = "host-local"
	Helm                  Tool = "helm"
	CertManager           Tool = "cert-manager"
	GolangciLint          Tool = "golangci-lint"
	Buf                   Tool = "buf"
	ProtocGenGo           Tool = "protoc-gen-go"
	ProtocGenGoGRPC       Tool = "protoc-gen-go-grpc"
	Govulncheck           Tool = "govulncheck"
	Actionlint            Tool = "actionlint"
)

// ControlPlane returns the programs of a small control plane.
func ControlPlane() []Tool { return []Tool{Etcd, KubeAPIServer, KubeControllerManager, Kubectl} }

// Node returns the further programs of a cluster with nodes. It lacks runc and iptables: both need C libraries, and come
// from the system.
func Node() []Tool {
	return []Tool{KubeScheduler, KubeProxy, Kubelet, Containerd, ContainerdShim, Ctr, CoreDNS, CNIPtp, CNIHostLocal}
}

// Deployment returns the programs of a cluster with nodes, and those that install Credence and its dependencies there.
func Deployment() []Tool {
	return slices.Concat(ControlPlane(), Node(), []Tool{Helm, CertManager})
}

// All returns every tool, sorted by name.
func All() []Tool { return slices.Sorted(maps.Keys(recipes)) }

// Path returns the path of a program, as [Paths] does.
func Path(ctx context.Context, tool Tool, progress io.Writer) (string, error) {
	paths, err := Paths(ctx, []Tool{tool}, progress)
	return paths[tool], err
}

// Paths returns the paths of programs, and builds or downloads them first if necessary. The working folder must be in the
// checkout. Programs that share modules are built by one command, which compiles their packages once. That can take
// many minutes: progress gets a line at its start, one every 30 s, and one at its end; it may be nil. The error of a
// failed build has the end of the compiler's output.
//
// Build a control plane before go test (go run ./integration/tools/install): go test stops a test after 10 minutes, and
// shows no progress until then.
func Paths(ctx context.Context, list []Tool, progress io.Writer) (map[Tool]string, error) {
	if progress == nil {
		progress = io.Discard
	}
	c, err := open()
	if err != nil {
		return nil, err
	}
	return c.paths(ctx, list, progress)
}

// Built reports whether Path returns without a build or a download.
func Built(tool Tool) bool {
	c, err := open()
	if err != nil {
		return false
	}
	t, err := c.find(tool)
	return err == nil && c.existing(t) != ""
}

// Kubernetes returns the version of Kubernetes that the environment chooses, such as v1.37.2.
func Kubernetes() (string, error) {
	c, err := open()
	if err != nil {
		return "", err
	}
	t, err := c.find(KubeAPIServer)
	return t.version, err
}

// Source returns the folder with the source of a nested module's program, at the pinned version, and downloads it first
// if necessary. The folder is in the Go module cache: it is read-only.
func Source(ctx context.Context, tool Tool) (string, error) {
	c, err := open()
	if err != nil {
		return "", err
	}
	t, err := c.find(tool)
	if err != nil {
		return "", err
	}
	if t.set == nil {
		return "", fmt.Errorf("finding the source of %s: it has no nested module", tool)
	}
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", recipes[tool].source) //nolint:gosec // a constant
	cmd.Dir, cmd.Env = t.set.dir, t.set.environment()
	output, err := cmd.Output()
	var module struct{ Dir, Error string }
	if decodeErr := json.Unmarshal(output, &module); decodeErr != nil || module.Dir == "" {
		return "", fmt.Errorf("downloading the source of %s %s: %w", tool, t.version, errors.Join(err, decodeErr, errors.New(module.Error)))
	}
	return module.Dir, nil
}

// CacheDir returns the folder of built programs and of runs: credence below $XDG_CACHE_HOME, or below the system's cache
// folder of the user.
func CacheDir() (string, error) {
	base := os.Getenv("XDG_CACHE_HOME")
	if !filepath.IsAbs(base) { // the XDG specification ignores relative paths
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", fmt.Errorf("finding the cache folder: %w; set XDG_CACHE_HOME", err)
		}
	}
	return filepath.Join(base, "credence"), nil
}

// module is the path in the module clause of the checkout's go.mod.
const module = "github.com/credence-iam/credence"

// Checkout returns the root of the checkout around the working folder. A test runs in its package's folder, a command
// anywhere, and nested modules on the way have longer module paths.
func Checkout() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the checkout: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		content, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && slices.Contains(strings.Split(string(content), "\n"), "module "+module) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("finding the checkout: no go.mod of %s at or above %s; run it in the checkout", module, start)
		}
	}
}
