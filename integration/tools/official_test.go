//go:build unix

package tools

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// script is an official program, in a test.
const script = "#!/bin/sh\nprintf official\n"

func archive(t *testing.T, members map[string]string) []byte {
	t.Helper()
	var buffer bytes.Buffer
	zipped := gzip.NewWriter(&buffer)
	files := tar.NewWriter(zipped)
	for name, content := range members {
		if err := files.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(files, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := files.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zipped.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

func sum(content []byte) string {
	hash := sha256.Sum256(content)
	return hex.EncodeToString(hash[:])
}

// origin is a host of official programs.
type origin struct {
	*httptest.Server
	requests atomic.Int32
}

func serve(t *testing.T, files map[string][]byte) *origin {
	t.Helper()
	o := new(origin)
	o.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.requests.Add(1)
		content, ok := files[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(content)
	}))
	t.Cleanup(o.Close)
	return o
}

// substitute puts recipes of a test in place of a tool's, so that paths finds it.
func substitute(t *testing.T, list map[Tool]recipe) {
	t.Helper()
	before := recipes
	recipes = list
	t.Cleanup(func() { recipes = before })
}

func TestOfficialPrograms(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("official programs are used on Linux only")
	}
	zipped := archive(t, map[string]string{"bin/other": "not this", "./bin/fake": script, "bin/second": strings.Replace(script, "official", "second", 1)})
	plain := "/v1.2.3/" + runtime.GOARCH + "/fake"
	for name, tc := range map[string]struct {
		url, member string // of the recipe
		served      []byte
		path        string // of the served file
		pin         string
		mode        mode
		down        bool
		want        string // output of the program
		progress    string
		err         string
	}{
		"right checksum": {
			url: "/VERSION/ARCH/fake", served: []byte(script), path: plain, pin: sum([]byte(script)), mode: modeAuto,
			want: "official", progress: "downloaded fake v1.2.3 from https://",
		},
		"in an archive": {
			url: "/fake_BARE_ARCH.tgz", member: "bin/fake", served: zipped, path: "/fake_1.2.3_" + runtime.GOARCH + ".tgz", pin: sum(zipped), mode: modeAuto,
			want: "official", progress: "downloaded fake v1.2.3 from https://",
		},
		"not in the archive": {
			url: "/fake.tgz", member: "bin/none", served: zipped, path: "/fake.tgz", pin: sum(zipped), mode: modeAuto,
			err: "looking for bin/none in the archive: EOF",
		},
		"wrong checksum": {
			url: "/VERSION/ARCH/fake", served: []byte(script), path: plain, pin: sum([]byte("other")), mode: modeAuto,
			err: "the file has the SHA-256 checksum " + sum([]byte(script)) + ", but integration/tools/official.sha256 has " + sum([]byte("other")) + "; the file was not used",
		},
		"no checksum": {
			url: "/VERSION/ARCH/fake", served: []byte(script), path: plain, mode: modeAuto,
			want: "hello", progress: "building fake v1.2.3",
		},
		"no checksum, and no build wanted": {
			url: "/VERSION/ARCH/fake", served: []byte(script), path: plain, mode: modeDownload,
			err: "run go run ./integration/tools/pin, or set CREDENCE_TOOLS=build",
		},
		"a build wanted": {
			url: "/VERSION/ARCH/fake", served: []byte(script), path: plain, pin: sum([]byte(script)), mode: modeBuild,
			want: "hello", progress: "building fake v1.2.3",
		},
		"unreachable": {
			url: "/VERSION/ARCH/fake", pin: sum([]byte(script)), mode: modeAuto, down: true,
			want: "hello", progress: "building what cannot be downloaded (CREDENCE_TOOLS=build does not try): host cannot be reached",
		},
		"unreachable, and no build wanted": {
			url: "/VERSION/ARCH/fake", pin: sum([]byte(script)), mode: modeDownload, down: true,
			err: "host cannot be reached",
		},
		"not published": {
			url: "/VERSION/ARCH/fake", path: "/elsewhere", pin: sum([]byte(script)), mode: modeAuto,
			want: "hello", progress: "responded 404 Not Found",
		},
	} {
		t.Run(name, func(t *testing.T) {
			host := serve(t, map[string][]byte{tc.path: tc.served})
			c := fakeCheckout(t, hello)
			write(t, filepath.Join(c.modules(), "go.work"), "go 1.26\n")
			c.mode, c.downloads = tc.mode, &downloader{client: host.Client()}
			r := fake
			r.official = official{url: host.URL + tc.url, member: tc.member}
			substitute(t, map[Tool]recipe{"fake": r})
			if tc.pin != "" {
				file, _ := r.official.of("v1.2.3", runtime.GOARCH)
				c.checksums = map[string]string{file: tc.pin}
			}
			if tc.down {
				host.Close()
			}
			var progress strings.Builder
			paths, err := c.paths(t.Context(), []Tool{"fake"}, &progress)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got the error %v, want %q", err, tc.err)
				}
				if programs, err := filepath.Glob(filepath.Join(c.cache, "*", "fake")); err != nil || len(programs) > 0 {
					t.Errorf("there are programs after the error: %v, %v", programs, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(progress.String(), tc.progress) {
				t.Errorf("progress %q, want %q", &progress, tc.progress)
			}
			runs(t, paths["fake"], tc.want)
			before := host.requests.Load()
			again, err := c.paths(t.Context(), []Tool{"fake"}, io.Discard)
			if err != nil || again["fake"] != paths["fake"] || host.requests.Load() != before {
				t.Errorf("a second time: %v, %v, %d requests", again, err, host.requests.Load()-before)
			}
		})
	}
}

// TestOneDownloadOfAnArchive also shows that a host that cannot be reached is tried only once.
func TestOneDownloadOfAnArchive(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("official programs are used on Linux only")
	}
	zipped := archive(t, map[string]string{"fake": script, "second": strings.Replace(script, "official", "second", 1)})
	host := serve(t, map[string][]byte{"/all.tgz": zipped})
	c := fakeCheckout(t, hello)
	c.downloads = &downloader{client: host.Client()}
	c.checksums = map[string]string{host.URL + "/all.tgz": sum(zipped)}
	two := map[Tool]recipe{}
	for _, name := range []Tool{"fake", "second"} {
		two[name] = recipe{set: "fake", source: "example.com/fake", official: official{url: host.URL + "/all.tgz", member: string(name)}}
	}
	substitute(t, two)
	paths, err := c.paths(t.Context(), []Tool{"fake", "second"}, io.Discard)
	if err != nil || host.requests.Load() != 1 {
		t.Fatalf("%v, %d requests", err, host.requests.Load())
	}
	runs(t, paths["fake"], "official")
	runs(t, paths["second"], "second")

	host.Close()
	for range 2 {
		if _, err := c.downloads.get(t.Context(), host.URL+"/x"); err == nil {
			t.Error("a closed host responds")
		}
	}
	if len(c.downloads.unreachable) != 1 {
		t.Errorf("unreachable hosts: %v", c.downloads.unreachable)
	}
	c.downloads.client = nil // a second try would fail the test
	if _, err := c.downloads.get(t.Context(), host.URL+"/y"); err == nil {
		t.Error("a closed host responds")
	}
}

func TestCanceledDownloadIsNotUnreachable(t *testing.T) {
	host := serve(t, nil)
	d := &downloader{client: host.Client()}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.get(ctx, host.URL); err == nil || len(d.unreachable) > 0 {
		t.Errorf("got %v, unreachable %v", err, d.unreachable)
	}
}

func TestPinWritesPublishedChecksums(t *testing.T) {
	one, two := strings.Repeat("1", 64), strings.Repeat("2", 64)
	host := serve(t, map[string][]byte{
		"/v1.2.3/amd64/fake.sha256": []byte(one + "\n"),
		"/v1.2.3/arm64/fake.sha256": []byte(two + "  fake\n"),
		"/v1.2.3/SHA256SUMS":        []byte(one + "  second-amd64.tgz\n" + two + " *second-arm64.tgz\n"),
	})
	c := fakeCheckout(t, hello)
	c.downloads = &downloader{client: host.Client()}
	list := map[Tool]recipe{
		"fake":   {set: "fake", source: "example.com/fake", official: official{url: host.URL + "/VERSION/ARCH/fake", sums: ".sha256"}},
		"second": {set: "fake", source: "example.com/fake", official: official{url: host.URL + "/VERSION/second-ARCH.tgz", sums: "SHA256SUMS"}},
		"third":  {set: "fake", source: "example.com/fake", official: official{url: host.URL + "/VERSION/second-ARCH.tgz", sums: "SHA256SUMS"}},
		"built":  fake,
	}
	substitute(t, list)
	var pins bytes.Buffer
	if err := c.pin(t.Context(), &pins); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "sums")
	write(t, file, "# A comment.\n\n"+pins.String())
	read, err := readChecksums(file)
	want := map[string]string{
		host.URL + "/v1.2.3/amd64/fake": one, host.URL + "/v1.2.3/arm64/fake": two,
		host.URL + "/v1.2.3/second-amd64.tgz": one, host.URL + "/v1.2.3/second-arm64.tgz": two,
	}
	if diff := cmp.Diff(want, read); err != nil || diff != "" {
		t.Errorf("%v; (-want +got):\n%s", err, diff)
	}
	list["second"] = recipe{set: "fake", source: "example.com/fake", official: official{url: host.URL + "/VERSION/other-ARCH.tgz", sums: "SHA256SUMS"}}
	if err := c.pin(t.Context(), io.Discard); err == nil || !strings.Contains(err.Error(), "has no line for other-amd64.tgz") {
		t.Errorf("a file without a published checksum: got %v", err)
	}
}

func TestSettingsAreChecked(t *testing.T) {
	for value, want := range map[string]mode{"": modeAuto, "auto": modeAuto, "build": modeBuild, "download": modeDownload} {
		if got, err := parseMode(value); got != want || err != nil {
			t.Errorf("%q: got %q, %v", value, got, err)
		}
	}
	if _, err := parseMode("built"); err == nil || !strings.Contains(err.Error(), `unknown value "built" in CREDENCE_TOOLS; set it to auto, build or download`) {
		t.Errorf("an unknown value: got %v", err)
	}
	file := filepath.Join(t.TempDir(), "sums")
	if sums, err := readChecksums(file); len(sums) != 0 || err != nil {
		t.Errorf("no file: got %v, %v", sums, err)
	}
	for _, line := range []string{"abc  https://example.com/fake", strings.Repeat("1", 64) + " https://example.com/fake", "x"} {
		write(t, file, line)
		if _, err := readChecksums(file); err == nil || !strings.Contains(err.Error(), "is not CHECKSUM, two spaces, URL") {
			t.Errorf("%q: got %v", line, err)
		}
	}
	line := func(digit string) string { return strings.Repeat(digit, 64) + "  https://example.com/fake\n" }
	write(t, file, line("1")+line("1"))
	if sums, err := readChecksums(file); len(sums) != 1 || err != nil {
		t.Errorf("a line twice: got %v, %v", sums, err)
	}
	write(t, file, line("1")+line("2"))
	if _, err := readChecksums(file); err == nil || !strings.Contains(err.Error(), "https://example.com/fake has two checksums") {
		t.Errorf("two checksums: got %v", err)
	}
	root, err := Checkout()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, checksumFile)); err != nil {
		t.Errorf("the pinned checksums: %v", err)
	}
}
