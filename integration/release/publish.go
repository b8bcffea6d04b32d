//go:build unix

package release

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Types of what refers to an image.
const (
	SBOMType       = types.MediaType("application/spdx+json")
	ProvenanceType = types.MediaType("application/vnd.in-toto+json")
)

// Published is an image or a chart in a registry.
type Published struct {
	Name   string // with the registry, without tag
	Digest string
	SBOM   string // file in the release; empty for a chart
}

// Publish pushes the images and the chart of a release to a registry, such as [Registry], with the SBOM and the provenance
// of each as referrers. Credentials are those of docker login. Publish can be repeated. It never moves a tag: a version that
// has another content there is an error.
func Publish(ctx context.Context, folder, registry string, transport http.RoundTripper) ([]Published, error) {
	files, err := verify(folder)
	if err != nil {
		return nil, err
	}
	options := []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
	if transport != nil {
		options = append(options, remote.WithTransport(transport))
	}
	p := &publisher{folder: folder, options: options}
	var archives, charts []string
	for _, file := range files {
		if strings.HasSuffix(file, imageSuffix) {
			archives = append(archives, filepath.Join(folder, file))
		} else if strings.HasSuffix(file, ".tgz") {
			charts = append(charts, filepath.Join(folder, file))
		}
	}
	if len(archives) == 0 || len(charts) != 1 {
		return nil, fmt.Errorf("%d images and %d charts in %s, want images and 1 chart; run make release", len(archives), len(charts), folder)
	}
	var all []Published
	for _, archive := range archives {
		product, version, _ := strings.Cut(strings.TrimSuffix(filepath.Base(archive), imageSuffix), "_")
		published, err := p.image(archive, path.Join(registry, product), version, product+"_"+version+sbomSuffix)
		if err != nil {
			return nil, fmt.Errorf("publishing %s: %w", archive, err)
		}
		all = append(all, published)
	}
	chart, err := chartImage(charts[0])
	if err != nil {
		return nil, err
	}
	version := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(charts[0]), "credence-"), ".tgz")
	published, err := p.push(chart, path.Join(registry, chartPath), version)
	if err != nil {
		return nil, fmt.Errorf("publishing %s: %w", charts[0], err)
	}
	return append(all, published), nil
}

// verify checks a folder against its checksums, and that its provenance names these checksums. It returns the checked files
// in the order of their names. Nothing else in the folder is part of the release.
func verify(folder string) (files []string, err error) {
	list, err := os.ReadFile(filepath.Join(folder, checksumsFile))
	if err != nil {
		return nil, fmt.Errorf("reading the checksums: %w; run make release", err)
	}
	provenance, err := os.ReadFile(filepath.Join(folder, provenanceFile))
	if err != nil || !bytes.Contains(provenance, []byte(`"`+sum(list)+`"`)) {
		return nil, errors.Join(fmt.Errorf("%s does not name this %s; run make release", filepath.Join(folder, provenanceFile), checksumsFile), err)
	}
	for line := range strings.SplitSeq(strings.TrimSuffix(string(list), "\n"), "\n") {
		want, file, ok := strings.Cut(line, "  ")
		if !ok || file != filepath.Base(file) {
			return nil, fmt.Errorf("%s has the line %q; run make release", checksumsFile, line)
		}
		content, err := os.ReadFile(filepath.Join(folder, file))
		if err != nil {
			return nil, fmt.Errorf("checking a release: %w; run make release", err)
		}
		if sum(content) != want {
			return nil, fmt.Errorf("%s differs from %s; run make release", filepath.Join(folder, file), checksumsFile)
		}
		files = append(files, file)
	}
	return files, nil
}

type publisher struct {
	folder  string
	options []remote.Option
}

// image pushes an archive and its referrers.
func (p *publisher) image(archive, repository, version, sbom string) (_ Published, err error) {
	temp, err := os.MkdirTemp("", "credence-publish-")
	if err != nil {
		return Published{}, fmt.Errorf("creating a folder for the archive: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	content, err := open(archive, temp)
	if err != nil {
		return Published{}, err
	}
	published, err := p.push(content, repository, version)
	if err != nil {
		return Published{}, err
	}
	published.SBOM = sbom
	subject, err := partial.Descriptor(content)
	if err != nil {
		return Published{}, fmt.Errorf("describing the image: %w", err)
	}
	// A subject is named by type, size and digest alone.
	subject = &v1.Descriptor{MediaType: subject.MediaType, Size: subject.Size, Digest: subject.Digest}
	if err := p.attach(subject, repository, sbom, SBOMType); err != nil {
		return Published{}, fmt.Errorf("attaching %s: %w", sbom, err)
	}
	if err := p.attach(subject, repository, provenanceFile, ProvenanceType); err != nil {
		return Published{}, fmt.Errorf("attaching %s: %w", provenanceFile, err)
	}
	return published, nil
}

// attach pushes a file of the release that refers to an image.
func (p *publisher) attach(subject *v1.Descriptor, repository, file string, mediaType types.MediaType) error {
	content, err := os.ReadFile(filepath.Join(p.folder, file))
	if err != nil {
		return err
	}
	image, err := artifact{
		configType: mediaType, config: []byte("{}"), contentType: mediaType, content: content, title: file, subject: subject,
	}.image()
	if err != nil {
		return err
	}
	digest, err := image.Digest()
	if err != nil {
		return fmt.Errorf("computing the digest: %w", err)
	}
	reference, err := name.NewDigest(repository + "@" + digest.String())
	if err != nil {
		return fmt.Errorf("naming the artifact: %w", err)
	}
	return remote.Write(reference, image, p.options...)
}

// pushable is an image or an index of images.
type pushable interface {
	partial.Describable
	remote.Taggable
}

// push pushes content unless it is there.
func (p *publisher) push(content pushable, repository, version string) (Published, error) {
	reference, err := name.NewTag(repository + ":" + version)
	if err != nil {
		return Published{}, fmt.Errorf("reading the name of the registry: %w", err)
	}
	descriptor, err := partial.Descriptor(content)
	if err != nil {
		return Published{}, fmt.Errorf("describing the content: %w", err)
	}
	published := Published{Name: reference.Context().Name(), Digest: descriptor.Digest.String()}
	existing, err := remote.Head(reference, p.options...)
	var failure *transport.Error
	switch {
	case err == nil && existing.Digest != descriptor.Digest:
		return Published{}, fmt.Errorf("%s is published with digest %s, and this is %s; a release never changes, so raise the version",
			reference, existing.Digest, descriptor.Digest)
	case err == nil:
		return published, nil
	case !errors.As(err, &failure) || failure.StatusCode != http.StatusNotFound:
		return Published{}, fmt.Errorf("looking for %s: %w", reference, err)
	}
	switch content := content.(type) {
	case v1.ImageIndex:
		err = remote.WriteIndex(reference, content, p.options...)
	case v1.Image:
		err = remote.Write(reference, content, p.options...)
	default:
		err = fmt.Errorf("%s is neither an image nor an index, but %T", reference, content)
	}
	return published, err
}

// open unpacks an archive of package images into a folder, and returns the image or the index in it.
func open(archive, folder string) (pushable, error) {
	file, err := os.Open(archive)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	root, err := os.OpenRoot(folder)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	packed := tar.NewReader(file)
	for {
		header, err := packed.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if err := unpack(root, header.Name, packed); err != nil {
			return nil, err
		}
	}
	index, err := layout.ImageIndexFromPath(folder)
	if err != nil {
		return nil, fmt.Errorf("reading the archive: %w", err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("reading the archive: %w", err)
	}
	if len(manifest.Manifests) != 1 {
		return nil, fmt.Errorf("the archive has %d images, want 1", len(manifest.Manifests))
	}
	entry := manifest.Manifests[0]
	if entry.MediaType.IsIndex() {
		return index.ImageIndex(entry.Digest)
	}
	return index.Image(entry.Digest)
}

func unpack(root *os.Root, name string, content io.Reader) (err error) {
	if err := root.MkdirAll(path.Dir(name), 0o700); err != nil {
		return err
	}
	file, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	_, err = io.Copy(file, content)
	return err
}
