// Package images makes container images of single static programs, without Docker and without a registry.
//
// An image holds one file, the program, and starts it as a user without rights. There is no shell, no package
// manager and no file that anybody would have to patch. An archive is an OCI image layout in a tar file: what
// containerd imports, and what skopeo, crane and docker read. Equal programs give equal archives, whoever
// makes them and wherever.
//
// It cannot hold programs that need files: a dynamic linker, a list of certificates, a folder to write in.
// Pushing is left to the tools that exist for it.
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

// User and group of every image: no user of any machine, and what such images commonly have. Numbers, since
// there is no file that could give a name a meaning, and the kubelet believes runAsNonRoot only of a number.
const User = "65532:65532"

// Where the annotations of the reference are read: the first by containerd, the second, a tag alone, by
// tools that follow the specification of layouts.
const (
	nameAnnotation = "io.containerd.image.name"
	tagAnnotation  = "org.opencontainers.image.ref.name"
)

// created is the age of images and of what is in them: it must not depend on when they were made.
var created = time.Unix(0, 0).UTC()

// machines are the architectures that images can be made for, all of them with Linux.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// An Image says what is in an image.
type Image struct {
	// Reference is the name that it is imported under, with host and tag, such as
	// localhost/credence-pause:1. Required. Nobody has to serve it.
	Reference string
	// Name is the program's name, at the root of the image's file system. Required.
	Name string
	// Programs are the program's files, by architecture: amd64, arm64. Required. Of one the image is for
	// that platform alone; of more, there is an index.
	Programs map[string]string
	// Annotations describe the image. They become labels too, which more tools show. Default: none.
	Annotations map[string]string
	// Plain leaves the program uncompressed, which is several times faster to make and to import: for an
	// image that is used where it is made, and never downloaded.
	Plain bool
}

// An Archive is an image that was written.
type Archive struct {
	Path      string
	Reference string
	Digest    string // of what the reference names: the image, or the index of several
	Platforms []Platform
}

// A Platform is what an archive has for one platform.
type Platform struct {
	Architecture string
	Digest       string // of the image for this platform
	Program      int64  // bytes
	Layer        int64  // bytes of the layer, compressed unless plain: what a node downloads
}

// Write writes the image as an archive, which is whole or not there.
func (i Image) Write(archive string) (_ Archive, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("making image %s: %w", i.Reference, err)
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

// build makes the index of the layout, with the one entry that the reference names.
func (i Image) build() (v1.ImageIndex, Archive, error) {
	reference, err := name.NewTag(i.Reference, name.StrictValidation)
	if err != nil {
		return nil, Archive{}, fmt.Errorf("reading the reference: %w", err)
	}
	if i.Name == "" || i.Name != path.Base(i.Name) {
		return nil, Archive{}, fmt.Errorf("%q can't name a program", i.Name)
	}
	if len(i.Programs) == 0 {
		return nil, Archive{}, errors.New("there is no program to put into it")
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

// platform makes the image for one platform.
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

// layer makes a layer of files in a tar file.
func (i Image) layer(files []byte) (v1.Layer, error) {
	if i.Plain {
		return static.NewLayer(files, types.OCIUncompressedLayer), nil
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(files)), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.DefaultCompression), tarball.WithCompressedCaching)
}

// checkStatic refuses what would not start in an image: there, the system says "no such file or directory" of
// a program whose dynamic linker is missing, and "exec format error" of one for another processor.
func checkStatic(program []byte, architecture string) error {
	machine, known := machines[architecture]
	if !known {
		return fmt.Errorf("unknown architecture %q (one of %v)", architecture, slices.Sorted(maps.Keys(machines)))
	}
	file, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return fmt.Errorf("not a program for Linux: %w", err)
	}
	if file.Machine != machine || file.Class != elf.ELFCLASS64 {
		return fmt.Errorf("not a program for %s: it is for %v", architecture, file.Machine)
	}
	if file.Type != elf.ET_EXEC && file.Type != elf.ET_DYN {
		return fmt.Errorf("not a program: its type is %v", file.Type)
	}
	for _, segment := range file.Progs {
		if segment.Type == elf.PT_INTERP {
			return errors.New("not static: it wants a dynamic linker, which the image has not (build it with CGO_ENABLED=0)")
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

// add adds a file of root's to a tar file. Nothing of it depends on who writes it, or when.
func add(to *tar.Writer, name string, mode, size int64, content io.Reader) error {
	if err := to.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: size, ModTime: created, Format: tar.FormatUSTAR,
	}); err != nil {
		return err
	}
	_, err := io.Copy(to, content)
	return err
}
