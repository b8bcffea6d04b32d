//go:build unix

// Package tools builds the programs that tests, the demonstration and the checks run: a Kubernetes control plane and
// its nodes, Helm, MinIO, linters and code generators. Each has a pinned version and is built from the Go module
// proxy, so only a Go toolchain is needed.
//
// A built program stays in the cache folder, outside the checkout. Its path has its version and a hash of all pins
// that determine it, so a changed pin never runs an old program. Two processes build a program only once. An
// interrupted build leaves no program.
//
// The package never removes programs of other versions.
package tools

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/process/filelock"
)

// Tool is the file name of a program that this package can build.
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
	MinIO                 Tool = "minio"
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
	return slices.Concat(ControlPlane(), Node(), []Tool{Helm, CertManager, MinIO})
}

// All returns every tool, sorted by name.
func All() []Tool { return slices.Sorted(maps.Keys(recipes)) }

// nested is a module below modules. It pins every dependency of its programs, and can have replace directives. Its
// programs share a folder.
type nested struct {
	folder  string                      // below modules
	source  string                      // the required module whose version is in the path
	own     bool                        // the program is the nested module's own package
	tags    string                      // build tags, with commas
	ldflags func(version string) string // further flags; may be nil
}

// Built as a module, Kubernetes does not know its version and calls itself v0.0.0, which some clients refuse.
var kubernetes = nested{
	folder: "kubernetes",
	source: "k8s.io/kubernetes",
	ldflags: func(version string) string {
		const variable = " -X k8s.io/component-base/version."
		major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
		minor, _, _ := strings.Cut(rest, ".")
		return variable + "gitVersion=" + version + variable + "gitMajor=" + major + variable + "gitMinor=" + minor
	},
}

// containerd lacks the snapshotters that need C libraries.
var containerd = nested{folder: "containerd", source: "github.com/containerd/containerd/v2", tags: "no_btrfs,no_devmapper,no_zfs"}

// coreDNS has few plugins, which makes the build much shorter.
var coreDNS = nested{folder: "coredns", source: "github.com/coredns/coredns", own: true}

// certManager is a program of cert-manager's library: its own programs are in modules that the Go proxy does not serve.
var certManager = nested{
	folder: "cert-manager",
	source: "github.com/cert-manager/cert-manager",
	own:    true,
	ldflags: func(version string) string {
		return " -X github.com/cert-manager/cert-manager/pkg/util.AppVersion=" + version
	},
}

var minio = nested{folder: "minio", source: "github.com/minio/minio"}

// recipe describes how to build one program: from a nested module, or by go install, with the versions that the
// program's authors pinned.
type recipe struct {
	nested  *nested // nil: go install
	pkg     string  // the package of the program
	version string  // for go install
}

var recipes = map[Tool]recipe{
	Etcd:                  {nested: &kubernetes, pkg: "go.etcd.io/etcd/server/v3"},
	KubeAPIServer:         {nested: &kubernetes, pkg: "k8s.io/kubernetes/cmd/kube-apiserver"},
	KubeControllerManager: {nested: &kubernetes, pkg: "k8s.io/kubernetes/cmd/kube-controller-manager"},
	Kubectl:               {nested: &kubernetes, pkg: "k8s.io/kubernetes/cmd/kubectl"},
	KubeScheduler:         {nested: &kubernetes, pkg: "k8s.io/kubernetes/cmd/kube-scheduler"},
	KubeProxy:             {nested: &kubernetes, pkg: "k8s.io/kubernetes/cmd/kube-proxy"},
	Kubelet:               {nested: &kubernetes, pkg: "k8s.io/kubernetes/cmd/kubelet"},
	Containerd:            {nested: &containerd, pkg: "github.com/containerd/containerd/v2/cmd/containerd"},
	ContainerdShim:        {nested: &containerd, pkg: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"},
	Ctr:                   {nested: &containerd, pkg: "github.com/containerd/containerd/v2/cmd/ctr"},
	CoreDNS:               {nested: &coreDNS, pkg: "."},
	CertManager:           {nested: &certManager, pkg: "."},
	MinIO:                 {nested: &minio, pkg: "github.com/minio/minio"},
	CNIPtp:                {pkg: "github.com/containernetworking/plugins/plugins/main/ptp", version: "v1.9.1"},
	CNIHostLocal:          {pkg: "github.com/containernetworking/plugins/plugins/ipam/host-local", version: "v1.9.1"},
	Helm:                  {pkg: "helm.sh/helm/v4/cmd/helm", version: "v4.3.1"},
	GolangciLint:          {pkg: "github.com/golangci/golangci-lint/v2/cmd/golangci-lint", version: "v2.15.0"},
	Buf:                   {pkg: "github.com/bufbuild/buf/cmd/buf", version: "v1.75.0"},
	ProtocGenGo:           {pkg: "google.golang.org/protobuf/cmd/protoc-gen-go", version: "v1.36.12"},
	ProtocGenGoGRPC:       {pkg: "google.golang.org/grpc/cmd/protoc-gen-go-grpc", version: "v1.6.2"},
	Govulncheck:           {pkg: "golang.org/x/vuln/cmd/govulncheck", version: "v1.9.0"},
	Actionlint:            {pkg: "github.com/rhysd/actionlint/cmd/actionlint", version: "v1.7.12"},
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

// Path returns the path of a program, and builds it first if necessary. The working folder must be in the checkout. A
// build can take minutes: progress gets a line at its start, one every 30 s, and one at its end; it may be nil. The
// error of a failed build has the end of the compiler's output.
//
// Build a control plane before go test (go run ./integration/tools/install): go test stops a test after 10 minutes, and
// shows no progress until then.
func Path(ctx context.Context, tool Tool, progress io.Writer) (string, error) {
	if progress == nil {
		progress = io.Discard
	}
	t, err := find(tool)
	if err != nil || executable(t.path) {
		return t.path, err
	}
	return t.path, t.build(ctx, progress)
}

// Built reports whether Path returns without a build.
func Built(tool Tool) bool {
	t, err := find(tool)
	return err == nil && executable(t.path)
}

// Source returns the folder with the source of a nested module's program, at the pinned version, and downloads it first
// if necessary. The folder is in the Go module cache: it is read-only.
func Source(ctx context.Context, tool Tool) (string, error) {
	t, err := find(tool)
	if err != nil {
		return "", err
	}
	r := recipes[tool]
	if r.nested == nil {
		return "", fmt.Errorf("finding the source of %s: it has no nested module", tool)
	}
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", r.nested.source) //nolint:gosec // a constant
	cmd.Dir = t.workDir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off")
	output, err := cmd.Output()
	var module struct{ Dir, Error string }
	if decodeErr := json.Unmarshal(output, &module); decodeErr != nil || module.Dir == "" {
		return "", fmt.Errorf("downloading the source of %s %s: %w", tool, t.version, errors.Join(err, decodeErr, errors.New(module.Error)))
	}
	return module.Dir, nil
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// target is a recipe with all values resolved.
type target struct {
	tool    Tool
	version string
	path    string // of the program
	workDir string // of the go command
	pkg     string // to build, or, with a version, to install
	tags    string
	ldflags string
}

// find resolves a recipe for the checkout around the working folder.
func find(tool Tool) (target, error) {
	r, ok := recipes[tool]
	if !ok {
		return target{}, fmt.Errorf("unknown tool %q (one of %v)", tool, All())
	}
	cache, err := CacheDir()
	if err != nil {
		return target{}, err
	}
	root, err := Checkout()
	if err != nil {
		return target{}, err
	}
	return r.resolve(tool, root, cache)
}

// resolve computes the version and the path of a program. The hash in the path covers everything that determines it.
func (r recipe) resolve(tool Tool, root, cache string) (target, error) {
	t := target{tool: tool, version: r.version, workDir: root, pkg: r.pkg, ldflags: "-s -w"}
	hash := sha256.New()
	folder := string(tool)
	if r.nested == nil {
		t.pkg += "@" + r.version
		// golangci-lint refuses code that needs a newer Go than it was built with.
		_, _ = fmt.Fprintf(hash, "%s %s", t.pkg, runtime.Version())
	} else {
		folder = r.nested.folder
		t.workDir = filepath.Join(root, "integration", "tools", "modules", folder)
		pins, err := os.ReadFile(filepath.Join(t.workDir, "go.mod"))
		if err != nil {
			return target{}, fmt.Errorf("reading the pinned version of %s: %w", tool, err)
		}
		sums, err := os.ReadFile(filepath.Join(t.workDir, "go.sum"))
		if err != nil {
			return target{}, fmt.Errorf("reading the pinned version of %s: %w", tool, err)
		}
		required := regexp.MustCompile(`(?m)^(?:require)?\s*` + regexp.QuoteMeta(r.nested.source) + ` (v\S+)`).FindSubmatch(pins)
		if required == nil {
			return target{}, fmt.Errorf("finding the version of %s: %s/go.mod does not require %s", tool, t.workDir, r.nested.source)
		}
		t.version, t.tags = string(required[1]), r.nested.tags
		if r.nested.ldflags != nil {
			t.ldflags += r.nested.ldflags(t.version)
		}
		_, _ = fmt.Fprintf(hash, "%s%s%s%s", pins, sums, t.tags, t.ldflags)
		if r.nested.own {
			if err := hashSource(hash, t.workDir); err != nil {
				return target{}, fmt.Errorf("reading the source of %s: %w", tool, err)
			}
		}
	}
	_, _ = fmt.Fprintf(hash, "%s/%s", runtime.GOOS, runtime.GOARCH)
	t.path = filepath.Join(cache, "tools", folder+"-"+t.version+"-"+hex.EncodeToString(hash.Sum(nil))[:12], string(tool))
	return t, nil
}

// hashSource hashes the program in folder, which is one package.
func hashSource(hash io.Writer, folder string) error {
	files, err := filepath.Glob(filepath.Join(folder, "*.go")) // sorted
	if err != nil || len(files) == 0 {
		return errors.Join(fmt.Errorf("no Go files in %s", folder), err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(hash, "%s %d\n%s", filepath.Base(file), len(content), content)
	}
	return nil
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

// unfinished is the prefix of folders of builds.
const unfinished = "unfinished-"

// build builds the program in a temporary folder and moves it to its path. One lock protects all programs of a folder:
// they share packages, which would be compiled twice otherwise.
func (t target) build(ctx context.Context, progress io.Writer) (err error) {
	folder := filepath.Dir(t.path)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("making the folder of %s: %w", t.tool, err)
	}
	done := report(progress, "waiting for another process that builds in "+folder)
	lock, err := filelock.Acquire(ctx, filepath.Join(folder, "lock"))
	done()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if executable(t.path) {
		return nil
	}
	// This process has the lock, so the owners of these folders are dead.
	stale, err := filepath.Glob(filepath.Join(folder, unfinished+"*"))
	if err != nil {
		return fmt.Errorf("looking for unfinished builds: %w", err)
	}
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("removing an unfinished build: %w", err)
		}
	}
	temp, err := os.MkdirTemp(folder, unfinished)
	if err != nil {
		return fmt.Errorf("making a folder to build %s in: %w", t.tool, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	_, _ = fmt.Fprintf(progress, "building %s %s, which can take minutes\n", t.tool, t.version)
	done = report(progress, "building "+string(t.tool))
	err = t.run(ctx, temp)
	done()
	if err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(temp, string(t.tool)), t.path); err != nil {
		return fmt.Errorf("moving %s to its folder: %w", t.tool, err)
	}
	_, _ = fmt.Fprintf(progress, "built %s\n", t.tool)
	return nil
}

// report writes a line every 30 s until the returned function is called.
func report(progress io.Writer, what string) (done func()) {
	stop, stopped, began := make(chan struct{}), make(chan struct{}), time.Now()
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(30 * time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				_, _ = fmt.Fprintf(progress, "still %s, after %v\n", what, time.Since(began).Round(time.Second))
			}
		}
	}()
	return func() { close(stop); <-stopped }
}

// maxOutput limits the compiler's output in an error, in bytes. The last lines have the cause.
const maxOutput = 4 << 10

// run runs the go command, which writes the program into folder. The command stays in this process group, so that
// Ctrl-C in a terminal reaches its compilers.
func (t target) run(ctx context.Context, folder string) error {
	args := []string{"build", "-trimpath", "-tags", t.tags, "-ldflags", t.ldflags, "-o", filepath.Join(folder, string(t.tool)), t.pkg}
	if strings.Contains(t.pkg, "@") {
		args = []string{"install", "-trimpath", "-ldflags", t.ldflags, t.pkg}
	}
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // the recipes above
	cmd.Dir = t.workDir
	// The user's settings must not change the program: it runs on this machine, and go.mod has all pins.
	cmd.Env = append(os.Environ(), "GOBIN="+folder, "GOFLAGS=-mod=readonly", "GOWORK=off",
		"GOOS="+runtime.GOOS, "GOARCH="+runtime.GOARCH, "CGO_ENABLED=0")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second // the go command waits for its compilers
	output, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return fmt.Errorf("building %s: %w", t.tool, context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("building %s %s in %s (go %s): %w\n%s", t.tool, t.version, t.workDir, strings.Join(args, " "), err,
			bytes.TrimSpace(output[max(0, len(output)-maxOutput):]))
	}
	return nil
}
