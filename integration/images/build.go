package images

import (
	"cmp"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
)

// module is ours: whoever builds does so from somewhere inside it.
const module = "github.com/credence-iam/credence"

// products are the programs that clusters run, and what their images say of them.
var products = []struct{ name, pkg, description string }{
	{"credence-broker", module + "/cmd/broker", "Exchanges the identities of pods for AWS credentials"},
	{"credence-webhook", module + "/cmd/webhook", "Gives annotated pods the sidecar at admission"},
	{"credence-sidecar", module + "/cmd/sidecar", "Serves AWS credentials to the containers of its pod"},
}

// Architectures are what Build builds for by default.
func Architectures() []string { return []string{"amd64", "arm64"} }

// Config says how the images of Credence are built.
type Config struct {
	// Folder gets an archive for each image, NAME.tar, and the programs. Required; it is made.
	Folder string
	// Registry begins the references, up to the image's name. Default: localhost, which nobody serves, so
	// that no cluster can take somebody else's image for ours.
	Registry string
	// Tag ends the references. Default: the version that Go records in the programs, else dev.
	Tag string
	// Architectures to build for. Default: Architectures().
	Architectures []string
	// Plain leaves the programs uncompressed; see Image.
	Plain bool
	// Progress gets a line for each program that is built. Default: nobody is told.
	Progress io.Writer
}

// Build builds the images of Credence from the checkout around the working folder: credence-broker,
// credence-webhook and credence-sidecar, in this order.
func Build(ctx context.Context, config Config) ([]Archive, error) {
	if config.Folder == "" {
		return nil, errors.New("building images: no folder to put them into")
	}
	if len(config.Architectures) == 0 {
		config.Architectures = Architectures()
	}
	if config.Progress == nil {
		config.Progress = io.Discard
	}
	var archives []Archive
	for _, product := range products {
		image := Image{Name: product.name, Programs: make(map[string]string), Plain: config.Plain}
		for _, architecture := range config.Architectures {
			_, _ = fmt.Fprintf(config.Progress, "building %s for %s\n", product.name, architecture)
			program := filepath.Join(config.Folder, "programs", architecture, product.name)
			if err := Compile(ctx, product.pkg, architecture, program); err != nil {
				return nil, err
			}
			image.Programs[architecture] = program
		}
		// All are of one version: it is one build of one checkout.
		version, revision, err := builtFrom(image.Programs[config.Architectures[0]])
		if err != nil {
			return nil, fmt.Errorf("reading the version of %s: %w", product.name, err)
		}
		image.Reference = path.Join(cmp.Or(config.Registry, "localhost"), product.name) + ":" + cmp.Or(config.Tag, tag(version))
		image.Annotations = map[string]string{
			"org.opencontainers.image.title":       product.name,
			"org.opencontainers.image.description": product.description,
			"org.opencontainers.image.source":      "https://" + module,
			"org.opencontainers.image.licenses":    "Apache-2.0",
			"org.opencontainers.image.version":     version,
		}
		if revision != "" {
			image.Annotations["org.opencontainers.image.revision"] = revision
		}
		archive, err := image.Write(filepath.Join(config.Folder, product.name+".tar"))
		if err != nil {
			return nil, err
		}
		archives = append(archives, archive)
	}
	return archives, nil
}

// BuildLocal builds the program in a package of this module, and an image of it, for this machine's
// architecture alone and plain: what tests run in pods beside Credence. The archive lies in folder, under the
// name in the reference.
func BuildLocal(ctx context.Context, folder, reference, pkg string) (Archive, error) {
	name, _, _ := strings.Cut(path.Base(reference), ":")
	program := filepath.Join(folder, "programs", runtime.GOARCH, name)
	if err := Compile(ctx, pkg, runtime.GOARCH, program); err != nil {
		return Archive{}, err
	}
	image := Image{Reference: reference, Name: name, Programs: map[string]string{runtime.GOARCH: program}, Plain: true}
	return image.Write(filepath.Join(folder, name+".tar"))
}

// Compile builds a static program for Linux into a file, whose folder it makes. The same source gives the
// same bytes in any folder and on any machine with the same Go, and the version of the source is recorded
// where git can tell it: so nothing of the environment counts that would change what is built.
func Compile(ctx context.Context, pkg, architecture, file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		return fmt.Errorf("making the folder of %s: %w", file, err)
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=auto", "-tags=grpcnotrace", //nolint:gosec // builds what it is told
		"-ldflags=-s -w", "-o", file, pkg)
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "GOEXPERIMENT=", "CGO_ENABLED=0",
		"GOOS=linux", "GOARCH="+architecture, "GOAMD64=v1", "GOARM64=v8.0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s for linux/%s: %w\n%s", pkg, architecture, err, output)
	}
	return nil
}

// builtFrom returns the version that a program says it was built from, and the commit; empty without one.
func builtFrom(program string) (version, revision string, err error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "", "", err
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			revision = setting.Value
		}
	}
	return info.Main.Version, revision, nil
}

// tag makes a tag of a version: build metadata begins with a sign that no tag may have.
func tag(version string) string {
	if version == "" || version == "(devel)" {
		return "dev"
	}
	return strings.ReplaceAll(version, "+", "-")
}
