package main

import (
	"go/build"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
)

func TestMain(m *testing.M) {
	processtest.Main(main)
	testscript.Main(m, map[string]func(){"credence-sidecar": main})
}

// TestScripts runs the program in scripts.
func TestScripts(t *testing.T) {
	if scripts, err := filepath.Glob("testdata/*.txt"); err != nil || len(scripts) == 0 {
		t.Fatalf("testdata has no scripts: %v", err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata", RequireExplicitExec: true, RequireUniqueNames: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"sigterm": sigterm},
		Setup: func(env *testscript.Env) error {
			certstest.NewCA(t).WriteTo(filepath.Join(env.WorkDir, "mounted"))
			env.Setenv("ADDRESS", processtest.FreeAddress(t))
			return nil
		},
	})
}

// sigterm sends SIGTERM to background programs, as the kubelet does. The kill command of testscript cannot send it.
func sigterm(ts *testscript.TestScript, _ bool, _ []string) {
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(syscall.SIGTERM))
	}
}

const module = "github.com/credence-iam/credence"

// forbidden are modules that would make the program large, which runs once in each pod. Each has the reason why the
// program does not need it.
var forbidden = map[string]string{
	"k8s.io/":                        "the sidecar calls only the broker",
	"sigs.k8s.io/":                   "the sidecar calls only the broker",
	"github.com/aws/":                "the broker calls STS",
	"go.opentelemetry.io/":           "the broker creates the spans",
	"golang.org/x/crypto/x509roots/": "the brokers' root certificates are mounted",
	"github.com/cert-manager/":       "the kubelet mounts its certificates",
	"github.com/prometheus/":         "nothing scrapes a pod's loopback",
	"github.com/go-jose/":            "the broker verifies tokens",
	"github.com/evanphx/json-patch/": "the webhook patches",
}

func checkAllowed(t *testing.T, path, where string) {
	t.Helper()
	for prefix, reason := range forbidden {
		if strings.HasPrefix(path+"/", prefix) {
			t.Errorf("%s: the sidecar must not link %s: %s", where, path, reason)
		}
	}
}

// TestModules checks the modules that are linked into this test, which contains the whole program.
func TestModules(t *testing.T) {
	info, ok := debug.ReadBuildInfo()
	if !ok || len(info.Deps) == 0 {
		t.Fatal("the test binary has no list of modules")
	}
	grpc := false
	for _, dep := range info.Deps {
		checkAllowed(t, dep.Path, "linked modules")
		grpc = grpc || dep.Path == "google.golang.org/grpc"
	}
	if !grpc {
		t.Errorf("gRPC is not among %d modules: the test reads the wrong list", len(info.Deps))
	}
}

// TestImports follows the imports of this module's packages, beginning with this one. It reads the files itself. The
// test cache does not know the output of a subprocess, so it would keep an old result.
func TestImports(t *testing.T) {
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatalf("looking for the module's root: %v", err)
	}
	seen := map[string]bool{}
	var visit func(path string)
	visit = func(path string) {
		if seen[path] {
			return
		}
		seen[path] = true
		for _, imported := range imports(t, filepath.Join(root, strings.TrimPrefix(path, module))) {
			checkAllowed(t, imported, path)
			if strings.HasPrefix(imported, module+"/") {
				visit(imported)
			}
		}
	}
	visit(module + "/cmd/sidecar")
	for _, path := range []string{module + "/sidecar", module + "/broker/client", module + "/broker/credential"} {
		if !seen[path] {
			t.Errorf("the imports do not lead to %s: the test reads the wrong files", path)
		}
	}
}

// imports returns the imports of all files in a folder, for all platforms, except tests.
func imports(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no Go files in %s: %v", dir, err)
	}
	var paths []string
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range parsed.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			paths = append(paths, path)
		}
	}
	return paths
}

// Before main, this test is initialized like the program.
func TestTwoProcessors(t *testing.T) {
	if n := runtime.GOMAXPROCS(0); n > 2 {
		t.Errorf("the program uses %d processors, want at most 2", n)
	}
}

// maxSize limits the program in bytes (MB = 10^6), because each node of a cluster downloads it.
const maxSize = 11_000_000

func TestSize(t *testing.T) {
	if testing.Short() {
		t.Skip("not run: -short was given, and this builds the program for two architectures")
	}
	for _, arch := range []string{"amd64", "arm64"} {
		t.Run(arch, func(t *testing.T) {
			binary := filepath.Join(t.TempDir(), "credence-sidecar")
			buildReleased(t, binary, "GOOS=linux", "GOARCH="+arch)
			info, err := os.Stat(binary)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d bytes", info.Size())
			if info.Size() > maxSize {
				t.Errorf("the program has %d bytes, want at most %d", info.Size(), maxSize)
			}
		})
	}
}

// buildReleased builds the program like "make build".
func buildReleased(t *testing.T, file string, env ...string) {
	t.Helper()
	goTool := filepath.Join(build.Default.GOROOT, "bin", "go")
	if _, err := os.Stat(goTool); err != nil {
		goTool = "go"
	}
	cmd := exec.CommandContext(t.Context(), goTool, "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", file, ".")
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
}
