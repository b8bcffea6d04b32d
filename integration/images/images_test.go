package images_test

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/credence-iam/credence/integration/images"
)

const hello = "package main\n\nfunc main() { println(\"hello\") }\n"

// compile builds a program of one source file for both architectures, in a new folder.
func compile(t *testing.T, source string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{"go.mod": "module example.com/hello\n\ngo 1.26\n", "main.go": source} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	programs := make(map[string]string)
	for _, architecture := range images.Architectures() {
		programs[architecture] = filepath.Join(dir, "out", architecture, "hello")
		if err := images.Compile(t.Context(), ".", architecture, programs[architecture]); err != nil {
			t.Fatal(err)
		}
	}
	return programs
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// open unpacks an archive and returns the index of its layout.
func open(t *testing.T, archive string) v1.ImageIndex {
	t.Helper()
	dir := t.TempDir()
	packed := tar.NewReader(bytes.NewReader(read(t, archive)))
	for {
		header, err := packed.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(packed)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, header.Name) //nolint:gosec // The archive is ours.
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	return index
}

// only returns the only entry of an index.
func only(t *testing.T, index v1.ImageIndex) v1.Descriptor {
	t.Helper()
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 {
		t.Fatalf("the index has %d entries, want 1", len(manifest.Manifests))
	}
	return manifest.Manifests[0]
}

// files returns the headers of the files in a layer, and the content of the last one.
func files(t *testing.T, layer v1.Layer) (headers []tar.Header, content []byte) {
	t.Helper()
	stream, err := layer.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	packed := tar.NewReader(stream)
	for {
		header, err := packed.Next()
		if errors.Is(err, io.EOF) {
			return headers, content
		}
		if err != nil {
			t.Fatal(err)
		}
		if content, err = io.ReadAll(packed); err != nil {
			t.Fatal(err)
		}
		headers = append(headers, tar.Header{
			Typeflag: header.Typeflag, Name: header.Name, Mode: header.Mode, Size: header.Size,
			Uid: header.Uid, Gid: header.Gid, Uname: header.Uname, Gname: header.Gname,
		})
	}
}

func TestTwoPlatforms(t *testing.T) {
	programs := compile(t, hello)
	annotations := map[string]string{"org.opencontainers.image.title": "hello"}
	image := images.Image{Reference: "registry.example/team/hello:1.2.3", Name: "hello", Programs: programs, Annotations: annotations}
	archive, err := image.Write(filepath.Join(t.TempDir(), "hello.tar"))
	if err != nil {
		t.Fatal(err)
	}
	top := open(t, archive.Path)
	entry := only(t, top)
	if diff := cmp.Diff(map[string]string{
		"io.containerd.image.name":          "registry.example/team/hello:1.2.3",
		"org.opencontainers.image.ref.name": "1.2.3",
	}, entry.Annotations); diff != "" {
		t.Errorf("annotations of the entry (-want +got):\n%s", diff)
	}
	if entry.Digest.String() != archive.Digest {
		t.Errorf("the entry has digest %s, Write returned %s", entry.Digest, archive.Digest)
	}
	index, err := top.ImageIndex(entry.Digest)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 2 || len(archive.Platforms) != 2 {
		t.Fatalf("the index has %d images, Write returned %d platforms, want 2", len(manifest.Manifests), len(archive.Platforms))
	}
	for n, architecture := range images.Architectures() {
		descriptor := manifest.Manifests[n]
		if diff := cmp.Diff(&v1.Platform{OS: "linux", Architecture: architecture}, descriptor.Platform); diff != "" {
			t.Errorf("platform (-want +got):\n%s", diff)
		}
		image, err := index.Image(descriptor.Digest)
		if err != nil {
			t.Fatal(err)
		}
		program := read(t, programs[architecture])
		want := images.Platform{
			Architecture: architecture, Digest: descriptor.Digest.String(),
			Program: int64(len(program)), Layer: checkImage(t, image, architecture, annotations, program),
		}
		if diff := cmp.Diff(want, archive.Platforms[n]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", architecture, diff)
		}
	}
}

// checkImage checks the image of one platform, and returns the size of its layer.
func checkImage(t *testing.T, image v1.Image, architecture string, annotations map[string]string, program []byte) int64 {
	t.Helper()
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	want := v1.Config{Entrypoint: []string{"/hello"}, User: "65532:65532", Labels: annotations}
	if diff := cmp.Diff(want, config.Config); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	if config.OS != "linux" || config.Architecture != architecture || config.Created.Unix() != 0 {
		t.Errorf("the image is for %s/%s, created at %v", config.OS, config.Architecture, config.Created)
	}
	layers, err := image.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	headers, content := files(t, layers[0])
	if diff := cmp.Diff([]tar.Header{{Typeflag: tar.TypeReg, Name: "hello", Mode: 0o555, Size: int64(len(program))}}, headers); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if !bytes.Equal(content, program) {
		t.Error("the image has another program")
	}
	size, err := layers[0].Size()
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// TestSameSourceSameArchive builds in two folders.
func TestSameSourceSameArchive(t *testing.T) {
	write := func(source string) images.Archive {
		archive, err := images.Image{Reference: "localhost/hello:1", Name: "hello", Programs: compile(t, source)}.
			Write(filepath.Join(t.TempDir(), "hello.tar"))
		if err != nil {
			t.Fatal(err)
		}
		return archive
	}
	first, second, other := write(hello), write(hello), write(strings.ReplaceAll(hello, "hello", "other"))
	if first.Digest != second.Digest || !bytes.Equal(read(t, first.Path), read(t, second.Path)) {
		t.Errorf("the same source gives %s and %s", first.Digest, second.Digest)
	}
	if first.Digest == other.Digest {
		t.Error("another source gives the same digest")
	}
}

// dynamic returns a copy of a program that needs a dynamic linker, because one of its segments has another type.
func dynamic(t *testing.T, program []byte) []byte {
	t.Helper()
	file, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		t.Fatal(err)
	}
	const table, size = 64, 56 // the offset of the segments in a 64-bit ELF file of Go, and the size of each
	for n, segment := range file.Progs {
		if segment.Type == elf.PT_GNU_STACK {
			changed := bytes.Clone(program)
			binary.LittleEndian.PutUint32(changed[table+n*size:], uint32(elf.PT_INTERP))
			return changed
		}
	}
	t.Fatal("the program has no segment that can be changed")
	return nil
}

func TestRefused(t *testing.T) {
	programs := compile(t, hello)
	file := filepath.Join(t.TempDir(), "dynamic")
	if err := os.WriteFile(file, dynamic(t, read(t, programs["amd64"])), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		program, want string
	}{
		"no file":              {"/nowhere", "/nowhere"},
		"another architecture": {programs["arm64"], "not a program for amd64, but for EM_AARCH64"},
		"dynamic":              {file, "CGO_ENABLED=0"},
	} {
		t.Run(name, func(t *testing.T) {
			out := t.TempDir()
			image := images.Image{Reference: "localhost/hello:1", Name: "hello", Programs: map[string]string{"amd64": c.program}}
			_, err := image.Write(filepath.Join(out, "hello.tar"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if remaining, err := os.ReadDir(out); err != nil || len(remaining) > 0 {
				t.Errorf("Write left %v, %v", remaining, err)
			}
		})
	}
}

// TestBuild builds the published images for one architecture.
func TestBuild(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "images")
	archives, err := images.Build(t.Context(), images.Config{
		Folder: folder, Registry: "registry.example/team", Tag: "test", Architectures: []string{"amd64"},
	})
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"credence-broker", "credence-webhook", "credence-sidecar"}
	if len(archives) != len(names) {
		t.Fatalf("Build returned %d archives, want %d", len(archives), len(names))
	}
	for n, name := range names {
		archive := archives[n]
		if archive.Reference != "registry.example/team/"+name+":test" || archive.Path != filepath.Join(folder, name+".tar") {
			t.Errorf("got %s in %s", archive.Reference, archive.Path)
		}
		top := open(t, archive.Path)
		image, err := top.Image(only(t, top).Digest)
		if err != nil {
			t.Fatal(err)
		}
		config, err := image.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"/" + name}, config.Config.Entrypoint); diff != "" {
			t.Errorf("entrypoint (-want +got):\n%s", diff)
		}
		labels := config.Config.Labels
		if labels["org.opencontainers.image.title"] != name || labels["org.opencontainers.image.licenses"] != "Apache-2.0" ||
			labels["org.opencontainers.image.version"] == "" || labels["org.opencontainers.image.description"] == "" ||
			!strings.HasPrefix(labels["org.opencontainers.image.source"], "https://") {
			t.Errorf("labels of %s: %v", name, labels)
		}
	}
	// Each node downloads the sidecar, and each pod runs it. This is the design's limit, in bytes.
	const limit = 11_000_000
	if sidecar := archives[2].Platforms[0]; sidecar.Program > limit || sidecar.Layer > limit/2 {
		t.Errorf("the sidecar has %d bytes and its download %d, want at most %d and half of that", sidecar.Program, sidecar.Layer, limit)
	}
	// The archive is little more than the layer.
	info, err := os.Stat(archives[2].Path)
	if err != nil {
		t.Fatal(err)
	}
	if layer := archives[2].Platforms[0].Layer; info.Size() > layer+20_000 {
		t.Errorf("the sidecar's archive has %d bytes, its layer %d; want at most 20 kB more", info.Size(), layer)
	}
}
