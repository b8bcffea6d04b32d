//go:build unix

package release

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/tools"
)

// entry is a file in an archive.
type entry struct {
	name    string
	mode    int64
	content []byte
}

// writeCommand writes an archive of the credence command for each platform, their SBOM, and the manifest for krew.
func (r *release) writeCommand(ctx context.Context) error {
	const name = "credence"
	root, err := tools.Checkout()
	if err != nil {
		return err
	}
	license, err := os.ReadFile(filepath.Join(root, "LICENSE"))
	if err != nil {
		return err
	}
	readme := fmt.Sprintf("credence %s, the command for users of Credence: %s\n"+
		"As the plugin \"kubectl credence\", link it as kubectl-credence. For kubectl's completion, link it as kubectl_complete-credence.\n",
		r.version, repository)
	built := product{name: name}
	var plugins []map[string]any
	for _, platform := range r.Platforms {
		_, _ = fmt.Fprintf(r.Progress, "building %s for %s\n", name, platform)
		system, architecture, _ := strings.Cut(platform, "/")
		file, pack, suffix := name, tarball, ".tar.gz"
		if system == "windows" {
			file, pack, suffix = name+".exe", zipped, ".zip"
		}
		path := filepath.Join(r.work, "command", platform, file)
		if err := images.CompileFor(ctx, module+"/cmd/credence", system, architecture, path); err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		packed, err := pack(r, []entry{{file, 0o755, content}, {"LICENSE", 0o644, license}, {"README.txt", 0o644, []byte(readme)}})
		if err != nil {
			return fmt.Errorf("packing %s: %w", path, err)
		}
		archive := strings.Join([]string{name, r.version, system, architecture}, "_") + suffix
		if err := r.write(archive, packed); err != nil {
			return err
		}
		built.programs = append(built.programs, program{platform, path})
		plugins = append(plugins, map[string]any{
			"uri":      repository + "/releases/download/" + r.tag() + "/" + archive,
			"sha256":   sum(packed),
			"bin":      file,
			"selector": map[string]any{"matchLabels": map[string]string{"os": system, "arch": architecture}},
		})
	}
	if err := r.writeSBOM(built); err != nil {
		return err
	}
	manifest, err := yaml.Marshal(map[string]any{
		"apiVersion": "krew.googlecontainertools.github.com/v1alpha2",
		"kind":       "Plugin",
		"metadata":   map[string]string{"name": name},
		"spec": map[string]any{
			"version":          r.tag(),
			"homepage":         repository,
			"shortDescription": "Give pods AWS credentials with Credence",
			"description": "Says why a pod has no AWS credentials and what is wrong with an installation of Credence, shows and steers the\n" +
				"AWS sessions of its brokers, and adds its sidecar to manifests. Uses only your own rights.\n",
			"platforms": plugins,
		},
	})
	if err != nil {
		return fmt.Errorf("encoding the manifest for krew: %w", err)
	}
	return r.write(krewFile, manifest)
}

// tarball packs files in their order. The result depends only on them and on the commit.
func tarball(r *release, files []entry) ([]byte, error) {
	var packed bytes.Buffer
	compressed, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	archive := tar.NewWriter(compressed)
	for _, file := range files {
		if err := archive.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: file.name, Mode: file.mode, Size: int64(len(file.content)), ModTime: r.date, Format: tar.FormatUSTAR,
		}); err != nil {
			return nil, err
		}
		if _, err := archive.Write(file.content); err != nil {
			return nil, err
		}
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	if err := compressed.Close(); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

// zipped is tarball for Windows.
func zipped(r *release, files []entry) ([]byte, error) {
	var packed bytes.Buffer
	archive := zip.NewWriter(&packed)
	for _, file := range files {
		header := &zip.FileHeader{Name: file.name, Method: zip.Deflate, Modified: r.date}
		header.SetMode(os.FileMode(file.mode)) //nolint:gosec // a constant above
		to, err := archive.CreateHeader(header)
		if err != nil {
			return nil, err
		}
		if _, err := to.Write(file.content); err != nil {
			return nil, err
		}
	}
	if err := archive.Close(); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

// sum returns the SHA-256 of content in hexadecimal digits.
func sum(content []byte) string {
	digest := sha256.Sum256(content)
	return hex.EncodeToString(digest[:])
}
