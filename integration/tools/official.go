//go:build unix

package tools

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// official is where a program's authors publish it for Linux. VERSION, BARE (the version without its v) and ARCH stand
// for their values.
type official struct {
	url    string
	member string // of the archive at url; empty: url is the program
	sums   string // the file with the checksum: a suffix of url, or a name beside it
}

func (o official) of(version, arch string) (url, member string) {
	values := strings.NewReplacer("VERSION", version, "BARE", strings.TrimPrefix(version, "v"), "ARCH", arch)
	return values.Replace(o.url), values.Replace(o.member)
}

// checksumFile has a line for each file that may be downloaded, in the format of sha256sum: CHECKSUM, two spaces, URL.
const checksumFile = "integration/tools/official.sha256"

// readChecksums returns the checksums by URL. No file, and a file without lines, mean that nothing is downloaded.
func readChecksums(file string) (map[string]string, error) {
	content, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading pinned checksums: %w", err)
	}
	sums := make(map[string]string)
	for line := range strings.Lines(string(content)) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		sum, url, found := strings.Cut(line, "  ")
		if !found || !checksum.MatchString(sum) {
			return nil, fmt.Errorf("reading %s: line %q is not CHECKSUM, two spaces, URL; run go run ./integration/tools/pin", file, line)
		}
		if other := sums[url]; other != "" && other != sum {
			return nil, fmt.Errorf("reading %s: %s has two checksums; remove the wrong one", file, url)
		}
		sums[url] = sum
	}
	return sums, nil
}

var checksum = regexp.MustCompile(`^[0-9a-f]{64}$`)

// mode says where programs come from.
type mode string

const (
	modeAuto     mode = "auto"     // downloads what is pinned and can be reached, builds the rest
	modeBuild    mode = "build"    // downloads nothing
	modeDownload mode = "download" // fails if a program of known origin cannot be downloaded
)

func parseMode(value string) (mode, error) {
	if value == "" {
		return modeAuto, nil
	}
	if m := mode(value); slices.Contains([]mode{modeAuto, modeBuild, modeDownload}, m) {
		return m, nil
	}
	return "", fmt.Errorf("unknown value %q in CREDENCE_TOOLS; set it to auto, build or download", value)
}

// hostTimeout limits how long a host that does not respond delays a build.
const hostTimeout = 3 * time.Second

// maxDownload limits the size of a file, in bytes. The largest is about 150 MB.
const maxDownload = 1 << 30

// fileTimeout limits a download, so that a host that stops in the middle of a file does not block a build.
const fileTimeout = 15 * time.Minute

// downloader gets files. It tries an unreachable host only once.
type downloader struct {
	client *http.Client

	mu          sync.Mutex
	unreachable map[string]error // by host
}

// shared is the downloader of this process.
var shared = downloader{client: &http.Client{Timeout: fileTimeout, Transport: &http.Transport{
	Proxy:                 http.ProxyFromEnvironment,
	DialContext:           (&net.Dialer{Timeout: hostTimeout}).DialContext,
	TLSHandshakeTimeout:   hostTimeout,
	ResponseHeaderTimeout: 10 * time.Second,
}}}

// errUnreachable is the error of get if the host does not respond.
var errUnreachable = errors.New("host cannot be reached")

func (d *downloader) get(ctx context.Context, address string) (io.ReadCloser, error) {
	parsed, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("downloading: %w", err)
	}
	d.mu.Lock()
	before := d.unreachable[parsed.Host]
	d.mu.Unlock()
	if before != nil {
		return nil, before
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("downloading: %w", err)
	}
	response, err := d.client.Do(request)
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", errUnreachable, err)
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.unreachable == nil {
			d.unreachable = make(map[string]error)
		}
		d.unreachable[parsed.Host] = err
	}
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("%w: %s responded %s", errUnreachable, address, response.Status), response.Body.Close())
	}
	return response.Body, nil
}

// download downloads the programs whose checksum is pinned, and returns the others. A wrong checksum is an error: then
// someone replaced the file, or the pin is wrong.
func (c *catalog) download(ctx context.Context, missing []target, progress io.Writer) (rest []target, err error) {
	if c.mode == modeBuild {
		return missing, nil
	}
	files := make(map[string][]target) // by URL; an archive can have several programs
	for _, t := range missing {
		switch {
		case t.checksum != "":
			files[t.url] = append(files[t.url], t)
		case t.url != "" && c.mode == modeDownload:
			return nil, fmt.Errorf("downloading %s %s: %s has no checksum of %s; run go run ./integration/tools/pin, or set CREDENCE_TOOLS=build",
				t.tool, t.version, checksumFile, t.url)
		default:
			rest = append(rest, t)
		}
	}
	reported := false
	for file, programs := range files {
		err := inFolder(ctx, filepath.Dir(programs[0].official), progress, func(temp string) (map[string]Tool, error) {
			return c.downloads.fetch(ctx, file, programs, temp, progress)
		})
		if c.mode == modeAuto && errors.Is(err, errUnreachable) {
			if !reported {
				_, _ = fmt.Fprintf(progress, "building what cannot be downloaded (CREDENCE_TOOLS=build does not try): %v\n", err)
			}
			reported = true
			rest = append(rest, programs...)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("downloading %s: %w", file, err)
		}
	}
	return rest, nil
}

// fetch downloads one file, compares its checksum, and writes the programs that it has into folder temp.
func (d *downloader) fetch(ctx context.Context, address string, programs []target, temp string, progress io.Writer) (map[string]Tool, error) {
	body, err := d.get(ctx, address)
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	file, err := os.OpenFile(filepath.Join(temp, "download"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a file: %w", err)
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	if _, err := io.Copy(io.MultiWriter(file, hash), io.LimitReader(body, maxDownload)); err != nil {
		return nil, fmt.Errorf("%w: %w", errUnreachable, err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != programs[0].checksum {
		return nil, fmt.Errorf("the file has the SHA-256 checksum %s, but %s has %s; the file was not used. Ask its authors which is right",
			got, checksumFile, programs[0].checksum)
	}
	found := make(map[string]Tool)
	for _, t := range programs {
		if _, err := file.Seek(0, io.SeekStart); err != nil {
			return nil, fmt.Errorf("reading the file: %w", err)
		}
		var source io.Reader = file
		if t.member != "" {
			if source, err = memberOf(file, t.member); err != nil {
				return nil, err
			}
		}
		program, err := os.OpenFile(filepath.Join(temp, string(t.tool)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700) //nolint:gosec // a program
		if err != nil {
			return nil, fmt.Errorf("making a file: %w", err)
		}
		_, err = io.Copy(program, io.LimitReader(source, maxDownload))
		if err = errors.Join(err, program.Close()); err != nil {
			return nil, fmt.Errorf("writing %s: %w", t.tool, err)
		}
		found[string(t.tool)] = t.tool
		_, _ = fmt.Fprintf(progress, "downloaded %s %s from %s\n", t.tool, t.version, address)
	}
	return found, nil
}

// memberOf returns the content of a file in a tar archive that gzip compressed.
func memberOf(archive io.Reader, name string) (io.Reader, error) {
	unzipped, err := gzip.NewReader(archive)
	if err != nil {
		return nil, fmt.Errorf("reading the archive: %w", err)
	}
	for files := tar.NewReader(unzipped); ; {
		header, err := files.Next()
		if err != nil {
			return nil, fmt.Errorf("looking for %s in the archive: %w", name, err)
		}
		if path.Clean(header.Name) == name && header.Typeflag == tar.TypeReg {
			return files, nil
		}
	}
}

// Pin writes the lines of the checksum file for all programs of the chosen Kubernetes, from the checksums that their
// authors publish beside the files.
func Pin(ctx context.Context, w io.Writer) error {
	c, err := open()
	if err != nil {
		return err
	}
	return c.pin(ctx, w)
}

func (c *catalog) pin(ctx context.Context, w io.Writer) error {
	seen := make(map[string]bool)
	for _, tool := range All() {
		t, err := c.find(tool)
		if err != nil {
			return err
		}
		o := recipes[tool].official
		if o.url == "" {
			continue
		}
		for _, arch := range []string{"amd64", "arm64"} {
			address, _ := o.of(t.version, arch)
			if seen[address] {
				continue
			}
			seen[address] = true
			sum, err := c.downloads.published(ctx, address, o.sums)
			if err != nil {
				return fmt.Errorf("finding the checksum of %s: %w", address, err)
			}
			_, _ = fmt.Fprintf(w, "%s  %s\n", sum, address)
		}
	}
	return nil
}

// published returns the checksum of a file. The authors' file has it alone, or in lines with names.
func (d *downloader) published(ctx context.Context, address, sums string) (string, error) {
	place := address + sums
	if !strings.HasPrefix(sums, ".") {
		place = strings.TrimSuffix(address, path.Base(address)) + sums
	}
	body, err := d.get(ctx, place)
	if err != nil {
		return "", err
	}
	content, err := io.ReadAll(io.LimitReader(body, 1<<20))
	if err = errors.Join(err, body.Close()); err != nil {
		return "", fmt.Errorf("reading %s: %w", place, err)
	}
	for line := range strings.Lines(string(content)) {
		fields := strings.Fields(line)
		if len(fields) > 0 && checksum.MatchString(fields[0]) &&
			(len(fields) == 1 || strings.TrimPrefix(path.Base(fields[1]), "*") == path.Base(address)) {
			return fields[0], nil
		}
	}
	return "", fmt.Errorf("%s has no line for %s", place, path.Base(address))
}
