// Package configfile reads configuration files, strictly, and follows them on disk: a file that is replaced comes into
// force without a restart.
//
// It promises that a file which is wrong, or cannot be read, changes nothing: what was good last stays
// in force, and the log and [Follower.Status] say so. At the start there is no last good file, so there
// an error stops the program. What a file means is up to whom it is read for.
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

// Interval is how often the file is looked at. Kubelets bring a changed ConfigMap into pods within about
// a minute, so that looking more often would gain nothing; what is read is at most 1 MiB.
const Interval = 10 * time.Second

// maxFile bounds the file, in bytes: the API server takes no more than 1 MiB as the data of a ConfigMap.
const maxFile = 1 << 20

// Config configures [New].
type Config struct {
	// Path is the file. It may be a symbolic link, or lie behind one that is swapped, as in a mounted
	// ConfigMap. Required.
	Path string
	// Name is what errors call it, such as "rules file". Required.
	Name string
	// Use has what the text says come into force, or returns what is wrong with it and changes nothing. Required.
	Use func(text []byte) error
	// OnChange is called after another file has come into force, by Run. It must not block. Default: nobody is told.
	OnChange func()
	// Hooks is told what becomes of the file. Required.
	Hooks Hooks
}

// Hooks has a function for what is to be said of a file, each time once. They are called by New and by Run, with the
// digest of the file that is in force.
type Hooks struct {
	OnLoad    func(digest string)            // it has come into force
	OnInvalid func(digest string, err error) // what is there now cannot be used, so the one before stays in force
	OnRecover func(digest string)            // what is there now is the one in force again, after it could not be used
}

// Status is what is in force.
type Status struct {
	// Digest is the SHA-256 of the file that is in force, in hexadecimal, as sha256sum prints it.
	Digest string
	// Loaded is when it came into force.
	Loaded time.Time
	// Err is why what is in force is not what the file says now; nil if it is.
	Err error
}

// Follower follows one file.
type Follower struct {
	cfg Config

	seen    string // digest of what was read last, good or not; Run's alone once it runs
	seenErr error  // what was wrong with it

	mu     sync.Mutex // guards status
	status Status
}

// New reads the file for the first time and has it come into force. Its errors say what is wrong, and
// where in the file.
func New(cfg Config) (*Follower, error) {
	if cfg.Path == "" || cfg.Use == nil || cfg.Hooks.OnLoad == nil || cfg.Hooks.OnInvalid == nil || cfg.Hooks.OnRecover == nil {
		return nil, fmt.Errorf("following a %s: needs a Path, what uses it and a Log", cfg.Name)
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

// Check returns the error for which [New] would refuse a file that use says so of.
func Check(path, name string, use func(text []byte) error) error {
	text, err := Read(path)
	if err == nil {
		err = use(text)
	}
	if err != nil {
		return fmt.Errorf("reading the %s %s: %w", name, path, err)
	}
	return nil
}

// Status returns what is in force now.
func (f *Follower) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// Run follows the file until ctx ends.
func (f *Follower) Run(ctx context.Context) error {
	ticker := time.NewTicker(Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			f.look()
		}
	}
}

// look reads the file once.
func (f *Follower) look() {
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

// load reads the file, and has it come into force if it is another one than that in force.
func (f *Follower) load() (digest string, err error) {
	text, err := Read(f.cfg.Path)
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

// Read is os.ReadFile with a bound.
func Read(path string) ([]byte, error) {
	file, err := os.Open(path) //nolint:gosec // G304: the operator names this file by a flag
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("it is longer than %d bytes, the most that a ConfigMap can hold", maxFile)
	}
	return text, nil
}
