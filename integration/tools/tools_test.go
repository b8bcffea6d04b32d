//go:build unix

package tools

import (
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const hello = "package main\n\nfunc main() { print(\"hello\") }\n"

// fake is a recipe for a program of one file, in a checkout of its own.
var fake = recipe{nested: &nested{folder: "fake", source: "example.com/fake"}, source: "example.com/fake", takes: "a moment"}

// fakeCheckout writes that checkout; main is the file.
func fakeCheckout(t *testing.T, main string) (root string) {
	t.Helper()
	root = t.TempDir()
	nested := filepath.Join(root, "integration", "tools", "modules", "fake")
	write(t, filepath.Join(root, "go.mod"), "module "+module+"\n")
	write(t, filepath.Join(nested, "go.mod"), "module "+module+"/integration/tools/modules/fake\n\ngo 1.26\n\n"+
		"require example.com/fake v1.2.3\n\nreplace example.com/fake => ./source\n")
	write(t, filepath.Join(nested, "go.sum"), "")
	write(t, filepath.Join(nested, "source", "go.mod"), "module example.com/fake\n\ngo 1.26\n")
	write(t, filepath.Join(nested, "source", "main.go"), main)
	return root
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func resolve(t *testing.T, r recipe, root, cache string) *target {
	t.Helper()
	built, err := r.resolve("fake", root, cache)
	if err != nil {
		t.Fatal(err)
	}
	return built
}

func folder(t *testing.T, path string) []string {
	t.Helper()
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// runs runs a built program.
func runs(t *testing.T, path string) {
	t.Helper()
	if output, err := exec.CommandContext(t.Context(), path).CombinedOutput(); err != nil || string(output) != "hello" {
		t.Errorf("the built program: %v: %s", err, output)
	}
}

// A safeBuffer is written to by several goroutines.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func TestManyBuildOnce(t *testing.T) {
	root, cache := fakeCheckout(t, hello), t.TempDir()
	var progress safeBuffer
	var wg sync.WaitGroup
	for range 4 {
		target := resolve(t, fake, root, cache)
		wg.Go(func() {
			if err := target.build(t.Context(), &progress); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	lines := strings.Split(progress.String(), "\n")
	if len(lines) != 3 || lines[0] != "building fake v1.2.3 (a moment)" || !strings.HasPrefix(lines[1], "built fake in ") {
		t.Errorf("progress: %q", lines)
	}
	target := resolve(t, fake, root, cache)
	runs(t, target.path)
	if diff := cmp.Diff([]string{"fake", "lock"}, folder(t, filepath.Dir(target.path))); diff != "" {
		t.Errorf("left in the cache (-want +got):\n%s", diff)
	}
}

func TestSlowBuildShowsThatItLives(t *testing.T) {
	heartbeat = time.Millisecond
	t.Cleanup(func() { heartbeat = 30 * time.Second })
	var progress safeBuffer
	if err := resolve(t, fake, fakeCheckout(t, hello), t.TempDir()).build(t.Context(), &progress); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(progress.String(), "\nstill building fake, ") {
		t.Errorf("progress: %q", progress.String())
	}
}

func TestFailedBuildShowsTheCompilersErrorAndLeavesNothing(t *testing.T) {
	target := resolve(t, fake, fakeCheckout(t, "package main\n\nfunc main() { undefinedName() }\n"), t.TempDir())
	write(t, filepath.Join(filepath.Dir(target.path), unfinished+"stale", "fake"), "half a program")
	err := target.build(t.Context(), &safeBuffer{})
	if err == nil || !strings.Contains(err.Error(), "undefined: undefinedName") || !strings.Contains(err.Error(), "building fake v1.2.3") {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff([]string{"lock"}, folder(t, filepath.Dir(target.path))); diff != "" {
		t.Errorf("left in the cache (-want +got):\n%s", diff)
	}
}

func TestBuildEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	cancel(reason)
	if err := resolve(t, fake, fakeCheckout(t, hello), t.TempDir()).build(ctx, &safeBuffer{}); !errors.Is(err, reason) {
		t.Errorf("got %v, want %v", err, reason)
	}
}

func TestPlaceDependsOnWhatIsBuilt(t *testing.T) {
	root, cache := fakeCheckout(t, hello), t.TempDir()
	first := resolve(t, fake, root, cache).path
	if again := resolve(t, fake, root, cache).path; again != first {
		t.Errorf("it moves: %s, %s", first, again)
	}
	if !strings.HasPrefix(filepath.Base(filepath.Dir(first)), "fake-v1.2.3-") {
		t.Errorf("%s does not name the version", first)
	}
	places := map[string]string{first: "as it was"}
	other := func(what, path string) {
		if before, taken := places[path]; taken {
			t.Errorf("%s and %s lie in the same place", what, before)
		}
		places[path] = what
	}
	flags := fake
	flags.nested = &nested{folder: "fake", source: "example.com/fake", ldflags: func(string) string { return " -X a=b" }}
	other("another flag", resolve(t, flags, root, cache).path)
	sums := filepath.Join(root, "integration", "tools", "modules", "fake", "go.sum")
	write(t, sums, "example.com/other v1.0.0 h1:x\n")
	other("another go.sum", resolve(t, fake, root, cache).path)
	write(t, sums, "")
	mod := filepath.Join(filepath.Dir(sums), "go.mod")
	content, err := os.ReadFile(mod)
	if err != nil {
		t.Fatal(err)
	}
	write(t, mod, string(content)+"\nrequire example.com/more v1.0.0\n")
	other("another go.mod", resolve(t, fake, root, cache).path)
}

// TestNestedModuleCanBeTheProgram: what its own files say then decides where it lies.
func TestNestedModuleCanBeTheProgram(t *testing.T) {
	root, cache := fakeCheckout(t, "package unused\n"), t.TempDir()
	own := fake
	own.nested = &nested{folder: "fake", source: "example.com/fake", own: true}
	if _, err := own.resolve("fake", root, cache); err == nil || !strings.Contains(err.Error(), "no Go files") {
		t.Errorf("without a program: got %v", err)
	}
	main := filepath.Join(root, "integration", "tools", "modules", "fake", "main.go")
	write(t, main, hello)
	first := resolve(t, own, root, cache)
	if err := first.build(t.Context(), &safeBuffer{}); err != nil {
		t.Fatal(err)
	}
	runs(t, first.path)
	write(t, main, hello+"\n// More.\n")
	second := resolve(t, own, root, cache)
	write(t, filepath.Join(filepath.Dir(main), "more.go"), "package main\n")
	third := resolve(t, own, root, cache)
	if first.path == second.path || second.path == third.path {
		t.Errorf("changed files lie where the old ones did: %s, %s, %s", first.path, second.path, third.path)
	}
}

func TestSourceOfANestedModule(t *testing.T) {
	folder, err := Source(t.Context(), CertManager)
	if err != nil {
		t.Fatal(err)
	}
	root, err := Checkout()
	if err != nil {
		t.Fatal(err)
	}
	version := resolve(t, recipes[CertManager], root, t.TempDir()).version
	content, err := os.ReadFile(filepath.Join(folder, "go.mod"))
	if err != nil || !strings.HasSuffix(folder, "@"+version) || !strings.HasPrefix(string(content), "module "+certManager.source+"\n") {
		t.Errorf("got %s, %v", folder, err)
	}
	if _, err := Source(t.Context(), Helm); err == nil || !strings.Contains(err.Error(), "helm") {
		t.Errorf("a program without a nested module: got %v", err)
	}
}

// TestInstalledFromAProxy has a module proxy of its own, in a folder.
func TestInstalledFromAProxy(t *testing.T) {
	proxy, modules := t.TempDir(), t.TempDir()
	versions := filepath.Join(proxy, "example.com", "fake", "@v")
	const gomod = "module example.com/fake\n\ngo 1.26\n"
	write(t, filepath.Join(versions, "list"), "v1.2.3\n")
	write(t, filepath.Join(versions, "v1.2.3.info"), `{"Version":"v1.2.3"}`)
	write(t, filepath.Join(versions, "v1.2.3.mod"), gomod)
	var archive bytes.Buffer
	z := zip.NewWriter(&archive)
	for name, content := range map[string]string{"go.mod": gomod, "main.go": hello} {
		w, err := z.Create("example.com/fake@v1.2.3/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(versions, "v1.2.3.zip"), archive.String())
	t.Setenv("GOPROXY", "file://"+proxy)
	t.Setenv("GONOSUMDB", "example.com")
	t.Setenv("GOMODCACHE", modules)
	t.Cleanup(func() { // it is read-only
		if output, err := exec.Command("go", "clean", "-modcache").CombinedOutput(); err != nil { //nolint:noctx // t.Context has ended here
			t.Errorf("go clean -modcache: %v: %s", err, output)
		}
	})

	r := recipe{source: "example.com/fake", version: "v1.2.3"}
	target := resolve(t, r, fakeCheckout(t, hello), t.TempDir())
	if err := target.build(t.Context(), &safeBuffer{}); err != nil {
		t.Fatal(err)
	}
	runs(t, target.path)
}

func TestRecipesResolveHere(t *testing.T) {
	root, err := Checkout()
	if err != nil {
		t.Fatal(err)
	}
	folders := make(map[string]bool)
	for _, tool := range slices.Sorted(maps.Keys(recipes)) {
		target, err := recipes[tool].resolve(tool, root, "/cache")
		if err != nil {
			t.Error(err)
			continue
		}
		if slices.Contains(ControlPlane(), tool) {
			folders[filepath.Dir(target.path)] = true
		}
		if tool == KubeAPIServer && !strings.Contains(target.ldflags, "gitVersion="+target.version+" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37") {
			t.Errorf("kube-apiserver is not told its version: %s", target.ldflags)
		}
	}
	if len(folders) != 1 {
		t.Errorf("the control plane lies in %v, want one folder, for %s", slices.Collect(maps.Keys(folders)), AssetsVariable)
	}
	if _, err := Path(t.Context(), "kube-api", nil); err == nil || !strings.Contains(err.Error(), `"kube-api"`) {
		t.Errorf("an unknown tool: got %v", err)
	}
}

func TestCheckoutIsFoundFromWithin(t *testing.T) {
	root := fakeCheckout(t, hello)
	t.Chdir(filepath.Join(root, "integration", "tools", "modules", "fake", "source")) // two other modules on the way
	found, err := Checkout()
	if err != nil || found != root {
		t.Errorf("got %s, %v, want %s", found, err, root)
	}
	t.Chdir(t.TempDir())
	if _, err := Checkout(); err == nil {
		t.Error("a checkout was found where there is none")
	}
}

func TestAssetsOfTheUserComeFirst(t *testing.T) {
	assets := t.TempDir()
	t.Setenv(AssetsVariable, assets)
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	for _, tool := range []Tool{Etcd, KubeAPIServer} {
		path := filepath.Join(assets, string(tool))
		write(t, path, "")
		if err := os.Chmod(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	assetsTold = sync.Once{}
	var progress safeBuffer
	for _, tool := range []Tool{Etcd, KubeAPIServer} {
		if path, used := asset(tool, &progress); used {
			t.Errorf("without kubectl %s was used", path)
		}
	}
	if got := progress.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "kubectl is missing") {
		t.Errorf("progress: %q", got)
	}
	if Built(Etcd) {
		t.Error("etcd counts as built")
	}

	write(t, filepath.Join(assets, "kubectl"), "")
	if err := os.Chmod(filepath.Join(assets, "kubectl"), 0o700); err != nil {
		t.Fatal(err)
	}
	assetsTold = sync.Once{}
	progress = safeBuffer{}
	for _, tool := range []Tool{Etcd, KubeAPIServer, Kubectl} {
		path, err := Path(t.Context(), tool, &progress)
		if err != nil || path != filepath.Join(assets, string(tool)) {
			t.Errorf("Path of %s: %s, %v", tool, path, err)
		}
	}
	if got := progress.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "using ") {
		t.Errorf("progress: %q", got)
	}
	if !Built(Etcd) || Built(KubeControllerManager) {
		t.Error("want etcd to count as built, and kube-controller-manager not")
	}
}

func TestCacheFollowsXDG(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", "/somewhere")
	if dir, err := CacheDir(); err != nil || dir != "/somewhere/credence" {
		t.Errorf("got %s, %v", dir, err)
	}
	t.Setenv("HOME", "/home/jane")
	t.Setenv("XDG_CACHE_HOME", "")
	if dir, err := CacheDir(); err != nil || !strings.HasPrefix(dir, "/home/jane/") || filepath.Base(dir) != "credence" {
		t.Errorf("got %s, %v", dir, err)
	}
}

func TestTailKeepsTheEnd(t *testing.T) {
	var output tail
	for range 10_000 {
		_, _ = output.Write([]byte("download\n"))
	}
	_, _ = output.Write([]byte(strings.Repeat("x", 2*tailBytes) + "\nlast\n"))
	got := output.String()
	if len(got) > tailBytes || !strings.HasSuffix(got, "x\nlast") {
		t.Errorf("got %d bytes that end with %q", len(got), got[max(0, len(got)-10):])
	}
}
