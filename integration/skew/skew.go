//go:build unix

// Package skew builds the previous version of Credence, so that tests can mix its programs with those of this checkout.
//
// File previous has the commit of that version: the newest release, or the newest commit on the main branch when nothing
// is released yet. Change it at each release. SKEW_PREVIOUS names another commit for one run, for example to find the
// oldest version that still works.
//
// A built version stays in the cache folder, outside the checkout. The package never removes it.
package skew

import (
	"cmp"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/credence-iam/credence/integration/process/filelock"
	"github.com/credence-iam/credence/integration/tools"
)

//go:embed previous
var recorded string

const variable = "SKEW_PREVIOUS"

// CallerProgram calls the broker all the time, with the client of the sidecar of its version.
const CallerProgram = "caller"

// programs are the packages of the programs of a version.
var programs = map[string]string{
	"credence":         "./cmd/credence",
	"credence-broker":  "./cmd/broker",
	"credence-sidecar": "./cmd/sidecar",
	"credence-webhook": "./cmd/webhook",
	CallerProgram:      "./integration/e2e/caller",
}

// ErrNoHistory is the error of [Previous] in a source archive, which has no earlier version.
var ErrNoHistory = errors.New("this source has no git history, and so no previous version")

// Version is a built version.
type Version struct {
	// Commit is its full hash.
	Commit string
	// Source is the folder with the files of the commit.
	Source string
	// Programs is the folder of the static programs: those of the product with the names that they have in images, and
	// [CallerProgram].
	Programs string
}

// Previous returns the previous version, and builds it first if necessary. That takes a minute if Go's build cache has
// most of its packages. progress gets a line then.
func Previous(ctx context.Context, progress io.Writer) (_ Version, err error) {
	root, err := tools.Checkout()
	if err != nil {
		return Version{}, err
	}
	if _, err := os.Stat(filepath.Join(root, ".git")); errors.Is(err, os.ErrNotExist) {
		return Version{}, ErrNoHistory
	}
	commit := cmp.Or(os.Getenv(variable), strings.TrimSpace(recorded))
	out, err := exec.CommandContext(ctx, "git", "-C", root, "rev-parse", "--verify", "--quiet", "--end-of-options", commit+"^{commit}").Output() //nolint:gosec // The argument cannot be an option.
	if err != nil {
		return Version{}, fmt.Errorf("finding the previous version: this clone does not have commit %s: %w; run: git fetch origin %[1]s", commit, err)
	}
	commit = strings.TrimSpace(string(out))
	cache, err := tools.CacheDir()
	if err != nil {
		return Version{}, err
	}
	parent := filepath.Join(cache, "previous")
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return Version{}, fmt.Errorf("making the folder of versions: %w", err)
	}
	key := sha256.Sum256(fmt.Append(nil, runtime.Version(), runtime.GOOS, runtime.GOARCH, programs))
	folder := filepath.Join(parent, fmt.Sprintf("%s-%x", commit, key[:6]))
	v := Version{Commit: commit, Source: filepath.Join(folder, "source"), Programs: filepath.Join(folder, "programs")}
	lock, err := filelock.Acquire(ctx, filepath.Join(parent, "lock"))
	if err != nil {
		return Version{}, err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	if _, err := os.Stat(folder); err == nil {
		return v, nil
	}
	_, _ = fmt.Fprintln(progress, "building the previous version, commit", commit)
	unfinished, err := os.MkdirTemp(parent, "unfinished-")
	if err != nil {
		return Version{}, fmt.Errorf("making a folder for the build: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(unfinished)) }()
	if err := build(ctx, root, commit, unfinished); err != nil {
		return Version{}, fmt.Errorf("building commit %s: %w", commit, err)
	}
	return v, os.Rename(unfinished, folder)
}

// build writes the files of a commit and its programs into folder. An archive of git has no history, so programs do not
// record the commit. But equal commits give equal programs.
func build(ctx context.Context, root, commit, folder string) error {
	source, archive := filepath.Join(folder, "source"), filepath.Join(folder, "source.tar")
	if err := os.Mkdir(source, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"git", "-C", root, "archive", "--output=" + archive, commit},
		{"tar", "-x", "-f", archive, "-C", source},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil { //nolint:gosec // Our own arguments.
			return fmt.Errorf("%s: %w\n%s", args[0], err, out)
		}
	}
	for name, pkg := range programs {
		if err := Build(ctx, filepath.Join(source, pkg), filepath.Join(folder, "programs", name)); err != nil {
			return err
		}
	}
	return os.Remove(archive)
}

// Build builds the program of the package in folder dir into a file, as those of images are built.
func Build(ctx context.Context, dir, file string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags=grpcnotrace", "-ldflags=-s -w", "-o", file, ".") //nolint:gosec // Our own arguments.
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PWD="+dir, "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", filepath.Base(file), err, out)
	}
	return nil
}

// Describe returns the versions and the digests of the programs in a folder, in one line each.
func Describe(folder string) (string, error) {
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(programs)) {
		content, err := os.ReadFile(filepath.Join(folder, name))
		if err != nil {
			return "", fmt.Errorf("describing programs: %w", err)
		}
		info, err := buildinfo.ReadFile(filepath.Join(folder, name))
		if err != nil {
			return "", fmt.Errorf("describing programs: %w", err)
		}
		_, _ = fmt.Fprintf(&text, "  %-16s %s sha256:%x\n", name, cmp.Or(info.Main.Version, "(devel)"), sha256.Sum256(content))
	}
	return text.String(), nil
}
