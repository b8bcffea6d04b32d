package images_test

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/credence-iam/credence/integration/images"
)

const hello = "package main\n\nfunc main() { println(\"hello\") }\n"

// compile builds a program of one file in a folder of its own, for both architectures.
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

// open unpacks an archive, and returns its layout.
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

// only returns the one entry of an index.
func only(t *testing.T, index v1.ImageIndex) v1.Descriptor {
	t.Helper()
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 {
		t.Fatalf("%d entries, want one", len(manifest.Manifests))
	}
	return manifest.Manifests[0]
}

// files describes what is in a layer, and returns the content of the last file.
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

func TestTwoPlatformsInOneArchive(t *testing.T) {
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
		t.Errorf("the name in the archive (-want +got):\n%s", diff)
	}
	if entry.MediaType != types.OCIImageIndex || entry.Digest.String() != archive.Digest {
		t.Errorf("the entry is %s %s, want an index and %s", entry.MediaType, entry.Digest, archive.Digest)
	}
	index, err := top.ImageIndex(entry.Digest)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(annotations, manifest.Annotations); diff != "" {
		t.Errorf("annotations of the index (-want +got):\n%s", diff)
	}
	if len(manifest.Manifests) != 2 || len(archive.Platforms) != 2 {
		t.Fatalf("%d images, and %d told, want 2", len(manifest.Manifests), len(archive.Platforms))
	}
	for n, architecture := range images.Architectures() {
		descriptor, told := manifest.Manifests[n], archive.Platforms[n]
		if diff := cmp.Diff(&v1.Platform{OS: "linux", Architecture: architecture}, descriptor.Platform); diff != "" {
			t.Errorf("platform (-want +got):\n%s", diff)
		}
		image, err := index.Image(descriptor.Digest)
		if err != nil {
			t.Fatal(err)
		}
		size := checkImage(t, image, architecture, annotations, read(t, programs[architecture]))
		want := images.Platform{
			Architecture: architecture, Digest: descriptor.Digest.String(),
			Program: int64(len(read(t, programs[architecture]))), Layer: size,
		}
		if diff := cmp.Diff(want, told); diff != "" {
			t.Errorf("told of %s (-want +got):\n%s", architecture, diff)
		}
	}
}

// checkImage looks at one platform's image, and returns the size of its layer.
func checkImage(t *testing.T, image v1.Image, architecture string, annotations map[string]string, program []byte) int64 {
	t.Helper()
	manifest, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(annotations, manifest.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	want := v1.Config{Entrypoint: []string{"/hello"}, User: "65532:65532", Labels: annotations}
	if diff := cmp.Diff(want, config.Config); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	if config.OS != "linux" || config.Architecture != architecture || config.Created.Unix() != 0 {
		t.Errorf("made for %s/%s at %v", config.OS, config.Architecture, config.Created)
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
		t.Error("the program in the image is another one")
	}
	return manifest.Layers[0].Size
}

func TestOnePlatformNeedsNoIndex(t *testing.T) {
	programs := compile(t, hello)
	delete(programs, "arm64")
	archive, err := images.Image{Reference: "localhost/hello:1", Name: "hello", Programs: programs}.Write(filepath.Join(t.TempDir(), "hello.tar"))
	if err != nil {
		t.Fatal(err)
	}
	top := open(t, archive.Path)
	entry := only(t, top)
	if entry.MediaType != types.OCIManifestSchema1 || entry.Digest.String() != archive.Digest {
		t.Errorf("the entry is %s %s, want an image and %s", entry.MediaType, entry.Digest, archive.Digest)
	}
	image, err := top.Image(entry.Digest)
	if err != nil {
		t.Fatal(err)
	}
	checkImage(t, image, "amd64", nil, read(t, programs["amd64"]))
}

func TestPlainIsTheSameImageUncompressed(t *testing.T) {
	programs := compile(t, hello)
	delete(programs, "arm64")
	archive, err := images.Image{Reference: "localhost/hello:1", Name: "hello", Programs: programs, Plain: true}.Write(filepath.Join(t.TempDir(), "hello.tar"))
	if err != nil {
		t.Fatal(err)
	}
	top := open(t, archive.Path)
	image, err := top.Image(only(t, top).Digest)
	if err != nil {
		t.Fatal(err)
	}
	checkImage(t, image, "amd64", nil, read(t, programs["amd64"]))
	manifest, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if layer := manifest.Layers[0]; layer.MediaType != types.OCIUncompressedLayer || layer.Size <= archive.Platforms[0].Program {
		t.Errorf("the layer is %s with %d bytes, for a program of %d", layer.MediaType, layer.Size, archive.Platforms[0].Program)
	}
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

// dynamic turns a program into one that wants a dynamic linker, by giving another type to one of its segments.
func dynamic(t *testing.T, program []byte) []byte {
	t.Helper()
	file, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		t.Fatal(err)
	}
	const table, size = 64, 56 // where a 64-bit ELF file of Go's has its segments, and how large an entry is
	for n, segment := range file.Progs {
		if segment.Type == elf.PT_GNU_STACK {
			changed := bytes.Clone(program)
			binary.LittleEndian.PutUint32(changed[table+n*size:], uint32(elf.PT_INTERP))
			return changed
		}
	}
	t.Fatal("no segment to change")
	return nil
}

func TestRefused(t *testing.T) {
	programs := compile(t, hello)
	dir := t.TempDir()
	file := func(name string, content []byte) map[string]string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return map[string]string{"amd64": path}
	}
	good := images.Image{Reference: "localhost/hello:1", Name: "hello", Programs: programs}
	for what, c := range map[string]struct {
		change func(*images.Image)
		want   string
	}{
		"no reference":          {func(i *images.Image) { i.Reference = "" }, "reading the reference"},
		"no tag":                {func(i *images.Image) { i.Reference = "localhost/hello" }, "reading the reference"},
		"no host":               {func(i *images.Image) { i.Reference = "hello:1" }, "reading the reference"},
		"a bad tag":             {func(i *images.Image) { i.Reference = "localhost/hello:v1+dirty" }, "reading the reference"},
		"no name":               {func(i *images.Image) { i.Name = "" }, `"" can't name a program`},
		"a path as a name":      {func(i *images.Image) { i.Name = "bin/hello" }, `"bin/hello" can't name a program`},
		"no program":            {func(i *images.Image) { i.Programs = nil }, "no program"},
		"a missing program":     {func(i *images.Image) { i.Programs = map[string]string{"amd64": "/nowhere"} }, "/nowhere"},
		"another architecture":  {func(i *images.Image) { i.Programs = map[string]string{"amd64": programs["arm64"]} }, "not a program for amd64: it is for EM_AARCH64"},
		"unknown architecture":  {func(i *images.Image) { i.Programs = map[string]string{"pdp11": programs["arm64"]} }, `unknown architecture "pdp11"`},
		"a script":              {func(i *images.Image) { i.Programs = file("script", []byte("#!/bin/sh\nexit\n")) }, "not a program for Linux"},
		"a dynamic program":     {func(i *images.Image) { i.Programs = file("dynamic", dynamic(t, read(t, programs["amd64"]))) }, "CGO_ENABLED=0"},
		"half a program's file": {func(i *images.Image) { i.Programs = file("half", read(t, programs["amd64"])[:40]) }, "not a program for Linux"},
	} {
		t.Run(what, func(t *testing.T) {
			image, out := good, t.TempDir()
			c.change(&image)
			_, err := image.Write(filepath.Join(out, "hello.tar"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			if left, err := os.ReadDir(out); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestFailedBuildShowsTheCompilersError(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"go.mod": "module example.com/x\n\ngo 1.26\n", "main.go": "package main\n\nfunc main() { undefinedName() }\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	err := images.Compile(t.Context(), ".", "arm64", filepath.Join(dir, "x"))
	if err == nil || !strings.Contains(err.Error(), "undefined: undefinedName") || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("got %v", err)
	}
	if _, err := images.Build(t.Context(), images.Config{}); err == nil {
		t.Error("images were built into no folder")
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := images.Compile(canceled, ".", "arm64", filepath.Join(dir, "x")); !errors.Is(err, context.Canceled) {
		t.Errorf("after its context has ended: %v", err)
	}
}

func TestBuildLocal(t *testing.T) {
	folder := t.TempDir()
	archive, err := images.BuildLocal(t.Context(), folder, "localhost/credence-pause:1", "github.com/credence-iam/credence/integration/images/pause")
	if err != nil {
		t.Fatal(err)
	}
	if archive.Path != filepath.Join(folder, "credence-pause.tar") || archive.Reference != "localhost/credence-pause:1" || len(archive.Platforms) != 1 {
		t.Errorf("got %+v", archive)
	}
	top := open(t, archive.Path)
	image, err := top.Image(only(t, top).Digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil || config.Architecture != runtime.GOARCH || !slices.Equal(config.Config.Entrypoint, []string{"/credence-pause"}) {
		t.Errorf("got %+v, %v", config, err)
	}
}

// TestBuild builds what is shipped, for one architecture.
func TestBuild(t *testing.T) {
	var progress bytes.Buffer
	folder := filepath.Join(t.TempDir(), "images")
	archives, err := images.Build(t.Context(), images.Config{
		Folder: folder, Registry: "registry.example/team", Tag: "test", Architectures: []string{"amd64"}, Progress: &progress,
	})
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"credence-broker", "credence-webhook", "credence-sidecar"}
	if len(archives) != len(names) || strings.Count(progress.String(), "\n") != len(names) {
		t.Fatalf("%d archives; progress: %s", len(archives), progress.String())
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
	// The sidecar is downloaded by every node and runs in every pod: the design's bound for it, in bytes.
	const bound = 11_000_000
	if sidecar := archives[2].Platforms[0]; sidecar.Program > bound || sidecar.Layer > bound/2 {
		t.Errorf("the sidecar has %d bytes, %d to download; want at most %d, and half of that", sidecar.Program, sidecar.Layer, bound)
	}
	// An image is its program and what describes it: together 20 kB more at most.
	const around = 20_000
	info, err := os.Stat(archives[2].Path)
	if err != nil {
		t.Fatal(err)
	}
	if layer := archives[2].Platforms[0].Layer; info.Size() > layer+around {
		t.Errorf("the sidecar's archive has %d bytes with a layer of %d; want at most %d more", info.Size(), layer, around)
	}
}
