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

	"github.com/google/go-cmp/cmp"
)

const hello = "package main\n\nfunc main() { print(\"hello\") }\n"

// fake is a recipe for a program of one file.
var fake = recipe{nested: &nested{folder: "fake", source: "example.com/fake"}, pkg: "example.com/fake"}

// fakeCheckout writes a checkout for fake.
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

func resolve(t *testing.T, r recipe, root, cache string) target {
	t.Helper()
	built, err := r.resolve("fake", root, cache)
	if err != nil {
		t.Fatal(err)
	}
	return built
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

func TestConcurrentBuildsMakeOneProgram(t *testing.T) {
	target := resolve(t, fake, fakeCheckout(t, hello), t.TempDir())
	progress, writer := io.Pipe()
	var builds sync.WaitGroup
	for range 4 {
		builds.Go(func() {
			if err := target.build(t.Context(), writer); err != nil {
				t.Error(err)
			}
		})
	}
	go func() { builds.Wait(); _ = writer.Close() }()
	text, err := io.ReadAll(progress)
	if lines := strings.Split(string(text), "\n"); err != nil || len(lines) != 3 || !strings.HasPrefix(lines[0], "building fake v1.2.3") || lines[1] != "built fake" {
		t.Errorf("progress: %q, %v", lines, err)
	}
	if output, err := exec.CommandContext(t.Context(), target.path).CombinedOutput(); err != nil || string(output) != "hello" {
		t.Errorf("the built program: %v: %s", err, output)
	}
	if diff := cmp.Diff([]string{"fake", "lock"}, folder(t, target.path)); diff != "" {
		t.Errorf("the cache (-want +got):\n%s", diff)
	}
}

func TestFailedBuildLeavesNoProgram(t *testing.T) {
	target := resolve(t, fake, fakeCheckout(t, "package main\n\nfunc main() { undefinedName() }\n"), t.TempDir())
	write(t, filepath.Join(filepath.Dir(target.path), unfinished+"stale", "fake"), "half a program")
	err := target.build(t.Context(), io.Discard)
	if err == nil || !strings.Contains(err.Error(), "undefined: undefinedName") || !strings.Contains(err.Error(), "building fake v1.2.3") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	cancel(reason)
	if err := target.build(ctx, io.Discard); !errors.Is(err, reason) {
		t.Errorf("after the context ended: got %v, want %v", err, reason)
	}
	if diff := cmp.Diff([]string{"lock"}, folder(t, target.path)); diff != "" {
		t.Errorf("the cache (-want +got):\n%s", diff)
	}
}

// TestPathDependsOnEveryPin guards against tests that run an old program.
func TestPathDependsOnEveryPin(t *testing.T) {
	root, cache := fakeCheckout(t, hello), t.TempDir()
	modules := filepath.Join(root, "integration", "tools", "modules", "fake")
	own := fake
	own.nested = &nested{folder: "fake", source: "example.com/fake", own: true}
	if _, err := own.resolve("fake", root, cache); err == nil || !strings.Contains(err.Error(), "no Go files") {
		t.Errorf("without a program: got %v", err)
	}
	paths := make(map[string]string)
	check := func(change string, r recipe) {
		t.Helper()
		path := resolve(t, r, root, cache).path
		if again := resolve(t, r, root, cache).path; again != path || !strings.Contains(path, "fake-v1.2.3-") {
			t.Errorf("%s: got %s and %s", change, path, again)
		}
		if before, taken := paths[path]; taken {
			t.Errorf("%s and %s have the same path", change, before)
		}
		paths[path] = change
	}
	check("no change", fake)
	flags := fake
	flags.nested = &nested{folder: "fake", source: "example.com/fake", ldflags: func(string) string { return " -X a=b" }}
	check("another flag", flags)
	write(t, filepath.Join(modules, "main.go"), hello)
	check("an own program", own)
	write(t, filepath.Join(modules, "main.go"), hello+"\n// More.\n")
	check("a changed file", own)
	write(t, filepath.Join(modules, "more.go"), "package main\n")
	check("another file", own)
	write(t, filepath.Join(modules, "go.sum"), "example.com/other v1.0.0 h1:x\n")
	check("another go.sum", fake)
	content, err := os.ReadFile(filepath.Join(modules, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(modules, "go.mod"), string(content)+"\nrequire example.com/more v1.0.0\n")
	check("another go.mod", fake)
	installed := recipe{pkg: "example.com/fake", version: "v1.2.3"}
	check("go install", installed)
	installed.pkg += "/cmd"
	check("another package", installed)
}

func TestRecipesResolveHere(t *testing.T) {
	root, err := Checkout()
	if err != nil {
		t.Fatal(err)
	}
	for _, tool := range All() {
		target, err := recipes[tool].resolve(tool, root, "/cache")
		if err != nil {
			t.Error(err)
		}
		if tool == KubeAPIServer && !strings.Contains(target.ldflags, "gitVersion="+target.version+" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37") {
			t.Errorf("kube-apiserver does not get its version: %s", target.ldflags)
		}
	}
	if _, err := Path(t.Context(), "kube-api", nil); err == nil || !strings.Contains(err.Error(), `"kube-api"`) {
		t.Errorf("an unknown tool: got %v", err)
	}
	fake := fakeCheckout(t, hello)
	t.Chdir(filepath.Join(fake, "integration", "tools", "modules", "fake", "source")) // two other modules on the way
	if found, err := Checkout(); err != nil || found != fake {
		t.Errorf("the checkout: got %s, %v, want %s", found, err, fake)
	}
	t.Chdir(t.TempDir())
	if _, err := Checkout(); err == nil {
		t.Error("a checkout was found outside of any")
	}
}
