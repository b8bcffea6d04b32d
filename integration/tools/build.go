//go:build unix

package tools

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/credence-iam/credence/integration/process/filelock"
)

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// existing returns the path of a program that exists, or "".
func (c *catalog) existing(t target) string {
	if c.mode != modeBuild && t.official != "" && executable(t.official) {
		return t.official
	}
	if executable(t.path) && (c.mode != modeDownload || t.url == "") {
		return t.path
	}
	return ""
}

// paths downloads what it may, and builds the rest, one folder of the cache at a time.
func (c *catalog) paths(ctx context.Context, list []Tool, progress io.Writer) (map[Tool]string, error) {
	paths := make(map[Tool]string, len(list))
	var missing []target
	for _, tool := range list {
		t, err := c.find(tool)
		if err != nil {
			return nil, err
		}
		if paths[tool] = c.existing(t); paths[tool] == "" {
			missing = append(missing, t)
		}
	}
	missing, err := c.download(ctx, missing, progress)
	if err != nil {
		return nil, err
	}
	for len(missing) > 0 {
		folder := filepath.Dir(missing[0].path)
		var batch []target
		missing = slices.DeleteFunc(missing, func(t target) bool {
			if filepath.Dir(t.path) == folder {
				batch = append(batch, t)
				return true
			}
			return false
		})
		if err := build(ctx, batch, progress); err != nil {
			return nil, err
		}
	}
	for _, tool := range list {
		if paths[tool] == "" {
			t, err := c.find(tool)
			if err != nil {
				return nil, err
			}
			paths[tool] = c.existing(t)
		}
	}
	return paths, nil
}

// unfinished is the prefix of folders of builds and downloads.
const unfinished = "unfinished-"

// inFolder locks a folder of the cache, and calls produce with a temporary folder in it. Then it moves the returned
// files, which are in the temporary folder, into the folder.
func inFolder(ctx context.Context, folder string, progress io.Writer, produce func(temp string) (files map[string]Tool, err error)) (err error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("making a folder for programs: %w", err)
	}
	done := report(progress, func() string { return "waiting for another process that builds in " + folder })
	lock, err := filelock.Acquire(ctx, filepath.Join(folder, "lock"))
	done()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	// This process has the lock, so the owners of these folders are dead.
	stale, err := filepath.Glob(filepath.Join(folder, unfinished+"*"))
	if err != nil {
		return fmt.Errorf("looking for unfinished builds: %w", err)
	}
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("removing an unfinished build: %w", err)
		}
	}
	temp, err := os.MkdirTemp(folder, unfinished)
	if err != nil {
		return fmt.Errorf("making a folder to build in: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	files, err := produce(temp)
	if err != nil {
		return err
	}
	for file, tool := range files {
		if err := os.Rename(filepath.Join(temp, file), filepath.Join(folder, string(tool))); err != nil {
			return fmt.Errorf("moving %s to its folder: %w", tool, err)
		}
	}
	return nil
}

// build builds programs of one set, or one for go install.
func build(ctx context.Context, batch []target, progress io.Writer) error {
	folder := filepath.Dir(batch[0].path)
	return inFolder(ctx, folder, progress, func(temp string) (map[string]Tool, error) {
		files := make(map[string]Tool)
		var names, packages []string
		seconds := 0
		for _, t := range batch {
			if executable(t.path) { // another process was faster
				continue
			}
			files[outputName(t.pkg)] = t.tool
			names = append(names, string(t.tool)+" "+t.version)
			packages = append(packages, t.pkg)
			seconds += t.seconds
		}
		if len(files) == 0 {
			return files, nil
		}
		began := time.Now()
		_, _ = fmt.Fprintf(progress, "building %s into %s; with cold caches this takes about %d min on %d processors\n",
			strings.Join(names, ", "), folder, 1+seconds/60/runtime.NumCPU(), runtime.NumCPU())
		if err := run(ctx, batch[0].set, packages, temp, progress); err != nil {
			return nil, fmt.Errorf("building %s: %w", strings.Join(names, ", "), err)
		}
		_, _ = fmt.Fprintf(progress, "built %s in %v\n", strings.Join(names, ", "), time.Since(began).Round(time.Second))
		return files, nil
	})
}

// outputName returns the name that the go command gives to the program of a package.
func outputName(pkg string) string {
	pkg, _, _ = strings.Cut(pkg, "@")
	if majorVersion.MatchString(path.Base(pkg)) {
		pkg = path.Dir(pkg)
	}
	return path.Base(pkg)
}

var majorVersion = regexp.MustCompile(`^v[0-9]+$`)

// report writes a line every 30 s until the returned function is called.
func report(progress io.Writer, what func() string) (done func()) {
	stop, stopped, began := make(chan struct{}), make(chan struct{}), time.Now()
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(30 * time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				_, _ = fmt.Fprintf(progress, "still %s, after %v\n", what(), time.Since(began).Round(time.Second))
			}
		}
	}()
	return func() { close(stop); <-stopped }
}

// tags are those of all sets. They are containerd's: it omits the snapshotters that need C libraries.
const tags = "no_btrfs,no_devmapper,no_zfs"

// run runs the go command, which writes the programs into folder. The command stays in this process group, so that
// Ctrl-C in a terminal reaches its compilers.
func run(ctx context.Context, s *set, packages []string, folder string, progress io.Writer) error {
	var cmd *exec.Cmd
	if s == nil {
		cmd = exec.CommandContext(ctx, "go", slices.Concat([]string{"install", "-v", "-trimpath", "-ldflags", "-s -w"}, packages)...) //nolint:gosec // the recipes
		cmd.Env = append((&set{gowork: "off"}).environment(), "GOBIN="+folder)
	} else {
		cmd = exec.CommandContext(ctx, "go", slices.Concat( //nolint:gosec // the recipes
			[]string{"build", "-v", "-trimpath", "-tags", tags, "-ldflags", s.ldflags, "-o", folder + string(filepath.Separator)}, packages)...)
		cmd.Dir, cmd.Env = s.dir, s.environment()
	}
	// The compilers collect garbage less often.
	cmd.Env = append(cmd.Env, "GOGC="+cmp.Or(os.Getenv("GOGC"), "200"))
	var output compilerOutput
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second // the go command waits for its compilers
	done := report(progress, output.status)
	err := cmd.Run()
	done()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s in %s: %w\n%s", cmd, cmd.Dir, err, bytes.TrimSpace(output.messages))
	}
	return nil
}

// maxOutput limits the compiler's output in an error, in bytes. The last lines have the cause.
const maxOutput = 4 << 10

// compilerOutput receives the output of go build -v: the names of packages, and messages.
type compilerOutput struct {
	mu       sync.Mutex
	partial  []byte
	packages int
	last     string // a package, or what the go command does before
	messages []byte // the last maxOutput bytes of the rest
}

func (o *compilerOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.partial = append(o.partial, p...)
	for {
		line, rest, found := bytes.Cut(o.partial, []byte("\n"))
		if !found {
			return len(p), nil
		}
		o.partial = rest
		switch {
		case bytes.HasPrefix(line, []byte("go: downloading ")):
			o.last = string(line)
		case bytes.ContainsAny(line, " :\t"):
			o.messages = append(append(o.messages, line...), '\n')
			o.messages = o.messages[max(0, len(o.messages)-maxOutput):]
		default:
			o.packages++
			o.last = string(line)
		}
	}
}

func (o *compilerOutput) status() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return fmt.Sprintf("building: %d packages started, the last is %s", o.packages, o.last)
}
