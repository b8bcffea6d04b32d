//go:build unix

// Package tools builds, once, the programs that tests, the demonstration and the checks run: a Kubernetes
// control plane and its nodes, Helm, MinIO, linters and code generators. Each has a pinned version, and is built from the Go
// module proxy, so nothing but a Go toolchain is needed.
//
// A built program lies in the cache folder, outside the checkout, under a name that holds its version and a
// hash of everything pinned that decides what is built. Asking for it again is silent and instant. Two
// processes that ask at the same time build it once. A build that is cut short leaves nothing that could be
// mistaken for a program.
//
// It promises nothing about programs that the user brings with [AssetsVariable], and never removes what it
// built for another version.
package tools

import (
	"bufio"
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
	"sync"
	"time"

	"github.com/credence-iam/credence/integration/process/filelock"
)

// A Tool is the file name of a program that this package can build.
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

// AssetsVariable names an environment variable that other Kubernetes projects use too. Where it holds a
// folder with etcd, kube-apiserver and kubectl, those are used instead of built ones. Of the control plane
// only kube-controller-manager is then built, since such folders usually lack it.
const AssetsVariable = "KUBEBUILDER_ASSETS"

// ControlPlane returns the programs of a small control plane.
func ControlPlane() []Tool { return []Tool{Etcd, KubeAPIServer, KubeControllerManager, Kubectl} }

// Node returns the programs that a cluster with nodes runs in addition. runc and iptables are not among
// them: both are bound to C libraries, and come from the system.
func Node() []Tool {
	return []Tool{KubeScheduler, KubeProxy, Kubelet, Containerd, ContainerdShim, Ctr, CoreDNS, CNIPtp, CNIHostLocal}
}

// Deployment returns the programs of a cluster with nodes, and those that put Credence and what it needs on
// it.
func Deployment() []Tool {
	return slices.Concat(ControlPlane(), Node(), []Tool{Helm, CertManager, MinIO})
}

// All returns every program that can be built, sorted by name.
func All() []Tool { return slices.Sorted(maps.Keys(recipes)) }

// A nested module pins every dependency of the programs built from it, and can carry the replace directives
// that some need. Its programs share a folder.
type nested struct {
	folder  string                      // below modules/, with a go.mod
	source  string                      // required module whose version names the folder in the cache
	own     bool                        // the program is the nested module's own package
	tags    string                      // build tags, with commas
	ldflags func(version string) string // in addition to those that all get; may be nil
}

// kubernetes: built as a module it does not know its own version and calls itself v0.0.0, which clients that
// compare versions refuse. So it is told.
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

// containerd: without the snapshotters that need C libraries. It does know its version.
var containerd = nested{folder: "containerd", source: "github.com/containerd/containerd/v2", tags: "no_btrfs,no_devmapper,no_zfs"}

// coreDNS: ours has the plugins that we need, and is built in a fraction of the time.
var coreDNS = nested{folder: "coredns", source: "github.com/coredns/coredns", own: true}

// certManager: its programs are in modules that the Go proxy does not serve. Ours is made of its library.
var certManager = nested{
	folder: "cert-manager",
	source: "github.com/cert-manager/cert-manager",
	own:    true,
	ldflags: func(version string) string {
		return " -X github.com/cert-manager/cert-manager/pkg/util.AppVersion=" + version
	},
}

var minio = nested{folder: "minio", source: "github.com/minio/minio"}

// A recipe says how one program is built: from a nested module, or by go install, which takes the versions
// that the program's authors pinned.
type recipe struct {
	nested  *nested // nil: go install
	source  string  // module that holds the program
	version string  // of source, for go install; otherwise go.mod says it
	pkg     string  // package of the program, below source; empty: source itself
	takes   string  // what to expect of the first build; empty: not worth saying
}

var recipes = map[Tool]recipe{
	Etcd: {nested: &kubernetes, source: "go.etcd.io/etcd/server/v3"},
	KubeAPIServer: {
		nested: &kubernetes, source: "k8s.io/kubernetes", pkg: "/cmd/kube-apiserver",
		takes: "about 9 min on 2 cores the first time",
	},
	KubeControllerManager: {
		nested: &kubernetes, source: "k8s.io/kubernetes", pkg: "/cmd/kube-controller-manager",
		takes: "about 4 min on 2 cores the first time after kube-apiserver",
	},
	Kubectl: {
		nested: &kubernetes, source: "k8s.io/kubernetes", pkg: "/cmd/kubectl",
		takes: "about 40 s on 2 cores the first time after kube-apiserver",
	},
	KubeScheduler: {nested: &kubernetes, source: "k8s.io/kubernetes", pkg: "/cmd/kube-scheduler"},
	KubeProxy:     {nested: &kubernetes, source: "k8s.io/kubernetes", pkg: "/cmd/kube-proxy"},
	Kubelet: {
		nested: &kubernetes, source: "k8s.io/kubernetes", pkg: "/cmd/kubelet",
		takes: "about 3 min on 2 cores the first time after kube-apiserver",
	},

	Containerd: {
		nested: &containerd, source: "github.com/containerd/containerd/v2", pkg: "/cmd/containerd",
		takes: "about 90 s on 2 cores the first time",
	},
	ContainerdShim: {nested: &containerd, source: "github.com/containerd/containerd/v2", pkg: "/cmd/containerd-shim-runc-v2"},
	Ctr:            {nested: &containerd, source: "github.com/containerd/containerd/v2", pkg: "/cmd/ctr"},
	CoreDNS: {
		nested: &coreDNS, source: "github.com/coredns/coredns",
		takes: "about 1 min on 2 cores the first time",
	},
	CNIPtp:       {source: "github.com/containernetworking/plugins", version: "v1.9.1", pkg: "/plugins/main/ptp"},
	CNIHostLocal: {source: "github.com/containernetworking/plugins", version: "v1.9.1", pkg: "/plugins/ipam/host-local"},

	Helm: {
		source: "helm.sh/helm/v4", version: "v4.3.1", pkg: "/cmd/helm",
		takes: "about 100 s on 2 cores the first time",
	},

	CertManager: {
		nested: &certManager, source: "github.com/cert-manager/cert-manager",
		takes: "about 3 min on 2 cores the first time",
	},

	MinIO: {nested: &minio, source: "github.com/minio/minio", takes: "about 5 min on 2 cores the first time"},

	GolangciLint: {
		source: "github.com/golangci/golangci-lint/v2", version: "v2.15.0", pkg: "/cmd/golangci-lint",
		takes: "about 80 s on 2 cores the first time",
	},
	Buf: {
		source: "github.com/bufbuild/buf", version: "v1.75.0", pkg: "/cmd/buf",
		takes: "about 70 s on 2 cores the first time",
	},
	ProtocGenGo:     {source: "google.golang.org/protobuf", version: "v1.36.12", pkg: "/cmd/protoc-gen-go"},
	ProtocGenGoGRPC: {source: "google.golang.org/grpc/cmd/protoc-gen-go-grpc", version: "v1.6.2"},
	Govulncheck:     {source: "golang.org/x/vuln", version: "v1.9.0", pkg: "/cmd/govulncheck"},
	Actionlint:      {source: "github.com/rhysd/actionlint", version: "v1.7.12", pkg: "/cmd/actionlint"},
}

// CacheDir returns the folder that all built programs and all runs lie in: credence below $XDG_CACHE_HOME,
// or below the system's cache folder of this user.
func CacheDir() (string, error) {
	base := os.Getenv("XDG_CACHE_HOME")
	if !filepath.IsAbs(base) { // the XDG specification: relative paths are to be ignored
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", fmt.Errorf("finding the cache folder (set XDG_CACHE_HOME): %w", err)
		}
	}
	return filepath.Join(base, "credence"), nil
}

// Path returns where the program lies, after building it if need be. It must be called from within a
// checkout. A build can take minutes: progress gets a line when it begins, one every 30 s, and one when it
// has ended; nil means nobody is told. The error of a build that failed holds the end of the compiler's
// output.
//
// Under go test, build the control plane beforehand (go run ./integration/tools/install): go test ends a
// test binary after its -timeout of 10 minutes, and with several packages shows no progress until then.
func Path(ctx context.Context, tool Tool, progress io.Writer) (string, error) {
	if progress == nil {
		progress = io.Discard
	}
	if path, ok := asset(tool, progress); ok {
		return path, nil
	}
	t, err := find(tool)
	if err != nil {
		return "", err
	}
	if executable(t.path) {
		return t.path, nil
	}
	return t.path, t.build(ctx, progress)
}

// Built says whether Path would answer at once.
func Built(tool Tool) bool {
	if _, ok := asset(tool, io.Discard); ok {
		return true
	}
	t, err := find(tool)
	return err == nil && executable(t.path)
}

// Source returns the folder of the source that a program of a nested module is built from, at the pinned
// version, after downloading it if need be. It is in the Go module cache: not to be written to.
func Source(ctx context.Context, tool Tool) (string, error) {
	t, err := find(tool)
	if err != nil {
		return "", err
	}
	r := recipes[tool]
	if r.nested == nil {
		return "", fmt.Errorf("finding the source of %s: it has no nested module", tool)
	}
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", r.source) //nolint:gosec // a constant of ours
	cmd.Dir = t.workDir
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off")
	output, err := cmd.Output()
	var module struct{ Dir, Error string }
	if decodeErr := json.Unmarshal(output, &module); decodeErr != nil {
		err = errors.Join(err, decodeErr)
	}
	if module.Error != "" {
		err = errors.New(module.Error)
	}
	if err == nil && module.Dir == "" {
		err = errors.New("the go command names no folder")
	}
	if err != nil {
		return "", fmt.Errorf("downloading the source of %s %s: %w", tool, t.version, err)
	}
	return module.Dir, nil
}

// assetsTold makes what is said about AssetsVariable be said once per process.
var assetsTold sync.Once

// asset returns the user's own program from the folder that AssetsVariable names. A folder that lacks one of
// the three is not used at all: an API server is tried against the etcd that it came with.
func asset(tool Tool, progress io.Writer) (string, bool) {
	folder := os.Getenv(AssetsVariable)
	three := []Tool{Etcd, KubeAPIServer, Kubectl}
	if folder == "" || !slices.Contains(three, tool) {
		return "", false
	}
	for _, needed := range three {
		if path := filepath.Join(folder, string(needed)); !executable(path) {
			tell(progress, "ignoring %s=%s: %s is missing or not executable\n", AssetsVariable, folder, path)
			return "", false
		}
	}
	tell(progress, "using etcd, kube-apiserver and kubectl of %s=%s\n", AssetsVariable, folder)
	return filepath.Join(folder, string(tool)), true
}

func tell(progress io.Writer, format string, args ...any) {
	if progress == io.Discard {
		return
	}
	assetsTold.Do(func() { _, _ = fmt.Fprintf(progress, format, args...) })
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// A target is a recipe with everything resolved.
type target struct {
	tool    Tool
	version string
	takes   string
	path    string // of the program
	workDir string // where the go command runs
	pkg     string // what it builds; with a version: what it installs
	tags    string
	ldflags string
}

// find resolves a recipe against the checkout around the working folder.
func find(tool Tool) (*target, error) {
	r, ok := recipes[tool]
	if !ok {
		return nil, fmt.Errorf("unknown tool %q (one of %v)", tool, All())
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	root, err := checkout()
	if err != nil {
		return nil, err
	}
	return r.resolve(tool, root, cache)
}

// resolve computes the version and the place of a program. The hash in its folder's name is over all that
// decides what is built.
func (r recipe) resolve(tool Tool, root, cache string) (*target, error) {
	t := &target{tool: tool, version: r.version, takes: r.takes, workDir: root, ldflags: "-s -w"}
	hash := sha256.New()
	var folder string
	if r.nested == nil {
		t.pkg = r.source + r.pkg + "@" + r.version
		folder = string(tool) + "-" + r.version
		// golangci-lint refuses code that asks for a newer Go than it was built with.
		_, _ = fmt.Fprintf(hash, "%s %s", t.pkg, runtime.Version())
	} else {
		t.pkg = r.source + r.pkg
		t.workDir = filepath.Join(root, "integration", "tools", "modules", r.nested.folder)
		pins, err := os.ReadFile(filepath.Join(t.workDir, "go.mod"))
		if err != nil {
			return nil, fmt.Errorf("reading the pinned version of %s: %w", tool, err)
		}
		sums, err := os.ReadFile(filepath.Join(t.workDir, "go.sum"))
		if err != nil {
			return nil, fmt.Errorf("reading the pinned version of %s: %w", tool, err)
		}
		t.version = required(pins, r.source)
		version := required(pins, r.nested.source)
		if t.version == "" || version == "" {
			return nil, fmt.Errorf("finding the version of %s: %s/go.mod does not require %s and %s", tool, t.workDir, r.source, r.nested.source)
		}
		if r.nested.ldflags != nil {
			t.ldflags += r.nested.ldflags(version)
		}
		t.tags = r.nested.tags
		folder = r.nested.folder + "-" + version
		_, _ = fmt.Fprintf(hash, "%s%s%s%s", pins, sums, t.tags, t.ldflags)
		if r.nested.own {
			t.pkg = "."
			if err := hashSource(hash, t.workDir); err != nil {
				return nil, fmt.Errorf("reading the source of %s: %w", tool, err)
			}
		}
	}
	_, _ = fmt.Fprintf(hash, "%s/%s", runtime.GOOS, runtime.GOARCH)
	folder += "-" + hex.EncodeToString(hash.Sum(nil))[:12]
	t.path = filepath.Join(cache, "tools", folder, string(tool))
	return t, nil
}

// hashSource adds the program in folder, which is one package, to a hash.
func hashSource(hash io.Writer, folder string) error {
	files, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("no Go files in %s", folder)
	}
	for _, file := range files { // sorted
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(hash, "%s %d\n%s", filepath.Base(file), len(content), content)
	}
	return nil
}

// required returns the version of a module that a go.mod file requires; empty if it does not.
func required(gomod []byte, module string) string {
	line := regexp.MustCompile(`(?m)^(?:require)?\s*` + regexp.QuoteMeta(module) + ` (v\S+)`).FindSubmatch(gomod)
	if line == nil {
		return ""
	}
	return string(line[1])
}

// module is the path in the module clause of this checkout's go.mod.
const module = "github.com/credence-iam/credence"

// checkout walks up from the working folder to this module's root: a test runs in its package's folder, a
// command anywhere. A nested module on the way has a longer module path.
func checkout() (string, error) {
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
			return "", fmt.Errorf("finding the checkout: no go.mod of %s at or above %s (run it from within the checkout)", module, start)
		}
	}
}

// heartbeat is how often a running build says that it runs: often enough that nobody takes it for hung.
var heartbeat = 30 * time.Second

// unfinished begins the names of folders that programs are built in.
const unfinished = "unfinished-"

// build builds the program in a folder of its own beside its final place, and moves it there when it is
// whole. One lock for all programs of a folder: those share packages, and building two at a time would
// compile these twice.
func (t *target) build(ctx context.Context, progress io.Writer) (err error) {
	folder := filepath.Dir(t.path)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("making the folder of %s: %w", t.tool, err)
	}
	lockFile := filepath.Join(folder, "lock")
	stopped := t.beat(progress, "waiting for another process that builds in "+folder)
	lock, err := filelock.Acquire(ctx, lockFile)
	stopped()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if executable(t.path) {
		return nil
	}
	// We hold the lock: whoever made these is dead.
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

	expect := ""
	if t.takes != "" {
		expect = " (" + t.takes + ")"
	}
	_, _ = fmt.Fprintf(progress, "building %s %s%s\n", t.tool, t.version, expect)
	began := time.Now()
	stopped = t.beat(progress, "building "+string(t.tool))
	err = t.run(ctx, temp)
	stopped()
	if err != nil {
		return err
	}
	built := filepath.Join(temp, string(t.tool))
	info, err := os.Stat(built)
	if err != nil {
		return fmt.Errorf("looking at the built %s: %w", t.tool, err)
	}
	if err := os.Rename(built, t.path); err != nil {
		return fmt.Errorf("moving %s to its place: %w", t.tool, err)
	}
	_, _ = fmt.Fprintf(progress, "built %s in %v (%d MB)\n", t.tool, time.Since(began).Round(time.Second), (info.Size()+500_000)/1_000_000)
	return nil
}

// beat writes a line on progress now and then, until the returned function is called.
func (t *target) beat(progress io.Writer, what string) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		began := time.Now()
		ticker := time.NewTicker(heartbeat)
		defer ticker.Stop()
		for {
			select {
			case <-done:
				return
			case <-ticker.C:
				_, _ = fmt.Fprintf(progress, "still %s, %v so far\n", what, time.Since(began).Round(time.Second))
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}

// run runs the go command, which puts the program into folder.
//
// The go command stays in our process group, so that Ctrl-C in a terminal reaches it and its compilers too.
func (t *target) run(ctx context.Context, folder string) error {
	args := []string{"build", "-trimpath", "-tags", t.tags, "-ldflags", t.ldflags, "-o", filepath.Join(folder, string(t.tool)), t.pkg}
	if strings.Contains(t.pkg, "@") {
		args = []string{"install", "-trimpath", "-ldflags", t.ldflags, t.pkg}
	}
	var output tail
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // arguments come from the recipes above
	cmd.Dir = t.workDir
	// What the user's own builds need must not leak into these: the program runs here, whatever GOOS is
	// set to, and a workspace or -mod=mod would override what go.mod pins.
	cmd.Env = append(os.Environ(), "GOBIN="+folder, "GOFLAGS=-mod=readonly", "GOWORK=off",
		"GOOS="+runtime.GOOS, "GOARCH="+runtime.GOARCH, "CGO_ENABLED=0")
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second // time for the go command to wait for its compilers
	err := cmd.Run()
	if ctx.Err() != nil {
		return fmt.Errorf("building %s: %w", t.tool, context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("building %s %s in %s (go %s): %w\n%s", t.tool, t.version, t.workDir, strings.Join(args, " "), err, output.String())
	}
	return nil
}

// tailLines is how much of a compiler's output an error shows: the last lines name the cause, the rest is
// mostly downloads.
const tailLines = 20

// tail keeps the last lines written to it.
type tail struct{ buf bytes.Buffer }

// tailBytes bounds the memory of a tail: 20 lines, of which a linker's can be some hundred bytes long.
const tailBytes = 16 << 10

func (t *tail) Write(p []byte) (int, error) {
	n := len(p)
	t.buf.Write(p[max(0, n-tailBytes):])
	if over := t.buf.Len() - tailBytes; over > 0 {
		t.buf.Next(over)
	}
	return n, nil
}

func (t *tail) String() string {
	var lines []string
	scanner := bufio.NewScanner(bytes.NewReader(t.buf.Bytes()))
	for scanner.Scan() {
		lines = append(lines, scanner.Text())
	}
	return strings.Join(lines[max(0, len(lines)-tailLines):], "\n")
}
