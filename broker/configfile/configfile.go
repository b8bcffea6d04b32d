// Package configfile reads configuration files strictly and follows them on disk: a replaced file takes effect without a
// restart.
//
// It guarantees that an invalid or unreadable file changes nothing: the last good one stays in force, and the log and
// [Follower.Status] say so. At startup, an error stops the program, because there is no good file.
//
// The caller defines what a file means. The package is below broker, like package policy, because most of its files are the
// broker's rules. The webhook and the operator's command read the same files, so they import it from there.
package configfile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Interval is the time between two reads of the file. The kubelet takes about a minute to project a changed ConfigMap, so
// shorter intervals would gain nothing. A read is at most 1 MiB.
const Interval = 10 * time.Second

// maxFile is the maximum length of a file, in bytes: that of a ConfigMap's data.
const maxFile = 1 << 20

// Config configures [New].
type Config struct {
	// Path is the file. It may be a symbolic link, or be reached through one that is swapped, as in a mounted ConfigMap.
	// Required.
	Path string
	// Name is the file's name in errors, such as "rules file". Required.
	Name string
	// Use applies the text, or returns an error and changes nothing. Required.
	Use func(text []byte) error
	// OnChange is called by Run after it applied a changed file. It must not block. It may be nil.
	OnChange func()
	// Hooks report the state of the file, for example to a log. All are required.
	Hooks Hooks
}

// Hooks are called by New and Run, once for each change of state, with the digest of the file in force.
type Hooks struct {
	OnLoad    func(digest string)            // the file was applied
	OnInvalid func(digest string, err error) // the file is invalid or unreadable, and the last good one stays in force
	OnRecover func(digest string)            // after OnInvalid, the file is again the one in force
}

// Status is the state of a file.
type Status struct {
	// Digest is the SHA-256 of the file in force, in hexadecimal, as sha256sum prints it.
	Digest string
	// Loaded is when the file in force was applied.
	Loaded time.Time
	// Err is why the present file is not in force; nil if it is.
	Err error
}

// Follower follows one file.
type Follower struct {
	cfg Config

	// The last file that was read, good or not. Only Run uses them once it runs.
	seen    string // its digest
	seenErr error  // the error of Use

	mu     sync.Mutex // guards status
	status Status
}

// New reads and applies the file. Its error names the place in the file.
func New(cfg Config) (*Follower, error) {
	if cfg.Path == "" || cfg.Use == nil || cfg.Hooks.OnLoad == nil || cfg.Hooks.OnInvalid == nil || cfg.Hooks.OnRecover == nil {
		return nil, fmt.Errorf("following a %s: Path, Use and Hooks are required", cfg.Name)
	}
	f := &Follower{cfg: cfg}
	digest, err := f.load()
	if err != nil {
		return nil, fmt.Errorf("reading the %s %s: %w", cfg.Name, cfg.Path, err)
	}
	f.status = Status{Digest: digest, Loaded: time.Now()}
	cfg.Hooks.OnLoad(digest)
	return f, nil
}

// Check reads the file at path, validates it with use, and returns the error that [New] would return.
func Check(path, name string, use func(text []byte) error) error {
	text, err := read(path)
	if err == nil {
		err = use(text)
	}
	if err != nil {
		return fmt.Errorf("reading the %s %s: %w", name, path, err)
	}
	return nil
}

// Status returns the state of the file.
func (f *Follower) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// Run follows the file until ctx ends, and returns nil.
func (f *Follower) Run(ctx context.Context) error {
	ticker := time.NewTicker(Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			f.reload()
		}
	}
}

// reload reads the file once, and reports a change of its state.
func (f *Follower) reload() {
	before := f.Status()
	digest, err := f.load()
	now := before
	now.Err = err
	switch {
	case err != nil:
		if before.Err == nil || before.Err.Error() != err.Error() {
			f.cfg.Hooks.OnInvalid(before.Digest, err)
		}
	case digest != before.Digest:
		now.Digest, now.Loaded = digest, time.Now()
		f.cfg.Hooks.OnLoad(digest)
	case before.Err != nil:
		f.cfg.Hooks.OnRecover(digest)
	}
	f.mu.Lock()
	f.status = now
	f.mu.Unlock()
	if now.Digest != before.Digest && f.cfg.OnChange != nil {
		f.cfg.OnChange()
	}
}

// load reads the file, and applies it unless it is the one in force.
func (f *Follower) load() (digest string, err error) {
	text, err := read(f.cfg.Path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(text)
	digest = hex.EncodeToString(sum[:])
	if digest == f.status.Digest || digest == f.seen {
		if digest == f.status.Digest {
			return digest, nil
		}
		return digest, f.seenErr
	}
	err = f.cfg.Use(text)
	f.seen, f.seenErr = digest, err
	return digest, err
}

// read is like os.ReadFile, but refuses files of more than 1 MiB.
func read(path string) ([]byte, error) {
	file, err := os.Open(path) //nolint:gosec // G304: a cluster admin sets the path by a flag
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("longer than %d bytes, the maximum of a ConfigMap", maxFile)
	}
	return text, nil
}
