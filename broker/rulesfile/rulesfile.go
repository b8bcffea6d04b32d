// Package rulesfile reads the optional rules file and follows it on disk: it makes [policy.Rules]
// decide by what the file says now, without a restart.
//
// It promises that a file which is wrong, or cannot be read, changes nothing: what was good last stays
// in force, and the log and [Follower.Status] say so. At the start there is no last good file, so there
// an error stops the program. It decides nothing by itself; what the file means is up to package policy.
package rulesfile

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/policy"
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
	// Rules decide by the file. Required.
	Rules *policy.Rules
	// OnChange is called after the rules have changed, by Run: what was decided before may be decided
	// differently now. It must not block. Default: nobody is told.
	OnChange func()
	// Logger is told of each new file and of each new error, once. Required.
	Logger *slog.Logger
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

// New reads the file for the first time and has the rules decide by it. Its errors say what is wrong, and
// where in the file.
func New(cfg Config) (*Follower, error) {
	if cfg.Path == "" || cfg.Rules == nil || cfg.Logger == nil {
		return nil, errors.New("following a rules file: needs a Path, Rules and a Logger")
	}
	f := &Follower{cfg: cfg}
	digest, entries, err := f.load()
	if err != nil {
		return nil, fmt.Errorf("reading the rules file %s: %w", cfg.Path, err)
	}
	f.status = Status{Digest: digest, Loaded: time.Now()}
	cfg.Logger.Info("Rules file loaded", "file", cfg.Path, "digest", digest, "entries", entries)
	return f, nil
}

// Check returns the error for which [New] would refuse the file.
func Check(path string) error {
	text, err := read(path)
	if err == nil {
		_, err = Parse(text)
	}
	if err != nil {
		return fmt.Errorf("reading the rules file %s: %w", path, err)
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
			f.look(ctx)
		}
	}
}

// look reads the file once.
func (f *Follower) look(ctx context.Context) {
	before := f.Status()
	digest, entries, err := f.load()
	now := before
	now.Err = err
	switch {
	case err != nil:
		if before.Err == nil || before.Err.Error() != err.Error() {
			f.cfg.Logger.WarnContext(ctx, "Keeping the rules as they were: the rules file cannot be used",
				"file", f.cfg.Path, "digest", before.Digest, "error", err)
		}
	case digest != before.Digest:
		now.Digest, now.Loaded = digest, time.Now()
		f.cfg.Logger.InfoContext(ctx, "Rules file loaded", "file", f.cfg.Path, "digest", digest, "entries", entries)
	case before.Err != nil:
		f.cfg.Logger.InfoContext(ctx, "The rules file is again as it was loaded", "file", f.cfg.Path, "digest", digest)
	}
	f.mu.Lock()
	f.status = now
	f.mu.Unlock()
	if now.Digest != before.Digest && f.cfg.OnChange != nil {
		f.cfg.OnChange()
	}
}

// load reads the file, and has the rules decide by it if it is another one than those in force.
func (f *Follower) load() (digest string, entries int, err error) {
	text, err := read(f.cfg.Path)
	if err != nil {
		return "", 0, err
	}
	sum := sha256.Sum256(text)
	digest = hex.EncodeToString(sum[:])
	if digest == f.status.Digest || digest == f.seen {
		if digest == f.status.Digest {
			return digest, 0, nil
		}
		return digest, 0, f.seenErr
	}
	file, err := Parse(text)
	if err == nil {
		err = f.cfg.Rules.Use(file)
	}
	f.seen, f.seenErr = digest, err
	return digest, len(file.Namespaces), err
}

// read is os.ReadFile with a bound.
func read(path string) ([]byte, error) {
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
