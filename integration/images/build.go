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

const module = "github.com/credence-iam/credence"

// products are the programs that clusters run, with the descriptions in their images.
var products = []struct{ name, pkg, description string }{
	{"credence-broker", module + "/cmd/broker", "Exchanges the identities of pods for AWS credentials"},
	{"credence-webhook", module + "/cmd/webhook", "Gives annotated pods the sidecar at admission"},
	{"credence-sidecar", module + "/cmd/sidecar", "Serves AWS credentials to the containers of its pod"},
}

// Architectures returns the architectures that Build builds for by default.
func Architectures() []string { return []string{"amd64", "arm64"} }

// Config configures Build.
type Config struct {
	// Folder receives an archive of each image, NAME.tar, and the programs. Required. Build creates it.
	Folder string
	// Registry is the part of the references before the image's name. Default: localhost. No registry is there, so a
	// cluster cannot pull another image under our name.
	Registry string
	// Tag is the tag of the references. Default: the version that Go records in the programs, or dev without one.
	Tag string
	// Architectures are the architectures to build for. Default: those of function Architectures.
	Architectures []string
	// Plain leaves the programs uncompressed; see Image.
	Plain bool
	// Progress receives a line for each program that is built. Default: none.
	Progress io.Writer
}

// Build builds the images of credence-broker, credence-webhook and credence-sidecar, and returns them in this order. The
// working folder must be in a checkout of Credence.
func Build(ctx context.Context, config Config) ([]Archive, error) {
	if config.Folder == "" {
		return nil, errors.New("building images: no folder is set; set Folder")
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
		// One checkout has one version, for all architectures.
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

// BuildLocal builds the program of a package of this module and an image with it, for programs that tests run in pods.
// The image is plain and only for this machine's architecture. The archive is in folder and has the name in the reference.
func BuildLocal(ctx context.Context, folder, reference, pkg string) (Archive, error) {
	name, _, _ := strings.Cut(path.Base(reference), ":")
	program := filepath.Join(folder, "programs", runtime.GOARCH, name)
	if err := Compile(ctx, pkg, runtime.GOARCH, program); err != nil {
		return Archive{}, err
	}
	image := Image{Reference: reference, Name: name, Programs: map[string]string{runtime.GOARCH: program}, Plain: true}
	return image.Write(filepath.Join(folder, name+".tar"))
}

// Compile is CompileFor for Linux.
func Compile(ctx context.Context, pkg, architecture, file string) error {
	return CompileFor(ctx, pkg, "linux", architecture, file)
}

// CompileFor builds a static program for an operating system and an architecture into a file, and creates the file's folder.
// The same source gives the same bytes in each folder and on each machine with the same version of Go, because CompileFor
// overrides the variables that would change them. If git knows the version of the source, the program records it.
func CompileFor(ctx context.Context, pkg, system, architecture, file string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		return fmt.Errorf("creating the folder of %s: %w", file, err)
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=auto", "-tags=grpcnotrace", //nolint:gosec // the caller's package
		"-ldflags=-s -w", "-o", file, pkg)
	cmd.Env = append(os.Environ(), "GOFLAGS=", "GOWORK=off", "GOEXPERIMENT=", "CGO_ENABLED=0",
		"GOOS="+system, "GOARCH="+architecture, "GOAMD64=v1", "GOARM64=v8.0")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s for %s/%s: %w\n%s", pkg, system, architecture, err, output)
	}
	return nil
}

// builtFrom returns the version and the commit that a program records. They are empty if it records none.
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

// tag returns the tag for a version. A tag cannot have the plus sign before build metadata.
func tag(version string) string {
	if version == "" || version == "(devel)" {
		return "dev"
	}
	return strings.ReplaceAll(version, "+", "-")
}
