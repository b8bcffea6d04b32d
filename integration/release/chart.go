//go:build unix

package release

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/tools"
)

// chartRepository is the chart in the registry.
const chartRepository = Registry + "/" + chartPath

// chartPath is the path of the chart below the registry's.
const chartPath = "charts/credence"

// Helm's media types of charts in registries.
const (
	chartConfigType  = types.MediaType("application/vnd.cncf.helm.config.v1+json")
	chartContentType = types.MediaType("application/vnd.cncf.helm.chart.content.v1.tar+gzip")
)

// chartFolder is the folder of the chart in a checkout.
const chartFolder = "charts/credence"

// chart has the fields of Chart.yaml that a release reads.
type chart struct {
	Name        string `json:"name"`
	Version     string `json:"version"`
	AppVersion  string `json:"appVersion"`
	Description string `json:"description"`
	Home        string `json:"home"`
	KubeVersion string `json:"kubeVersion"`
}

func readChart(folder string) (c chart, err error) {
	text, err := os.ReadFile(filepath.Join(folder, "Chart.yaml"))
	if err != nil {
		return c, err
	}
	if err := yaml.Unmarshal(text, &c); err != nil {
		return c, fmt.Errorf("reading Chart.yaml: %w", err)
	}
	return c, nil
}

// chartArchive is the file name of the chart, as helm package chooses it.
func (r *release) chartArchive() string { return "credence-" + r.version + ".tgz" }

// writeChart packages the chart as helm package does, but with the commit's date: Helm would use the time of the build.
// Chart.yaml comes first, as Helm has it.
func (r *release) writeChart(context.Context) error {
	root, err := tools.Checkout()
	if err != nil {
		return err
	}
	tree := os.DirFS(filepath.Join(root, chartFolder))
	files := []entry{{name: "Chart.yaml"}}
	if err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		// The work tree is clean, so everything else that .helmignore lists does not exist.
		if err == nil && !d.IsDir() && name != "Chart.yaml" && !strings.HasPrefix(d.Name(), ".") {
			files = append(files, entry{name: name})
		}
		return err
	}); err != nil {
		return fmt.Errorf("reading the chart: %w", err)
	}
	for n, file := range files {
		if files[n].content, err = fs.ReadFile(tree, file.name); err != nil {
			return fmt.Errorf("reading the chart: %w", err)
		}
		files[n].name, files[n].mode = "credence/"+file.name, 0o644
	}
	packed, err := tarball(r, files)
	if err != nil {
		return fmt.Errorf("packing the chart: %w", err)
	}
	return r.write(r.chartArchive(), packed)
}

// chartDigest returns the digest that the chart has in a registry.
func (r *release) chartDigest() (v1.Hash, error) {
	image, err := chartImage(filepath.Join(r.Folder, r.chartArchive()))
	if err != nil {
		return v1.Hash{}, err
	}
	return image.Digest()
}

// chartImage returns the chart as an artifact in a registry, from its archive.
func chartImage(archive string) (v1.Image, error) {
	packed, err := os.ReadFile(archive)
	if err != nil {
		return nil, err
	}
	// Helm reads the description from the configuration, before it loads the chart.
	text, err := firstFile(packed)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", archive, err)
	}
	config, err := yaml.YAMLToJSON(text)
	if err != nil {
		return nil, fmt.Errorf("reading Chart.yaml in %s: %w", archive, err)
	}
	var about chart
	if err := yaml.Unmarshal(text, &about); err != nil {
		return nil, fmt.Errorf("reading Chart.yaml in %s: %w", archive, err)
	}
	return artifact{
		configType: chartConfigType, config: config, contentType: chartContentType, content: packed,
		annotations: map[string]string{
			"org.opencontainers.image.title":       about.Name,
			"org.opencontainers.image.version":     about.Version,
			"org.opencontainers.image.description": about.Description,
			"org.opencontainers.image.source":      about.Home,
		},
	}.image()
}

// firstFile returns the content of the first file of a compressed tar file.
func firstFile(packed []byte) ([]byte, error) {
	stream, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	archive := tar.NewReader(stream)
	if _, err := archive.Next(); err != nil {
		return nil, err
	}
	return io.ReadAll(archive)
}
