//go:build unix

package tools

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const hello = "package main\n\nfunc main() { print(\"hello\") }\n"

// fake is a recipe for a program of one file.
var fake = recipe{set: "fake", source: "example.com/fake"}

// fakeCheckout writes a checkout for fake.
func fakeCheckout(t *testing.T, main string) *catalog {
	t.Helper()
	root := t.TempDir()
	write(t, filepath.Join(root, "go.mod"), "module "+module+"\n")
	fakeModule(t, filepath.Join(root, "integration", "tools", "modules", "fake"), "fake", main)
	return &catalog{root: root, cache: t.TempDir(), mode: modeAuto, downloads: new(downloader)}
}

// fakeModule writes a nested module that requires a program example.com/NAME.
func fakeModule(t *testing.T, folder, name, main string) {
	t.Helper()
	write(t, filepath.Join(folder, "go.mod"), "module "+module+"/integration/tools/modules/"+name+"\n\ngo 1.26\n\n"+
		"require example.com/"+name+" v1.2.3\n\nreplace example.com/"+name+" => ./source\n")
	write(t, filepath.Join(folder, "go.sum"), "")
	write(t, filepath.Join(folder, "source", "go.mod"), "module example.com/"+name+"\n\ngo 1.26\n")
	write(t, filepath.Join(folder, "source", "main.go"), main)
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

func resolve(t *testing.T, c *catalog, r recipe) target {
	t.Helper()
	c.sets = nil // the test may have changed files
	resolved, err := c.resolve("fake", r)
	if err != nil {
		t.Fatal(err)
	}
	return resolved
}

// folder returns the names of the files beside a program.
func folder(t *testing.T, program string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(program))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

func runs(t *testing.T, program, want string) {
	t.Helper()
	if output, err := exec.CommandContext(t.Context(), program).CombinedOutput(); err != nil || string(output) != want {
		t.Errorf("%s: %v, output %q, want %q", program, err, output, want)
	}
}

func TestConcurrentBuildsMakeOneProgram(t *testing.T) {
	built := resolve(t, fakeCheckout(t, hello), fake)
	progress, writer := io.Pipe()
	var builds sync.WaitGroup
	for range 4 {
		builds.Go(func() {
			if err := build(t.Context(), []target{built}, writer); err != nil {
				t.Error(err)
			}
		})
	}
	go func() { builds.Wait(); _ = writer.Close() }()
	text, err := io.ReadAll(progress)
	if lines := strings.Split(string(text), "\n"); err != nil || len(lines) != 3 || !strings.HasPrefix(lines[0], "building fake v1.2.3 into ") || !strings.HasPrefix(lines[1], "built fake v1.2.3 in ") {
		t.Errorf("progress: %q, %v", lines, err)
	}
	runs(t, built.path, "hello")
	if diff := cmp.Diff([]string{"fake", "lock"}, folder(t, built.path)); diff != "" {
		t.Errorf("the cache (-want +got):\n%s", diff)
	}
}

func TestFailedBuildLeavesNoProgram(t *testing.T) {
	built := resolve(t, fakeCheckout(t, "package main\n\nfunc main() { undefinedName() }\n"), fake)
	write(t, filepath.Join(filepath.Dir(built.path), unfinished+"stale", "fake"), "half a program")
	err := build(t.Context(), []target{built}, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "undefined: undefinedName") || !strings.Contains(err.Error(), "building fake v1.2.3") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	cancel(reason)
	if err := build(ctx, []target{built}, io.Discard); !errors.Is(err, reason) {
		t.Errorf("after the context ended: got %v, want %v", err, reason)
	}
	if diff := cmp.Diff([]string{"lock"}, folder(t, built.path)); diff != "" {
		t.Errorf("the cache (-want +got):\n%s", diff)
	}
}

// TestWorkspaceBuildsTogether shows that one command builds the programs of all members, with a version that only
// another member requires.
func TestWorkspaceBuildsTogether(t *testing.T) {
	c := fakeCheckout(t, hello)
	fakeModule(t, filepath.Join(c.modules(), "other"), "other", strings.Replace(hello, "hello", "other", 1))
	write(t, filepath.Join(c.modules(), "own", "go.mod"), "module "+module+"/integration/tools/modules/own\n\ngo 1.26\n")
	write(t, filepath.Join(c.modules(), "own", "main.go"), strings.Replace(hello, "hello", "own", 1))
	write(t, filepath.Join(c.modules(), "go.work"), "go 1.26\n\nuse (\n\t./fake\n\t./other\n\t./own\n)\n")
	var batch []target
	for tool, r := range map[Tool]recipe{
		"fake":    {set: workspace, source: "example.com/fake"},
		"renamed": {set: workspace, source: "example.com/other"},
		"own":     {set: workspace, source: "example.com/other", pkg: "/own"},
	} {
		resolved, err := c.resolve(tool, r)
		if err != nil {
			t.Fatal(err)
		}
		batch = append(batch, resolved)
	}
	var progress strings.Builder
	if err := build(t.Context(), batch, &progress); err != nil || strings.Count(progress.String(), "\n") != 2 {
		t.Errorf("%v; progress:\n%s", err, &progress)
	}
	for name, want := range map[string]string{"fake": "hello", "renamed": "other", "own": "own"} {
		runs(t, filepath.Join(filepath.Dir(batch[0].path), name), want)
	}
}

// TestPathDependsOnEveryPin guards against tests that run an old program.
func TestPathDependsOnEveryPin(t *testing.T) {
	c := fakeCheckout(t, hello)
	modules := filepath.Join(c.modules(), "fake")
	paths := make(map[string]string)
	check := func(change string, r recipe) {
		t.Helper()
		path := resolve(t, c, r).path
		if again := resolve(t, c, r).path; again != path || !strings.Contains(path, "fake-v1.2.3-") {
			t.Errorf("%s: got %s and %s", change, path, again)
		}
		if before, taken := paths[path]; taken {
			t.Errorf("%s and %s have the same path", change, before)
		}
		paths[path] = change
	}
	check("no change", fake)
	write(t, filepath.Join(modules, "main.go"), hello)
	check("an own program", fake)
	write(t, filepath.Join(modules, "main.go"), hello+"\n// More.\n")
	check("a changed file", fake)
	write(t, filepath.Join(modules, "more.go"), "package main\n")
	check("another file", fake)
	write(t, filepath.Join(modules, "go.sum"), "example.com/other v1.0.0 h1:x\n")
	check("another go.sum", fake)
	content, err := os.ReadFile(filepath.Join(modules, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(modules, "go.mod"), string(content)+"\nrequire example.com/more v1.0.0\n")
	check("another go.mod", fake)
	installed := recipe{source: "example.com/fake", version: "v1.2.3"}
	check("go install", installed)
	installed.pkg = "cmd"
	check("another package", installed)

	inWork := fake
	inWork.set = workspace
	work := func(change, file, content string) {
		t.Helper()
		write(t, filepath.Join(c.modules(), file), content)
		check(change, inWork)
	}
	work("a workspace", "go.work", "go 1.26\n\nuse (\n\t./fake\n)\n")
	work("another member's sums", "go.work.sum", "example.com/other v1.0.0 h1:x\n")
	fakeModule(t, filepath.Join(c.modules(), "other"), "other", hello)
	work("another member", "go.work", "go 1.26\n\nuse (\n\t./fake\n\t./other\n)\n")
	work("another member's go.sum", "other/go.sum", "example.com/other v1.0.0 h1:x\n")
	work("another member's program", "other/main.go", hello)
	write(t, filepath.Join(c.modules(), "go.work"), "go 1.26\n\nuse (\n\t./fake\n\t./missing\n)\n")
	c.sets = nil
	if _, err := c.resolve("fake", inWork); err == nil || !strings.Contains(err.Error(), "missing/go.mod") {
		t.Errorf("a member that does not exist: got %v", err)
	}
}

func TestRecipesResolveHere(t *testing.T) {
	c, err := open()
	if err != nil {
		t.Fatal(err)
	}
	c.minor = "1.29"
	if _, err = c.find(KubeAPIServer); err == nil || !strings.Contains(err.Error(), "[1.30 1.31 1.32 1.33 1.34 1.35 1.36 1.37]") {
		t.Fatalf("an unknown minor version: got %v", err)
	}
	folders := make(map[string]string)
	for _, minor := range []string{"1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37"} {
		c.minor = minor
		files := make(map[string]Tool) // by folder and name of the go command's output
		for _, tool := range All() {
			resolved, err := c.find(tool)
			if err != nil {
				t.Fatal(err)
			}
			output := filepath.Join(filepath.Dir(resolved.path), outputName(resolved.pkg))
			if other, taken := files[output]; taken {
				t.Errorf("%s: %s and %s have the same output %s", minor, tool, other, output)
			}
			files[output] = tool
		}
		server, err := c.find(KubeAPIServer)
		if err != nil || !strings.HasPrefix(server.version, "v"+minor+".") ||
			!strings.Contains(server.set.ldflags, "gitVersion="+server.version+" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor="+minor[2:]) {
			t.Errorf("%s: kube-apiserver does not get its version %s: %s, %v", minor, server.version, server.set.ldflags, err)
		}
		// Each version of Kubernetes is built of its own modules, with its own etcd.
		etcd, err := c.find(Etcd)
		if err != nil || filepath.Dir(etcd.path) != filepath.Dir(server.path) {
			t.Errorf("%s: etcd is in %s, kube-apiserver in %s, %v", minor, etcd.path, server.path, err)
		}
		folders[filepath.Dir(server.path)] = minor
		helm, err := c.find(Helm)
		if newest := minor == "1.37"; err != nil || (filepath.Dir(helm.path) == filepath.Dir(server.path)) != newest {
			t.Errorf("%s: helm is in %s, kube-apiserver in %s, %v", minor, helm.path, server.path, err)
		}
	}
	for pkg, want := range map[string]string{recipes[Etcd].source: "server", "example.com/x/v2/cmd/y@v2.0.0": "y"} {
		if got := outputName(pkg); got != want {
			t.Errorf("the go command's output for %s: got %s, want %s", pkg, got, want)
		}
	}
	if len(folders) != 8 {
		t.Errorf("folders of 8 versions: %v", folders)
	}
	t.Setenv("KUBERNETES", "")
	if version, err := Kubernetes(); err != nil || !strings.HasPrefix(version, "v1.37.") {
		t.Errorf("the default is %s, %v", version, err)
	}
	if _, err := Path(t.Context(), "kube-api", nil); err == nil || !strings.Contains(err.Error(), `"kube-api"`) {
		t.Errorf("an unknown tool: got %v", err)
	}
}

func TestCheckout(t *testing.T) {
	fake := fakeCheckout(t, hello)
	t.Chdir(filepath.Join(fake.root, "integration", "tools", "modules", "fake", "source")) // two other modules on the way
	if found, err := Checkout(); err != nil || found != fake.root {
		t.Errorf("the checkout: got %s, %v, want %s", found, err, fake.root)
	}
	t.Chdir(t.TempDir())
	if _, err := Checkout(); err == nil {
		t.Error("a checkout was found outside of any")
	}
}

// TestOutputShowsPackages guards the line of progress and the error of a long build.
func TestOutputShowsPackages(t *testing.T) {
	var output compilerOutput
	for _, part := range []string{"go: downloading example.com/a v1.0.0\n", "example.com/a\nexample", ".com/b\n", "# example.com/b\n", "b.go:1:2: wrong\n"} {
		if _, err := output.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := output.status(), "building: 2 packages started, the last is example.com/b"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := string(output.messages), "# example.com/b\nb.go:1:2: wrong\n"; got != want {
		t.Errorf("messages %q, want %q", got, want)
	}
}

func TestProgressEvery30Seconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var progress strings.Builder
		done := report(&progress, func() string { return "building" })
		time.Sleep(65 * time.Second)
		done()
		if got, want := progress.String(), "still building, after 30s\nstill building, after 1m0s\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}
