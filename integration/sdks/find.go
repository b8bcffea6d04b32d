//go:build unix

package main

import (
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/credence-iam/credence/integration/process/filelock"
	"github.com/credence-iam/credence/integration/tools"
)

// finder finds out what of the clients is installed. It is used by one goroutine.
type finder struct {
	root     string // of the checkout
	bin      string // where programs are built
	home     string // of programs that are asked for their versions
	progress io.Writer

	program func() (string, error) // builds the drivers for Go
	scripts func() (string, error) // installs those for JavaScript
}

// installation is a client as it is installed.
type installation struct {
	command []string // of its driver
	version string
}

// is returns an error unless a driver says that it runs what was found.
func (i installation) is(c client, h hello) error {
	if version := strings.TrimPrefix(h.Version, "v"); version != i.version || !strings.HasPrefix(c.name, h.Client) {
		return fmt.Errorf("version %s of %s was found, and its driver says that it runs %s %s", i.version, c.name, h.Client, version)
	}
	return nil
}

// drivers is the folder of the drivers for a language.
func (f *finder) drivers(language string) string {
	return filepath.Join(f.root, "integration", "sdks", "clients", language)
}

// golang finds a client whose driver is built from the nested module.
func golang(name, module string) func(*finder, context.Context) (installation, error) {
	return func(f *finder, ctx context.Context) (installation, error) {
		if f.program == nil {
			f.program = sync.OnceValues(func() (string, error) { return f.build(ctx) })
		}
		program, err := f.program()
		if err != nil {
			return installation{}, err
		}
		info, err := buildinfo.ReadFile(program)
		if err != nil {
			return installation{}, fmt.Errorf("reading what the drivers for Go are built of: %w", err)
		}
		i := slices.IndexFunc(info.Deps, func(m *debug.Module) bool { return m.Path == module })
		if i < 0 {
			return installation{}, fmt.Errorf("the drivers for Go are built without %s", module)
		}
		return installation{[]string{program, name}, strings.TrimPrefix(info.Deps[i].Version, "v")}, nil
	}
}

// build builds the drivers for Go, in the user's environment: it names caches and proxies.
func (f *finder) build(ctx context.Context) (string, error) {
	_, _ = fmt.Fprintln(f.progress, "building the drivers for Go")
	program := filepath.Join(f.bin, "sdks-go")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", program, ".") //nolint:gosec // a path of ours
	cmd.Dir = f.drivers("go")
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the drivers for Go: %w\n%s", err, out)
	}
	return program, nil
}

// oldBotocore is the first botocore that counts as new: it reads a token's file at each renewal.
var oldBotocore = version{1, 34, 41}

func (f *finder) botocoreOld(ctx context.Context) (installation, error) {
	return f.botocore(ctx, "before "+oldBotocore.String(), func(v version) bool { return v.less(oldBotocore) })
}

func (f *finder) botocoreNew(ctx context.Context) (installation, error) {
	return f.botocore(ctx, "from "+oldBotocore.String()+" on", func(v version) bool { return !v.less(oldBotocore) })
}

// botocore finds an interpreter that has a botocore of the right version.
func (f *finder) botocore(ctx context.Context, which string, right func(version) bool) (installation, error) {
	for _, python := range installed("python3") {
		// What is in PATH may be a script that chooses an interpreter; sys.executable is the interpreter.
		out, err := f.output(ctx, python, "-c", "import sys, botocore; print(botocore.__version__, sys.executable)")
		found, program, _ := strings.Cut(out, " ")
		if v, ok := parseVersion(found); err == nil && ok && right(v) {
			return installation{[]string{program, filepath.Join(f.drivers("python"), "client.py")}, found}, nil
		}
	}
	return installation{}, notRun("no python3 here has botocore " + which)
}

func (f *finder) awscliV1(ctx context.Context) (installation, error) { return f.awscli(ctx, 1) }
func (f *finder) awscliV2(ctx context.Context) (installation, error) { return f.awscli(ctx, 2) }

func (f *finder) awscli(ctx context.Context, major int) (installation, error) {
	for _, aws := range installed("aws") {
		out, err := f.output(ctx, aws, "--version") // aws-cli/2.9.19 Python/3.11.2 …
		found, _, _ := strings.Cut(strings.TrimPrefix(out, "aws-cli/"), " ")
		if v, ok := parseVersion(found); err == nil && ok && v[0] == major {
			python, err := f.output(ctx, "python3", "-c", "import sys; print(sys.executable)")
			if err != nil {
				return installation{}, notRun("python3, which its driver is written in, is not installed")
			}
			return installation{[]string{python, filepath.Join(f.drivers("cli"), "client.py"), aws}, found}, nil
		}
	}
	return installation{}, notRun(fmt.Sprintf("no AWS CLI of version %d is installed", major))
}

func (f *finder) jsV3(ctx context.Context) (installation, error) {
	return f.node(ctx, "v3.mjs", "@aws-sdk/client-sts")
}

func (f *finder) jsV2(ctx context.Context) (installation, error) {
	return f.node(ctx, "v2.mjs", "aws-sdk")
}

// node finds a client whose driver is that script, and whose version is that of a package.
func (f *finder) node(ctx context.Context, script, name string) (installation, error) {
	node, err := exec.LookPath("node")
	if err != nil {
		return installation{}, notRun("node is not installed")
	}
	content, err := os.ReadFile(filepath.Join(f.drivers("js"), "package.json"))
	if err != nil {
		return installation{}, fmt.Errorf("reading which SDKs for JavaScript are wanted: %w", err)
	}
	var wanted struct{ Dependencies map[string]string }
	if err := json.Unmarshal(content, &wanted); err != nil || wanted.Dependencies[name] == "" {
		return installation{}, errors.Join(fmt.Errorf("package.json of the drivers for JavaScript names no version of %s", name), err)
	}
	if f.scripts == nil {
		f.scripts = sync.OnceValues(func() (string, error) { return f.installScripts(ctx) })
	}
	dir, err := f.scripts()
	if err != nil {
		return installation{}, err
	}
	return installation{[]string{node, filepath.Join(dir, script)}, wanted.Dependencies[name]}, nil
}

// installScripts copies the drivers for JavaScript into a folder of the cache, of a name made of what is in them,
// and installs there what they have locked. npm has the user's environment, which says where packages come from.
func (f *finder) installScripts(ctx context.Context) (_ string, err error) {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", notRun("npm is not installed")
	}
	cache, err := tools.CacheDir()
	if err != nil {
		return "", err
	}
	source := f.drivers("js")
	entries, err := os.ReadDir(source)
	if err != nil {
		return "", fmt.Errorf("reading the drivers for JavaScript: %w", err)
	}
	files, hash := make(map[string][]byte), sha256.New()
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		content, err := os.ReadFile(filepath.Join(source, e.Name()))
		if err != nil {
			return "", fmt.Errorf("reading the drivers for JavaScript: %w", err)
		}
		files[e.Name()] = content
		_, _ = fmt.Fprintf(hash, "%s %d\n%s", e.Name(), len(content), content)
	}
	dir := filepath.Join(cache, "sdks", "js-"+hex.EncodeToString(hash.Sum(nil))[:16])
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return "", fmt.Errorf("installing the SDKs for JavaScript: %w", err)
	}
	lock, err := filelock.Acquire(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	done := filepath.Join(dir, "installed")
	if _, err := os.Stat(done); err == nil {
		return dir, nil
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return "", fmt.Errorf("installing the SDKs for JavaScript: %w", err)
		}
	}
	_, _ = fmt.Fprintln(f.progress, "installing the SDKs for JavaScript with npm")
	cmd := exec.CommandContext(ctx, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund") //nolint:gosec // as found in PATH
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		if code := npmCode(out); slices.Contains(unreachable, code) {
			return "", notRun("npm could not reach where packages come from (" + code + ")")
		}
		return "", fmt.Errorf("installing the SDKs for JavaScript: npm ci: %w\n%s", err, out)
	}
	return dir, os.WriteFile(done, nil, 0o600)
}

// unreachable are codes of npm by which there was no getting at packages here, which says nothing about ours. Any other,
// such as EUSAGE for a lock that is out of step, and EINTEGRITY, is a failure.
var unreachable = []string{
	"EAI_AGAIN", "ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT", "ERR_SOCKET_TIMEOUT",
	"ENOTCACHED", "E401", "E403", "E429", "E500", "E502", "E503", "E504",
}

var npmCodes = regexp.MustCompile(`(?m)^npm (?:ERR!|error) code (\w+)`)

// npmCode is the code of the error that npm wrote; empty if it wrote none.
func npmCode(out []byte) string {
	if found := npmCodes.FindSubmatch(out); found != nil {
		return string(found[1])
	}
	return ""
}

// newRuby is the first SDK for Ruby that knows the container-credentials endpoint.
var newRuby = version{3, 171, 0}

// ruby finds the SDK for Ruby; args are those of the driver.
func ruby(args ...string) func(*finder, context.Context) (installation, error) {
	return func(f *finder, ctx context.Context) (installation, error) {
		for _, program := range installed("ruby") {
			found, err := f.output(ctx, program, "-e", `require "aws-sdk-core"; print Aws::CORE_GEM_VERSION`)
			if v, ok := parseVersion(found); err == nil && ok && v.less(newRuby) {
				return installation{append([]string{program, filepath.Join(f.drivers("ruby"), "client.rb")}, args...), found}, nil
			}
		}
		return installation{}, notRun("no ruby here has aws-sdk-core before " + newRuby.String())
	}
}

// signingCurl is the first curl that signs requests to AWS.
var signingCurl = version{7, 75, 0}

func (f *finder) curl(ctx context.Context) (installation, error) {
	out, err := f.output(ctx, "curl", "--version") // curl 7.88.1 (…) …
	found, _, _ := strings.Cut(strings.TrimPrefix(out, "curl "), " ")
	if v, ok := parseVersion(found); err != nil || !ok || v.less(signingCurl) {
		return installation{}, notRun("no curl from " + signingCurl.String() + " on is installed, which signs requests to AWS")
	}
	return installation{[]string{"/bin/sh", filepath.Join(f.drivers("curl"), "client.sh")}, found}, nil
}

// installed returns the programs of that name in the folders of PATH and in /usr/bin, each once.
func installed(name string) (paths []string) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/bin") {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	}
	return paths
}

// output runs a program, in the environment that drivers have as well and no more, and returns what it prints, without the
// space around it. What the user's variables and files make of a program is not what is tried.
func (f *finder) output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // clients of our table, as found
	cmd.Dir = f.home
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + f.home}
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// version is a number of three parts.
type version [3]int

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

func (v version) less(other version) bool { return slices.Compare(v[:], other[:]) < 0 }

// parseVersion reads the first three parts of a version.
func parseVersion(text string) (v version, ok bool) {
	parts := strings.SplitN(text, ".", 4)
	if len(parts) < len(v) {
		return v, false
	}
	for i := range v {
		n, err := strconv.Atoi(parts[i])
		if err != nil {
			return v, false
		}
		v[i] = n
	}
	return v, true
}
