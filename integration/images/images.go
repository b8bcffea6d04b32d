// Package images makes container images of single static programs, without Docker and without a registry.
//
// An image has one file, the program, and runs it as a user without rights. It has no shell, no package manager and no
// other file that would need patches. An archive is an OCI image layout in a tar file, which containerd imports and skopeo,
// crane and docker read. Equal programs give equal archives on all machines.
//
// The package does not support programs that need other files: a dynamic linker, a list of certificates, a writable folder.
// It does not push images; other tools do.
package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// User is the user and group of every image, as in most images of this kind. No machine has a user with this ID. It is a
// number because the image has no file of user names, and the kubelet can check runAsNonRoot only with a number.
const User = "65532:65532"

// The annotations with the reference.
const (
	nameAnnotation = "io.containerd.image.name"          // the whole reference, for containerd
	tagAnnotation  = "org.opencontainers.image.ref.name" // the tag, by the specification of OCI layouts
)

// created is the creation time of all images and files. It is constant, so that equal programs give equal archives.
var created = time.Unix(0, 0).UTC()

// machines has the supported architectures. The operating system is always Linux.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// Image describes an image.
type Image struct {
	// Reference is the image's name in the store of a node, with host and tag, such as localhost/credence-pause:1. Required.
	// No registry needs to have it.
	Reference string
	// Name is the program's name, at the root of the image's file system. Required.
	Name string
	// Programs are the paths of the program, by architecture: amd64, arm64. Required. If there are several, the archive has
	// an index of their images.
	Programs map[string]string
	// Annotations describe the image. They also become labels, because more tools show labels. Default: none.
	Annotations map[string]string
	// Plain leaves the program uncompressed, which makes writing and importing several times faster. It is for images that
	// are never downloaded.
	Plain bool
}

// Archive describes a written image.
type Archive struct {
	Path      string
	Reference string
	Digest    string // of the image, or of the index if there are several platforms
	Platforms []Platform
}

// Platform describes an archive's image for one platform.
type Platform struct {
	Architecture string
	Digest       string
	Program      int64 // bytes
	Layer        int64 // bytes that a node downloads: the layer, compressed unless plain
}

// Write writes the image as an archive. If it fails, there is no archive.
func (i Image) Write(archive string) (_ Archive, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing image %s: %w", i.Reference, err)
		}
	}()
	index, result, err := i.build()
	if err != nil {
		return Archive{}, err
	}
	temp, err := os.MkdirTemp(filepath.Dir(archive), ".unfinished-")
	if err != nil {
		return Archive{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	folder, file := filepath.Join(temp, "layout"), filepath.Join(temp, "archive")
	if _, err := layout.Write(folder, index); err != nil {
		return Archive{}, err
	}
	if err := pack(file, folder); err != nil {
		return Archive{}, err
	}
	if err := os.Rename(file, archive); err != nil {
		return Archive{}, err
	}
	result.Path = archive
	return result, nil
}

// build returns the index of the layout. Its only entry is the image, or the index of several platforms.
func (i Image) build() (v1.ImageIndex, Archive, error) {
	reference, err := name.NewTag(i.Reference, name.StrictValidation)
	if err != nil {
		return nil, Archive{}, fmt.Errorf("reading the reference: %w", err)
	}
	if i.Name == "" || i.Name != path.Base(i.Name) {
		return nil, Archive{}, fmt.Errorf("name %q is not a file name such as credence-pause", i.Name)
	}
	if len(i.Programs) == 0 {
		return nil, Archive{}, errors.New("it has no program")
	}
	result := Archive{Reference: i.Reference}
	platforms := make([]mutate.IndexAddendum, 0, len(i.Programs))
	for _, architecture := range slices.Sorted(maps.Keys(i.Programs)) {
		image, platform, err := i.platform(architecture)
		if err != nil {
			return nil, Archive{}, err
		}
		result.Platforms = append(result.Platforms, platform)
		platforms = append(platforms, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: "linux", Architecture: architecture},
		}})
	}
	entry := platforms[0]
	if len(platforms) > 1 {
		index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), platforms...)
		if len(i.Annotations) > 0 {
			index = mutate.Annotations(index, i.Annotations).(v1.ImageIndex)
		}
		entry = mutate.IndexAddendum{Add: index}
	}
	digest, err := entry.Add.Digest()
	if err != nil {
		return nil, Archive{}, err
	}
	result.Digest = digest.String()
	entry.Annotations = map[string]string{nameAnnotation: reference.Name(), tagAnnotation: reference.TagStr()}
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), entry), result, nil
}

// platform returns the image for one platform.
func (i Image) platform(architecture string) (v1.Image, Platform, error) {
	file := i.Programs[architecture]
	program, err := os.ReadFile(file)
	if err != nil {
		return nil, Platform{}, err
	}
	if err := checkStatic(program, architecture); err != nil {
		return nil, Platform{}, fmt.Errorf("%s: %w", file, err)
	}
	var files bytes.Buffer
	packed := tar.NewWriter(&files)
	if err := add(packed, i.Name, 0o555, int64(len(program)), bytes.NewReader(program)); err != nil {
		return nil, Platform{}, err
	}
	if err := packed.Close(); err != nil {
		return nil, Platform{}, err
	}
	layer, err := i.layer(files.Bytes())
	if err != nil {
		return nil, Platform{}, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.Append(image, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: created}, CreatedBy: "integration/images"},
	})
	if err != nil {
		return nil, Platform{}, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, Platform{}, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", architecture
	config.Created = v1.Time{Time: created}
	config.Config = v1.Config{Entrypoint: []string{"/" + i.Name}, User: User, Labels: i.Annotations}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return nil, Platform{}, err
	}
	if len(i.Annotations) > 0 {
		image = mutate.Annotations(image, i.Annotations).(v1.Image)
	}
	digest, err := image.Digest()
	if err != nil {
		return nil, Platform{}, err
	}
	size, err := layer.Size()
	if err != nil {
		return nil, Platform{}, err
	}
	return image, Platform{
		Architecture: architecture, Digest: digest.String(), Program: int64(len(program)), Layer: size,
	}, nil
}

// layer returns a layer with the files of a tar file.
func (i Image) layer(files []byte) (v1.Layer, error) {
	if i.Plain {
		return static.NewLayer(files, types.OCIUncompressedLayer), nil
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(files)), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.DefaultCompression), tarball.WithCompressedCaching)
}

// checkStatic returns an error for a file that would not start in an image. The errors of Linux there do not help: "no such
// file or directory" if the dynamic linker is missing, and "exec format error" for the program of another processor.
func checkStatic(program []byte, architecture string) error {
	machine, known := machines[architecture]
	if !known {
		return fmt.Errorf("unknown architecture %q; use one of %v", architecture, slices.Sorted(maps.Keys(machines)))
	}
	file, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return fmt.Errorf("not a program for Linux: %w", err)
	}
	if file.Machine != machine || file.Class != elf.ELFCLASS64 {
		return fmt.Errorf("not a program for %s, but for %v", architecture, file.Machine)
	}
	if file.Type != elf.ET_EXEC && file.Type != elf.ET_DYN {
		return fmt.Errorf("not a program, but of type %v", file.Type)
	}
	for _, segment := range file.Progs {
		if segment.Type == elf.PT_INTERP {
			return errors.New("it needs a dynamic linker, which the image does not have; build it with CGO_ENABLED=0")
		}
	}
	return nil
}

// pack writes a folder as a tar file, in the order of the names.
func pack(file, folder string) (err error) {
	out, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	packed := tar.NewWriter(out)
	root := os.DirFS(folder)
	if err := fs.WalkDir(root, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content, err := root.Open(name)
		if err != nil {
			return err
		}
		defer content.Close()
		return add(packed, name, 0o644, info.Size(), content)
	}); err != nil {
		return err
	}
	return packed.Close()
}

// add adds a file, owned by root, to a tar file. The result depends only on the arguments.
func add(to *tar.Writer, name string, mode, size int64, content io.Reader) error {
	if err := to.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: size, ModTime: created, Format: tar.FormatUSTAR,
	}); err != nil {
		return err
	}
	_, err := io.Copy(to, content)
	return err
}
