//go:build unix

package release_test

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	spdxjson "github.com/spdx/tools-golang/json"
	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"
	"github.com/spdx/tools-golang/spdxlib"

	"github.com/credence-iam/credence/integration/registry"
	"github.com/credence-iam/credence/integration/release"
	"github.com/credence-iam/credence/integration/release/releasetest"
	"github.com/credence-iam/credence/integration/tools"
)

// startRegistry starts a registry on loopback, and returns its address with a path.
func startRegistry(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return registry.Start(t.Context(), listener) + "/credence-iam"
}

func checkPublished(t *testing.T, folder string) {
	to := startRegistry(t)
	published, err := release.Publish(t.Context(), folder, to, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := release.Publish(t.Context(), folder, to, nil); err != nil || !slices.Equal(published, again) {
		t.Errorf("published again as %v, %v, want %v", again, err, published)
	}
	if len(published) != 4 {
		t.Fatalf("published %v, want three images and the chart", published)
	}
	want := digests(t, folder)
	for _, p := range published[:3] {
		product := filepath.Base(p.Name)
		if p.Digest != want[strings.TrimPrefix(product, "credence-")] {
			t.Errorf("%s has digest %s, digests.yaml %v", p.Name, p.Digest, want)
		}
		checkSBOM(t, read(t, filepath.Join(folder, p.SBOM)), pull(t, p, product))
		releasetest.CheckReferrers(t, folder, p)
	}
	t.Run("no API for referrers", func(t *testing.T) { checkWithoutReferrers(t, folder) })
	checkSBOM(t, read(t, filepath.Join(folder, "credence_"+version+".spdx.json")), command(t, folder))

	helm, err := tools.Path(t.Context(), tools.Helm, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	pulled := t.TempDir()
	cmd := exec.CommandContext(t.Context(), helm, "pull", "oci://"+to+"/charts/credence", "--version="+version, "--plain-http", "--destination="+pulled)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	if output, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(output), published[3].Digest) {
		t.Fatalf("helm pull: %v, want digest %s\n%s", err, published[3].Digest, output)
	}
	archive := "credence-" + version + ".tgz"
	if !bytes.Equal(read(t, filepath.Join(pulled, archive)), read(t, filepath.Join(folder, archive))) {
		t.Error("helm pulls another chart")
	}

	t.Run("another content", func(t *testing.T) {
		to := startRegistry(t)
		tag, err := name.NewTag(to + "/credence-sidecar:" + version)
		if err == nil {
			err = remote.Write(tag, empty.Image)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := release.Publish(t.Context(), folder, to, nil); err == nil || !strings.Contains(err.Error(), "a release never changes") {
			t.Errorf("publishing over another image: %v", err)
		}
	})
	t.Run("a changed file", func(t *testing.T) {
		changed := filepath.Join(t.TempDir(), "release")
		if err := os.CopyFS(changed, os.DirFS(folder)); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(changed, "added_"+version+"_image.tar"), "not listed")
		if again, err := release.Publish(t.Context(), changed, to, nil); err != nil || !slices.Equal(published, again) {
			t.Errorf("published with a file that checksums.txt does not list: %v, %v, want %v", again, err, published)
		}
		write(t, filepath.Join(changed, "install.yaml"), "kind: Pod")
		if _, err := release.Publish(t.Context(), changed, startRegistry(t), nil); err == nil || !strings.Contains(err.Error(), "install.yaml differs from checksums.txt") {
			t.Errorf("publishing a changed file: %v", err)
		}
		write(t, filepath.Join(changed, "checksums.txt"), "")
		if _, err := release.Publish(t.Context(), changed, startRegistry(t), nil); err == nil || !strings.Contains(err.Error(), "does not name this checksums.txt") {
			t.Errorf("publishing other checksums: %v", err)
		}
	})
}

// pull pulls an image as a node does, checks its labels, and returns its program.
func pull(t *testing.T, p release.Published, product string) []byte {
	t.Helper()
	image, err := remote.Image(reference(t, p))
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if got := config.Config.Labels["org.opencontainers.image.version"]; got != "v"+version {
		t.Errorf("%s has the label of version %q", p.Name, got)
	}
	layers, err := image.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	stream, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	return firstFile(t, stream, product)
}

func reference(t *testing.T, p release.Published) name.Digest {
	t.Helper()
	digest, err := name.NewDigest(p.Name + "@" + p.Digest)
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

// older is the transport to a registry without the API for referrers, such as ghcr.io. Clients keep them under a tag there.
type older struct{ refused int }

func (o *older) RoundTrip(request *http.Request) (*http.Response, error) {
	if strings.Contains(request.URL.Path, "/referrers/") {
		o.refused++
		return &http.Response{StatusCode: http.StatusNotFound, Body: http.NoBody, Header: http.Header{}, Request: request}, nil
	}
	return http.DefaultTransport.RoundTrip(request)
}

func checkWithoutReferrers(t *testing.T, folder string) {
	to, transport := startRegistry(t), &older{}
	for range 2 {
		published, err := release.Publish(t.Context(), folder, to, transport)
		if err != nil || len(published) != 4 {
			t.Fatal(published, err)
		}
		for _, p := range published[:3] {
			releasetest.CheckReferrers(t, folder, p, remote.WithTransport(transport))
		}
	}
	if transport.refused == 0 {
		t.Error("nothing called the API for referrers")
	}
}

// checkSBOM requires a valid document with the modules in the program and no others.
func checkSBOM(t *testing.T, text, program []byte) {
	t.Helper()
	document, err := spdxjson.Read(bytes.NewReader(text))
	if err == nil {
		err = spdxlib.ValidateDocument(document)
	}
	if err != nil {
		t.Fatal(err)
	}
	if document.SPDXVersion != spdx.Version || document.DataLicense != spdx.DataLicense || document.DocumentNamespace == "" ||
		document.DocumentName == "" || document.CreationInfo == nil || len(document.CreationInfo.Creators) == 0 || document.CreationInfo.Created == "" {
		t.Errorf("the document lacks a required field: %+v", document)
	}
	info, err := buildinfo.Read(bytes.NewReader(program))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"stdlib@" + strings.TrimPrefix(info.GoVersion, "go"): ""}
	for _, module := range info.Deps {
		digest, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(module.Sum, "h1:"))
		if err != nil || len(digest) != sha256.Size {
			t.Fatalf("the program records %+v", module)
		}
		want[module.Path+"@"+module.Version] = hex.EncodeToString(digest)
	}
	got, product := map[string]string{}, 0
	for _, p := range document.Packages {
		if p.PackageName == "" || p.PackageDownloadLocation == "" || p.PackageSPDXIdentifier == "" || len(p.PackageExternalReferences) != 1 {
			t.Errorf("a package lacks a required field: %+v", p)
		}
		if p.PrimaryPackagePurpose != "LIBRARY" {
			product++
			continue
		}
		digest := ""
		if len(p.PackageChecksums) > 0 {
			digest = p.PackageChecksums[0].Value
		}
		got[p.PackageName+"@"+p.PackageVersion] = digest
		if url := "pkg:golang/" + p.PackageName + "@" + strings.ReplaceAll(p.PackageVersion, "+", "%2B"); p.PackageExternalReferences[0].Locator != url {
			t.Errorf("the package URL is %s, want %s", p.PackageExternalReferences[0].Locator, url)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" || product != 2 {
		t.Errorf("%d packages of the product, want 2; modules of %s (-want +got):\n%s", product, info.Path, diff)
	}
	digest := fmt.Sprintf("%x", sha256.Sum256(program))
	if !strings.Contains(string(text), digest) {
		t.Errorf("the document lacks the program's digest %s", digest)
	}
}
