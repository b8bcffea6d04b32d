//go:build unix

package tools

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// recipe describes one program. Its version is the one that its set of modules requires, or that of go install.
type recipe struct {
	set      string // below modules; kubernetes: of the chosen minor version; empty: go install
	source   string // the module of the program
	pkg      string // the package of the program, below source or, after a slash, below folder modules
	version  string // for go install
	seconds  int    // of one processor to build it after those above it, rounded
	official official
}

// The folders of sets. The members of the workspace make one cluster.
const (
	workspace  = "."
	kubernetes = "kubernetes"
)

var recipes = map[Tool]recipe{
	KubeAPIServer:         kubernetesProgram("kube-apiserver", 300),
	KubeControllerManager: kubernetesProgram("kube-controller-manager", 80),
	Kubectl:               kubernetesProgram("kubectl", 50),
	Kubelet:               kubernetesProgram("kubelet", 50),
	KubeProxy:             kubernetesProgram("kube-proxy", 20),
	KubeScheduler:         kubernetesProgram("kube-scheduler", 15),
	Etcd: {set: kubernetes, source: "go.etcd.io/etcd/server/v3", seconds: 50, official: official{
		url:    "https://github.com/etcd-io/etcd/releases/download/VERSION/etcd-VERSION-linux-ARCH.tar.gz",
		member: "etcd-VERSION-linux-ARCH/etcd", sums: "SHA256SUMS",
	}},
	Containerd:     containerdProgram("containerd", 40),
	ContainerdShim: containerdProgram("containerd-shim-runc-v2", 10),
	Ctr:            containerdProgram("ctr", 10),
	CNIPtp:         cniPlugin("main/ptp"),
	CNIHostLocal:   cniPlugin("ipam/host-local"),
	// Few plugins make the build much shorter.
	CoreDNS: {set: workspace, source: "github.com/coredns/coredns", pkg: "/coredns", seconds: 30, official: official{
		url:    "https://github.com/coredns/coredns/releases/download/VERSION/coredns_BARE_linux_ARCH.tgz",
		member: "coredns", sums: ".sha256",
	}},
	// This is a program of cert-manager's library: its own programs are in modules that the Go proxy does not serve.
	CertManager: {set: workspace, source: "github.com/cert-manager/cert-manager", pkg: "credence", seconds: 20},
	Helm: {set: workspace, source: "helm.sh/helm/v4", pkg: "cmd/helm", seconds: 40, official: official{
		url:    "https://get.helm.sh/helm-VERSION-linux-ARCH.tar.gz",
		member: "linux-ARCH/helm", sums: ".sha256sum",
	}},
	GolangciLint:    {source: "github.com/golangci/golangci-lint/v2", pkg: "cmd/golangci-lint", version: "v2.15.0", seconds: 300},
	Buf:             {source: "github.com/bufbuild/buf", pkg: "cmd/buf", version: "v1.75.0", seconds: 120},
	ProtocGenGo:     {source: "google.golang.org/protobuf", pkg: "cmd/protoc-gen-go", version: "v1.36.12", seconds: 10},
	ProtocGenGoGRPC: {source: "google.golang.org/grpc/cmd/protoc-gen-go-grpc", version: "v1.6.2", seconds: 10},
	Govulncheck:     {source: "golang.org/x/vuln", pkg: "cmd/govulncheck", version: "v1.9.0", seconds: 20},
	Actionlint:      {source: "github.com/rhysd/actionlint", pkg: "cmd/actionlint", version: "v1.7.12", seconds: 20},
}

func kubernetesProgram(name string, seconds int) recipe {
	return recipe{set: kubernetes, source: "k8s.io/kubernetes", pkg: "cmd/" + name, seconds: seconds, official: official{
		url: "https://dl.k8s.io/VERSION/bin/linux/ARCH/" + name, sums: ".sha256",
	}}
}

func containerdProgram(name string, seconds int) recipe {
	return recipe{set: workspace, source: "github.com/containerd/containerd/v2", pkg: "cmd/" + name, seconds: seconds, official: official{
		url:    "https://github.com/containerd/containerd/releases/download/VERSION/containerd-static-BARE-linux-ARCH.tar.gz",
		member: "bin/" + name, sums: ".sha256sum",
	}}
}

func cniPlugin(name string) recipe {
	return recipe{set: workspace, source: "github.com/containernetworking/plugins", pkg: "plugins/" + name, seconds: 10, official: official{
		url:    "https://github.com/containernetworking/plugins/releases/download/VERSION/cni-plugins-linux-ARCH-VERSION.tgz",
		member: path.Base(name), sums: ".sha256",
	}}
}

// set is a module below modules, or the modules of the workspace there. It pins all versions of its programs, which one
// go command can build together.
type set struct {
	dir     string // the go command's working folder
	gowork  string
	pins    []byte // all files that determine the programs
	ldflags string
}

// sourceFiles are the files of a module that determine its programs.
var sourceFiles = []string{"go.mod", "go.sum", "*.go"}

// readSet reads the set in a folder below modules, once.
func (c *catalog) readSet(folder string) (*set, error) {
	if c.sets == nil {
		c.sets = make(map[string]*set)
	}
	if c.sets[folder] == nil {
		s, err := readSet(filepath.Join(c.modules(), folder))
		if err != nil {
			return nil, err
		}
		c.sets[folder] = s
	}
	return c.sets[folder], nil
}

func readSet(dir string) (*set, error) {
	s := &set{dir: dir, gowork: "off"}
	patterns := sourceFiles
	if work, err := os.ReadFile(filepath.Join(dir, "go.work")); err == nil {
		s.gowork = filepath.Join(dir, "go.work")
		patterns = []string{"go.work", "go.work.sum"}
		for _, use := range member.FindAllSubmatch(work, -1) {
			for _, file := range sourceFiles {
				patterns = append(patterns, filepath.Join(string(use[1]), file))
			}
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("reading pinned versions: %w", err)
	}
	for _, pattern := range patterns {
		files, err := filepath.Glob(filepath.Join(dir, pattern)) // sorted
		if err != nil {
			return nil, fmt.Errorf("reading pinned versions: %w", err)
		}
		if len(files) == 0 && strings.HasSuffix(pattern, "go.mod") {
			return nil, fmt.Errorf("reading pinned versions: no %s in %s", pattern, dir)
		}
		for _, file := range files {
			content, err := os.ReadFile(file)
			if err != nil {
				return nil, fmt.Errorf("reading pinned versions: %w", err)
			}
			s.pins = fmt.Appendf(s.pins, "%s %d\n%s\n", filepath.Base(file), len(content), content)
		}
	}
	// Built as a module, Kubernetes does not know its version and calls itself v0.0.0, which some clients refuse.
	s.ldflags = "-s -w"
	if version, err := s.version("k8s.io/kubernetes"); err == nil {
		const variable = " -X k8s.io/component-base/version."
		numbers := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
		s.ldflags += variable + "gitVersion=" + version + variable + "gitMajor=" + numbers[0] + variable + "gitMinor=" + numbers[1]
	}
	if version, err := s.version("github.com/cert-manager/cert-manager"); err == nil {
		s.ldflags += " -X github.com/cert-manager/cert-manager/pkg/util.AppVersion=" + version
	}
	return s, nil
}

// member matches a member in go.work.
var member = regexp.MustCompile(`(?m)^\s+\./(\S+)$`)

// version returns the version of a module that the set requires.
func (s *set) version(source string) (string, error) {
	required := regexp.MustCompile(`(?m)^(?:require)?\s*` + regexp.QuoteMeta(source) + ` (v\S+)`).FindSubmatch(s.pins)
	if required == nil {
		return "", fmt.Errorf("finding the version of %s: no go.mod in %s requires it", source, s.dir)
	}
	return string(required[1]), nil
}

// environment is that of go commands in the set. The user's settings must not change a program: it runs on this machine,
// and go.mod has all pins.
func (s *set) environment() []string {
	return append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK="+s.gowork,
		"GOOS="+runtime.GOOS, "GOARCH="+runtime.GOARCH, "CGO_ENABLED=0")
}

// target is a recipe with all values resolved.
type target struct {
	tool     Tool
	set      *set // nil: go install
	version  string
	path     string // of the program
	pkg      string // to build, or, with a version, to install
	seconds  int
	url      string // of the official binary; empty: none
	member   string // of the archive at url; empty: it is no archive
	checksum string // of the file at url, in hexadecimal; empty: not pinned
	official string // the path of the program, if downloaded
}

// catalog resolves recipes for a checkout.
type catalog struct {
	root, cache string
	minor       string // of Kubernetes; empty: the newest
	mode        mode
	checksums   map[string]string
	downloads   *downloader
	sets        map[string]*set // that were read, by folder
}

func open() (*catalog, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	root, err := Checkout()
	if err != nil {
		return nil, err
	}
	c := &catalog{root: root, cache: filepath.Join(cache, "tools"), minor: os.Getenv("KUBERNETES"), downloads: &shared}
	if c.mode, err = parseMode(os.Getenv("CREDENCE_TOOLS")); err != nil {
		return nil, err
	}
	c.checksums, err = readChecksums(filepath.Join(root, checksumFile))
	return c, err
}

func (c *catalog) modules() string { return filepath.Join(c.root, "integration", "tools", "modules") }

// kubernetes returns the folder of the set of the chosen minor version. The workspace has the newest.
func (c *catalog) kubernetes() (string, error) {
	work, err := os.ReadFile(filepath.Join(c.modules(), "go.work"))
	if err != nil {
		return "", fmt.Errorf("finding the versions of Kubernetes: %w", err)
	}
	if c.minor == "" || slices.Contains(strings.Fields(string(work)), "./"+kubernetes+"/"+c.minor) {
		return workspace, nil
	}
	var known []string
	folders, err := filepath.Glob(filepath.Join(c.modules(), kubernetes, "*", "go.mod"))
	for _, folder := range folders {
		known = append(known, filepath.Base(filepath.Dir(folder)))
	}
	if err != nil || !slices.Contains(known, c.minor) {
		return "", fmt.Errorf("unknown version %q in KUBERNETES; set it to one of %v", c.minor, known)
	}
	return filepath.Join(kubernetes, c.minor), nil
}

// find resolves a recipe.
func (c *catalog) find(tool Tool) (target, error) {
	r, ok := recipes[tool]
	if !ok {
		return target{}, fmt.Errorf("unknown tool %q (one of %v)", tool, All())
	}
	return c.resolve(tool, r)
}

// resolve computes the version and the path of a program. The hash in the path covers everything that determines it.
func (c *catalog) resolve(tool Tool, r recipe) (target, error) {
	t := target{tool: tool, version: r.version, pkg: path.Join(r.source, r.pkg), seconds: r.seconds}
	if strings.HasPrefix(r.pkg, "/") {
		t.pkg = path.Join(module, "integration/tools/modules", r.pkg)
	}
	hash := sha256.New()
	folder := string(tool) + "-" + t.version
	if r.set == "" {
		t.pkg += "@" + r.version
		// golangci-lint refuses code that needs a newer Go than it was built with.
		_, _ = fmt.Fprintf(hash, "%s %s", t.pkg, runtime.Version())
	} else {
		dir, err := r.set, error(nil)
		if dir == kubernetes {
			if dir, err = c.kubernetes(); err != nil {
				return target{}, err
			}
		}
		if t.set, err = c.readSet(dir); err != nil {
			return target{}, fmt.Errorf("finding the version of %s: %w", tool, err)
		}
		if t.version, err = t.set.version(r.source); err != nil {
			return target{}, err
		}
		_, _ = fmt.Fprintf(hash, "%s%s%s", t.set.pins, tags, t.set.ldflags)
		// Programs of a set share a folder, so that one lock protects them: they share packages.
		version, err := t.set.version("k8s.io/kubernetes")
		if folder = "cluster-"; err != nil {
			folder, version = path.Base(r.source)+"-", t.version
		}
		folder += version
	}
	_, _ = fmt.Fprintf(hash, "%s/%s", runtime.GOOS, runtime.GOARCH)
	t.path = filepath.Join(c.cache, folder+"-"+hex.EncodeToString(hash.Sum(nil))[:12], string(tool))
	if r.official.url != "" && runtime.GOOS == "linux" {
		t.url, t.member = r.official.of(t.version, runtime.GOARCH)
		if t.checksum = c.checksums[t.url]; t.checksum != "" {
			t.official = filepath.Join(c.cache, "official-"+t.checksum[:12], string(tool))
		}
	}
	return t, nil
}
