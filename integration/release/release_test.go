//go:build unix

package release_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/release"
	"github.com/credence-iam/credence/integration/release/releasetest"
	"github.com/credence-iam/credence/integration/tools"
)

const version = "0.2.0"

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// build builds a release in a clone, and returns its folder.
func build(t *testing.T, clone, version string) string {
	t.Helper()
	t.Chdir(clone)
	folder := filepath.Join(clone, ".build", "release")
	if err := release.Build(t.Context(), release.Config{Version: version, Folder: folder, Platforms: []string{"linux/" + runtime.GOARCH}}); err != nil {
		t.Fatal(err)
	}
	return folder
}

// TestRelease builds a release twice, publishes it, and compares what users get.
func TestRelease(t *testing.T) {
	if testing.Short() && !tools.Built(tools.Helm) {
		t.Skip("-short, and helm is not built (go run ./integration/tools/install helm)")
	}
	releasetest.Isolate(t)
	origin := releasetest.Tag(t, version)
	first, second := filepath.Join(t.TempDir(), "one"), filepath.Join(t.TempDir(), "another", "folder")
	releasetest.Git(t, origin, "clone", "--quiet", origin, first)
	releasetest.Git(t, origin, "clone", "--quiet", origin, second)
	files := build(t, first, "v"+version)
	t.Run("reproducible", func(t *testing.T) {
		t.Setenv("TZ", "Asia/Tokyo")
		t.Setenv("GOFLAGS", "-tags=other")
		compare(t, files, build(t, second, version))
	})
	t.Run("version", func(t *testing.T) { checkVersion(t, files) })
	t.Run("provenance", func(t *testing.T) { checkProvenance(t, files, releasetest.Git(t, first, "rev-parse", "HEAD")) })
	t.Run("descriptions", func(t *testing.T) { checkDescriptions(t, files) })
	t.Run("chart", func(t *testing.T) { checkChart(t, files) })
	t.Run("published", func(t *testing.T) { checkPublished(t, files) })
}

// compare requires two folders with equal files, and these files.
func compare(t *testing.T, first, second string) {
	t.Helper()
	platform := "linux_" + runtime.GOARCH
	want := []string{
		"checksums.txt", "credence-0.2.0.tgz", "credence-broker_0.2.0.spdx.json", "credence-broker_0.2.0_image.tar",
		"credence-sidecar_0.2.0.spdx.json", "credence-sidecar_0.2.0_image.tar", "credence-webhook_0.2.0.spdx.json",
		"credence-webhook_0.2.0_image.tar", "credence_0.2.0.spdx.json", "credence_0.2.0_" + platform + ".tar.gz",
		"digests.yaml", "install.yaml", "krew.yaml", "notes.md", "provenance.intoto.json",
	}
	for _, folder := range []string{first, second} {
		entries, err := os.ReadDir(folder)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, entry := range entries {
			names = append(names, entry.Name())
		}
		if diff := cmp.Diff(want, names); diff != "" {
			t.Fatalf("files in %s (-want +got):\n%s", folder, diff)
		}
	}
	for _, file := range want {
		if !bytes.Equal(read(t, filepath.Join(first, file)), read(t, filepath.Join(second, file))) {
			t.Errorf("%s differs between two builds", file)
		}
	}
}

// command returns the file credence in the archive of the command.
func command(t *testing.T, folder string) []byte {
	t.Helper()
	stream, err := gzip.NewReader(bytes.NewReader(read(t, filepath.Join(folder, "credence_"+version+"_linux_"+runtime.GOARCH+".tar.gz"))))
	if err != nil {
		t.Fatal(err)
	}
	return firstFile(t, stream, "credence")
}

func firstFile(t *testing.T, stream io.Reader, name string) []byte {
	t.Helper()
	archive := tar.NewReader(stream)
	header, err := archive.Next()
	if err != nil || header.Name != name {
		t.Fatalf("the first file is %v, want %s: %v", header, name, err)
	}
	content, err := io.ReadAll(archive)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func checkVersion(t *testing.T, folder string) {
	program := filepath.Join(t.TempDir(), "credence")
	if err := os.WriteFile(program, command(t, folder), 0o700); err != nil {
		t.Fatal(err)
	}
	if runtime.GOOS != "linux" {
		t.Skip("the program of this release is for Linux")
	}
	output, err := exec.CommandContext(t.Context(), program, "--version").CombinedOutput()
	if string(output) != "credence version v"+version+"\n" || err != nil {
		t.Errorf("credence --version prints %q, %v", output, err)
	}
}

// checkProvenance compares the statement with the files, and with the list of checksums.
func checkProvenance(t *testing.T, folder, commit string) {
	var statement struct {
		Type          string `json:"_type"`
		PredicateType string
		Subject       []struct {
			Name   string
			Digest struct{ SHA256 string }
		}
		Predicate struct {
			BuildDefinition struct {
				ExternalParameters   struct{ Ref string }
				ResolvedDependencies []struct{ Digest struct{ GitCommit string } }
			}
		}
	}
	if err := json.Unmarshal(read(t, filepath.Join(folder, "provenance.intoto.json")), &statement); err != nil {
		t.Fatal(err)
	}
	if statement.Type != "https://in-toto.io/Statement/v1" || statement.PredicateType != "https://slsa.dev/provenance/v1" {
		t.Errorf("the statement has types %q and %q", statement.Type, statement.PredicateType)
	}
	build := statement.Predicate.BuildDefinition
	if build.ExternalParameters.Ref != "refs/tags/v"+version || len(build.ResolvedDependencies) != 1 || build.ResolvedDependencies[0].Digest.GitCommit != commit {
		t.Errorf("the statement names %+v, want commit %s", build, commit)
	}
	digests := map[string]string{}
	for _, subject := range statement.Subject {
		digests[subject.Name] = subject.Digest.SHA256
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	checksums := string(read(t, filepath.Join(folder, "checksums.txt")))
	for _, entry := range entries {
		file := entry.Name()
		if file == "provenance.intoto.json" {
			continue
		}
		digest := fmt.Sprintf("%x", sha256.Sum256(read(t, filepath.Join(folder, file))))
		if digests[file] != digest {
			t.Errorf("the statement has digest %q for %s, want %s", digests[file], file, digest)
		}
		if file != "checksums.txt" && !strings.Contains(checksums, digest+"  "+file+"\n") {
			t.Errorf("checksums.txt lacks %s", file)
		}
	}
	if len(digests) != len(entries)-1+4 { // three images and the chart
		t.Errorf("the statement has %d subjects for %d files", len(digests), len(entries))
	}
}

// checkDescriptions checks the files that say what to install: the plugin, the manifest and the notes.
func checkDescriptions(t *testing.T, folder string) {
	checksums := string(read(t, filepath.Join(folder, "checksums.txt")))
	var plugin struct {
		Spec struct {
			Version   string
			Platforms []struct{ URI, SHA256, Bin string }
		}
	}
	if err := yaml.Unmarshal(read(t, filepath.Join(folder, "krew.yaml")), &plugin); err != nil {
		t.Fatal(err)
	}
	if plugin.Spec.Version != "v"+version || len(plugin.Spec.Platforms) != 1 || !strings.Contains(checksums,
		plugin.Spec.Platforms[0].SHA256+"  "+filepath.Base(plugin.Spec.Platforms[0].URI)+"\n") {
		t.Errorf("the plugin is %+v, want the archive in\n%s", plugin, checksums)
	}
	manifest, notes := string(read(t, filepath.Join(folder, "install.yaml"))), string(read(t, filepath.Join(folder, "notes.md")))
	for component, digest := range digests(t, folder) {
		reference := release.Registry + "/credence-" + component + "@" + digest
		if strings.Count(manifest, reference) != 1 {
			t.Errorf("install.yaml has %s %d times, want once", reference, strings.Count(manifest, reference))
		}
		if !strings.Contains(notes, digest) {
			t.Errorf("the notes lack %s", reference)
		}
	}
	for _, helm := range []string{"helm.sh/", "managed-by: Helm", "credence-check"} {
		if strings.Contains(manifest, helm) {
			t.Errorf("install.yaml has %q, which is for Helm alone", helm)
		}
	}
	if !strings.Contains(manifest, "kind: Namespace\n") {
		t.Error("install.yaml has no namespace")
	}
	if want := "- See [a page](https://github.com/credence-iam/credence/blob/v0.2.0/docs/errors.md)."; !strings.Contains(notes, want) {
		t.Errorf("the notes lack %q:\n%s", want, notes)
	}
}

// checkChart compares the files in the chart with those that helm package takes.
func checkChart(t *testing.T, folder string) {
	helm, err := tools.Path(t.Context(), tools.Helm, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	packaged := t.TempDir()
	if output, err := exec.CommandContext(t.Context(), helm, "package", "charts/credence", "--destination="+packaged).CombinedOutput(); err != nil {
		t.Fatalf("helm package: %v\n%s", err, output)
	}
	list := func(path string) (names []string) {
		stream, err := gzip.NewReader(bytes.NewReader(read(t, path)))
		if err != nil {
			t.Fatal(err)
		}
		archive := tar.NewReader(stream)
		for {
			header, err := archive.Next()
			if errors.Is(err, io.EOF) {
				slices.Sort(names)
				return names
			}
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, header.Name)
		}
	}
	archive := "credence-" + version + ".tgz"
	want := list(filepath.Join(packaged, archive))
	if diff := cmp.Diff(want, list(filepath.Join(folder, archive))); diff != "" || len(want) < 10 {
		t.Errorf("the chart has other files than from helm package (-want +got):\n%s", diff)
	}
}

// digests returns the digests in digests.yaml, by component.
func digests(t *testing.T, folder string) map[string]string {
	t.Helper()
	var values struct {
		Images map[string]struct{ Digest string }
	}
	if err := yaml.Unmarshal(read(t, filepath.Join(folder, "digests.yaml")), &values); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for component, image := range values.Images {
		all[component] = image.Digest
	}
	if len(all) != 3 {
		t.Fatalf("digests.yaml has %v, want three", all)
	}
	return all
}

// TestRefused breaks one condition of a release at a time, in a small repository.
func TestRefused(t *testing.T) {
	const ready = "v1.2.3-rc.1"
	for name, c := range map[string]struct {
		version string
		change  func(t *testing.T, folder string)
		want    string
	}{
		"not a version":  {version: "1.2", want: `version "1.2" is not a semantic version`},
		"build metadata": {version: "v1.2.3+linux", want: "without build metadata"},
		"an uncommitted file": {
			change: func(t *testing.T, folder string) { write(t, filepath.Join(folder, "new.go"), "package x") },
			want:   "the work tree has changes; commit or remove them:\n?? new.go",
		},
		"no tag": {version: "1.2.4", want: "tag v1.2.4 does not exist; create it with git tag --sign v1.2.4"},
		"a tag elsewhere": {
			change: func(t *testing.T, folder string) {
				releasetest.Git(t, folder, "commit", "--quiet", "--allow-empty", "--message=later")
			},
			want: "run git checkout v1.2.3-rc.1",
		},
		"another version of the chart": {
			change: edit("charts/credence/Chart.yaml", "version: 1.2.3-rc.1", "version: 1.2.2"),
			want:   `charts/credence/Chart.yaml is "1.2.2"; set it to 1.2.3-rc.1`,
		},
		"another version of the images": {
			change: edit("charts/credence/Chart.yaml", "appVersion: 1.2.3-rc.1", "appVersion: 1.2.2"),
			want:   `appVersion of charts/credence/Chart.yaml is "1.2.2"`,
		},
		"no section of the changelog": {
			change: edit("CHANGELOG.md", "[1.2.3-rc.1] - 2026-01-02", "[1.2.2] - 2026-01-02"),
			want:   `CHANGELOG.md has no section "## [1.2.3-rc.1] - YYYY-MM-DD" with content; move the lines of [Unreleased] there`,
		},
		"no date in the changelog":  {change: edit("CHANGELOG.md", " - 2026-01-02", ""), want: "CHANGELOG.md has no section"},
		"nothing in the changelog":  {change: edit("CHANGELOG.md", "- A change.\n", ""), want: "CHANGELOG.md has no section"},
		"another version of Go":     {change: edit("go.mod", "toolchain "+runtime.Version(), "toolchain go1.26.1"), want: "set GOTOOLCHAIN=go1.26.1"},
		"no version of Go":          {change: edit("go.mod", "toolchain "+runtime.Version(), ""), want: "go.mod has no line toolchain"},
		"another folder of results": {change: func(t *testing.T, folder string) { write(t, filepath.Join(folder, ".build/release/precious"), "") }, want: "is not a release; name another folder"},
	} {
		t.Run(name, func(t *testing.T) {
			releasetest.Isolate(t)
			folder := t.TempDir()
			for file, content := range map[string]string{
				"go.mod":                     "module github.com/credence-iam/credence\n\ngo 1.26.0\n\ntoolchain " + runtime.Version() + "\n",
				"charts/credence/Chart.yaml": "version: 1.2.3-rc.1\nappVersion: 1.2.3-rc.1\n",
				"CHANGELOG.md":               "# Changelog\n\n## [Unreleased]\n\n## [1.2.3-rc.1] - 2026-01-02\n\n- A change.\n\n[Unreleased]: https://example.com\n",
				".gitignore":                 "/.build/\n",
			} {
				write(t, filepath.Join(folder, file), content)
			}
			releasetest.Git(t, folder, "init", "--quiet")
			releasetest.Git(t, folder, "add", "--all")
			releasetest.Git(t, folder, "commit", "--quiet", "--message=release")
			releasetest.Git(t, folder, "tag", ready)
			if c.change != nil {
				c.change(t, folder)
			}
			if c.version == "" {
				c.version = ready
			}
			t.Chdir(folder)
			target := filepath.Join(folder, ".build", "release")
			err := release.Build(t.Context(), release.Config{Version: c.version, Folder: target, Platforms: []string{"linux/amd64"}})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if _, err := os.Stat(filepath.Join(target, "checksums.txt")); !os.IsNotExist(err) {
				t.Errorf("there is a release: %v", err)
			}
		})
	}
}

// edit returns a change that replaces text in a file, and moves the tag to it.
func edit(file, from, to string) func(t *testing.T, folder string) {
	return func(t *testing.T, folder string) {
		path := filepath.Join(folder, file)
		text := strings.ReplaceAll(string(read(t, path)), from, to)
		if text == string(read(t, path)) {
			t.Fatalf("%s has no %q", file, from)
		}
		write(t, path, text)
		releasetest.Git(t, folder, "commit", "--quiet", "--all", "--message=change")
		releasetest.Git(t, folder, "tag", "--force", "v1.2.3-rc.1")
	}
}
