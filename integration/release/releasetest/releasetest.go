//go:build unix

// Package releasetest prepares repositories from which tests make releases, as a maintainer prepares ours: the version in
// chart and changelog, a commit and a tag. It changes nothing in the checkout, and git sees no configuration of the user. It
// also checks what is published beside an image.
package releasetest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/credence-iam/credence/integration/release"
	"github.com/credence-iam/credence/integration/tools"
)

// Isolate makes git independent of the user's configuration and of the time, until the test ends.
func Isolate(t *testing.T) {
	t.Helper()
	t.Setenv("GIT_CONFIG_GLOBAL", os.DevNull)
	for _, who := range []string{"AUTHOR", "COMMITTER"} {
		t.Setenv("GIT_"+who+"_NAME", "Test")
		t.Setenv("GIT_"+who+"_EMAIL", "test@example.com")
		t.Setenv("GIT_"+who+"_DATE", "2026-01-02T03:04:05+06:00")
	}
}

// Git runs git in a folder, and returns its output.
func Git(t *testing.T, folder string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...) //nolint:gosec // the arguments of tests
	cmd.Dir = folder
	output, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, output)
	}
	return strings.TrimSpace(string(output))
}

// Tag returns a new repository with the files of this checkout as the version, such as 1.2.3, with its tag. Its section of
// the changelog has one line with a link. Isolate must come first. This process reads the files itself, so that Go's test
// cache knows them.
func Tag(t *testing.T, version string) string {
	t.Helper()
	checkout, err := tools.Checkout()
	if err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(t.TempDir(), "origin")
	if err := filepath.WalkDir(checkout, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.Name() == ".git" || entry.Name() == ".build":
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		case !entry.Type().IsRegular():
			return nil
		}
		relative, err := filepath.Rel(checkout, path)
		if err != nil {
			return err
		}
		return copyFile(path, filepath.Join(folder, relative))
	}); err != nil {
		t.Fatal(err)
	}
	for file, change := range map[string]func(string) string{
		"charts/credence/Chart.yaml": func(text string) string {
			return regexp.MustCompile(`(?m)^(version|appVersion): .*$`).ReplaceAllString(text, "$1: "+version)
		},
		"CHANGELOG.md": func(text string) string {
			const heading = "## [Unreleased]\n"
			return strings.Replace(text, heading, heading+"\n## ["+version+"] - 2026-01-02\n\n- See [a page](docs/errors.md).\n", 1)
		},
	} {
		path := filepath.Join(folder, file)
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, []byte(change(string(text))), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	Git(t, folder, "init", "--quiet")
	Git(t, folder, "add", "--all")
	Git(t, folder, "commit", "--quiet", "--message=release")
	Git(t, folder, "tag", "v"+version)
	return folder
}

func copyFile(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(filepath.Dir(to), 0o700), os.WriteFile(to, content, info.Mode()))
}

// CheckReferrers finds SBOM and provenance of a published image by its digest alone, as verifiers do, and compares them with
// the files in the folder of the release.
func CheckReferrers(t *testing.T, folder string, p release.Published, options ...remote.Option) {
	t.Helper()
	image, err := name.NewDigest(p.Name + "@" + p.Digest)
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Referrers(image, options...)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{string(release.SBOMType): p.SBOM, string(release.ProvenanceType): "provenance.intoto.json"}
	if len(manifest.Manifests) != len(files) {
		t.Errorf("%s has %d referrers, want %d", p.Name, len(manifest.Manifests), len(files))
	}
	for _, descriptor := range manifest.Manifests {
		file, ok := files[descriptor.ArtifactType]
		if !ok {
			t.Errorf("%s has a referrer of type %q", p.Name, descriptor.ArtifactType)
			continue
		}
		got := content(t, image.Context().Digest(descriptor.Digest.String()), descriptor.ArtifactType, options)
		if want, err := os.ReadFile(filepath.Join(folder, file)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the referrer of type %s is not %s: %v", descriptor.ArtifactType, file, err)
		}
	}
}

// content returns the content of an artifact.
func content(t *testing.T, artifact name.Digest, mediaType string, options []remote.Option) []byte {
	t.Helper()
	image, err := remote.Image(artifact, options...)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := image.Manifest()
	if err != nil || len(manifest.Layers) != 1 || string(manifest.Layers[0].MediaType) != mediaType {
		t.Fatalf("artifact %s has manifest %+v, %v", artifact, manifest, err)
	}
	layer, err := remote.Layer(artifact.Context().Digest(manifest.Layers[0].Digest.String()), options...)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := layer.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	all, err := io.ReadAll(stream)
	if err != nil {
		t.Fatal(err)
	}
	return all
}
