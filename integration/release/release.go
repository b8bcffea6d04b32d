//go:build unix

// Package release makes a release of Credence from a clean tag, and publishes it.
//
// A release has the images, the chart, the credence command for six platforms, a manifest for installations without Helm, a
// software bill of materials (SBOM) for each program, checksums, and a statement of how all of it was built (provenance). The
// same commit and version of Go give the same bytes in each folder and on each machine, so that anybody can check a release
// by building it.
//
// The package signs nothing, and creates no release on GitHub: .github/workflows/release.yml does.
package release

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/images"
)

const (
	// Registry is the registry of published releases, and the one in the chart.
	Registry = "ghcr.io/credence-iam"

	module     = "github.com/credence-iam/credence"
	repository = "https://" + module
	namespace  = "credence" // of an installation
)

// Files of a release whose names do not depend on the version.
const (
	checksumsFile  = "checksums.txt"
	provenanceFile = "provenance.intoto.json"
	manifestFile   = "install.yaml"
	digestsFile    = "digests.yaml"
	krewFile       = "krew.yaml"
	notesFile      = "notes.md"
)

// Platforms returns the platforms of the credence command, as OS/ARCHITECTURE. The images are for those of Linux.
func Platforms() []string {
	return []string{"darwin/amd64", "darwin/arm64", "linux/amd64", "linux/arm64", "windows/amd64", "windows/arm64"}
}

// Config configures [Build].
type Config struct {
	// Version is the version, with or without a v before it, such as v1.2.3 or 1.3.0-rc.1. Required.
	Version string
	// Folder receives the files. Required. Build replaces a folder that an earlier build has made, and no other.
	Folder string
	// Platforms are the platforms of the credence command. Images are for those of Linux. Default: those of [Platforms].
	Platforms []string
	// Builder is the URI of what runs the build, for the provenance. Default: a build by hand.
	Builder string
	// Invocation is the URI of this run of the builder, for the provenance. Default: none.
	Invocation string
	// Progress receives a line for each step. Default: none.
	Progress io.Writer
}

// release is a release that is being built.
type release struct {
	Config

	version string // without v
	commit  string
	date    time.Time // of the commit; the date of all files, so that they do not depend on the time of the build
	goVer   string
	changes string // the section of the changelog
	chart   chart

	work   string // folder of intermediate files
	images []images.Archive
	files  []string // names in Folder
}

// semver matches a version without build metadata, which neither git tags in Go's form nor tags of images can have.
var semver = regexp.MustCompile(`^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)` +
	`(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?$`)

// Build makes a release of the checkout around the working folder. It first checks that the checkout is the clean tag of
// that version, and that chart, changelog and toolchain agree. If it fails, there is no folder, or still the earlier one.
func Build(ctx context.Context, config Config) (err error) {
	r := &release{Config: config, version: strings.TrimPrefix(config.Version, "v")}
	if !semver.MatchString(r.version) {
		return fmt.Errorf("version %q is not a semantic version without build metadata; write it like v1.2.3 or v1.3.0-rc.1", config.Version)
	}
	if len(r.Platforms) == 0 {
		r.Platforms = Platforms()
	}
	for _, platform := range r.Platforms {
		if !slices.Contains(Platforms(), platform) {
			return fmt.Errorf("unknown platform %q; use some of %s", platform, strings.Join(Platforms(), ","))
		}
	}
	if len(r.architectures()) == 0 {
		return errors.New("no platform is of Linux, so there would be no images; add linux/amd64")
	}
	if r.Progress == nil {
		r.Progress = io.Discard
	}
	target := config.Folder
	if err := replaceable(target); err != nil {
		return err
	}
	if err := r.check(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return fmt.Errorf("creating the folder of the release: %w", err)
	}
	temp, err := os.MkdirTemp(filepath.Dir(target), ".unfinished-")
	if err != nil {
		return fmt.Errorf("creating the folder of the release: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	r.work, r.Folder = filepath.Join(temp, "work"), filepath.Join(temp, "release")
	for _, folder := range []string{r.work, r.Folder} {
		if err := os.Mkdir(folder, 0o750); err != nil {
			return fmt.Errorf("creating the folder of the release: %w", err)
		}
	}
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"images", r.writeImages},
		{"chart", r.writeChart},
		{"command", r.writeCommand},
		{"manifest", r.writeManifest},
		{"notes", r.writeNotes},
		{"checksums", r.writeChecksums},
		{"provenance", r.writeProvenance},
	} {
		_, _ = fmt.Fprintf(r.Progress, "making %s\n", step.name)
		if err := step.run(ctx); err != nil {
			return fmt.Errorf("making %s: %w", step.name, err)
		}
	}
	if err := os.RemoveAll(target); err != nil {
		return fmt.Errorf("removing an earlier release: %w", err)
	}
	return os.Rename(r.Folder, target)
}

// replaceable returns an error for a folder with something other than a release.
func replaceable(folder string) error {
	if folder == "" {
		return errors.New("no folder is set; set Folder")
	}
	entries, err := os.ReadDir(folder)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the folder of an earlier release: %w", err)
	}
	if _, err := os.Stat(filepath.Join(folder, checksumsFile)); err != nil {
		return fmt.Errorf("%s is not empty and has no %s, so it is not a release; name another folder", folder, checksumsFile)
	}
	return nil
}

// tag returns the git tag.
func (r *release) tag() string { return "v" + r.version }

// architectures returns the architectures of the images.
func (r *release) architectures() (all []string) {
	for _, platform := range r.Platforms {
		if architecture, ok := strings.CutPrefix(platform, "linux/"); ok {
			all = append(all, architecture)
		}
	}
	return all
}

// write writes a file of the release.
func (r *release) write(name string, content []byte) error {
	r.files = append(r.files, name)
	return os.WriteFile(filepath.Join(r.Folder, name), content, 0o644) //nolint:gosec // published
}

// writeImages writes the archives of the images, their digests as values of the chart, and their SBOMs.
func (r *release) writeImages(ctx context.Context) (err error) {
	if r.images, err = images.Build(ctx, images.Config{
		Folder: r.work, Registry: Registry, Tag: r.version, Architectures: r.architectures(), Progress: r.Progress,
	}); err != nil {
		return err
	}
	var digests strings.Builder
	_, _ = fmt.Fprintf(&digests, "# The images of Credence %s by digest, as values of the chart.\nimages:\n", r.version)
	for _, image := range r.images {
		name := strings.TrimSuffix(filepath.Base(image.Path), ".tar")
		_, _ = fmt.Fprintf(&digests, "  %s:\n    digest: %s\n", strings.TrimPrefix(name, "credence-"), image.Digest)
		archive := name + "_" + r.version + imageSuffix
		r.files = append(r.files, archive)
		path := filepath.Join(r.Folder, archive)
		if err := errors.Join(os.Rename(image.Path, path), os.Chmod(path, 0o644)); err != nil { //nolint:gosec // published
			return err
		}
		product := product{name: name, image: image.Digest}
		for _, architecture := range r.architectures() {
			product.programs = append(product.programs, program{"linux/" + architecture, filepath.Join(r.work, "programs", architecture, name)})
		}
		if err := r.writeSBOM(product); err != nil {
			return err
		}
	}
	return r.write(digestsFile, []byte(digests.String()))
}

const (
	imageSuffix = "_image.tar"
	sbomSuffix  = ".spdx.json"
)
