//go:build unix

package release

import (
	"bytes"
	"encoding/json"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// artifact is content in a registry that is no program's image: a chart, or what refers to an image. A registry keeps it
// as a manifest with one layer.
type artifact struct {
	configType  types.MediaType // also tells registries the type of the artifact
	config      []byte
	contentType types.MediaType
	content     []byte
	title       string         // the content's file name; may be empty
	subject     *v1.Descriptor // that it refers to; may be nil
	annotations map[string]string
}

// image returns the artifact in the form in which it is pushed.
func (a artifact) image() (v1.Image, error) {
	config, err := describe(a.config, a.configType)
	if err != nil {
		return nil, err
	}
	layer, err := describe(a.content, a.contentType)
	if err != nil {
		return nil, err
	}
	if a.title != "" {
		layer.Annotations = map[string]string{"org.opencontainers.image.title": a.title}
	}
	manifest, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: string(a.configType),
		Config: config, Layers: []v1.Descriptor{layer}, Annotations: a.annotations, Subject: a.subject,
	})
	if err != nil {
		return nil, fmt.Errorf("encoding the manifest of an artifact: %w", err)
	}
	image, err := partial.CompressedToImage(encoded{a, manifest, layer.Digest})
	if err != nil {
		return nil, fmt.Errorf("making an artifact: %w", err)
	}
	return image, nil
}

func describe(content []byte, mediaType types.MediaType) (v1.Descriptor, error) {
	digest, size, err := v1.SHA256(bytes.NewReader(content))
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("computing a digest: %w", err)
	}
	return v1.Descriptor{MediaType: mediaType, Size: size, Digest: digest}, nil
}

// encoded implements [partial.CompressedImageCore].
type encoded struct {
	artifact

	manifest []byte
	layer    v1.Hash
}

func (e encoded) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }
func (e encoded) RawManifest() ([]byte, error)        { return e.manifest, nil }
func (e encoded) RawConfigFile() ([]byte, error)      { return e.config, nil }

func (e encoded) LayerByDigest(digest v1.Hash) (partial.CompressedLayer, error) {
	if digest == e.layer {
		return static.NewLayer(e.content, e.contentType), nil
	}
	return static.NewLayer(e.config, e.configType), nil
}
