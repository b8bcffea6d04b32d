//go:build unix

// Package process runs child programs for tests and the demonstration, and leaves none behind.
//
// A [Run] is a folder with a lock and logs. Its owner is the process that opened it. [Run.Close] kills the
// programs. If the owner dies without it, even by SIGKILL, Linux kills the programs, and the next [Open] or [Sweep]
// removes the folder and the cgroups. It never touches the run of a live owner, and it kills no process by its number.
//
// [Process.Stop] also kills the children of a program that stay in its process group. They survive the death of an
// owner, and so does a program on a system other than Linux.
package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/credence-iam/credence/integration/process/filelock"
)

// Files of a run's folder. The lock is also in the folder of runs.
const (
	lockFile     = "lock"
	logFolder    = "logs"
	keptMarker   = "kept"   // exists if the run was closed and only its logs remain
	cgroupMarker = "cgroup" // exists if the run has a cgroup
)

// KeepFor is how long kept logs stay before a later [Open] removes them: until the next day, so that an engineer can
// come back to a failure.
const KeepFor = 24 * time.Hour

// Config configures a run.
type Config struct {
	// Parent is the folder of runs, which must have nothing else. Required. Open creates it, for this user alone.
	Parent string
	// Name is the prefix of the run's folder. Required.
	Name string
	// Report receives the error of each program that exits without Stop, on a goroutine of its own. Default: none;
	// Process.Err has the error.
	Report func(error)
}

// Run owns child programs and their folder.
type Run struct {
	dir    string
	lock   *filelock.Lock // nil: closed
	report func(error)

	mu        sync.Mutex
	processes []*Process // in order of their start
	keepLogs  bool
}

// Open sweeps c.Parent and creates a new run there. ctx limits the sweep, and the wait for another process that sweeps.
func Open(ctx context.Context, c Config) (_ *Run, err error) {
	if c.Parent == "" || c.Name == "" {
		return nil, errors.New("opening a run: Parent and Name must be set")
	}
	parent, err := filepath.Abs(c.Parent) // programs have other working folders
	if err != nil {
		return nil, fmt.Errorf("opening a run: %w", err)
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("making the folder of runs: %w", err)
	}
	// A sweep must not see the new folder before it is locked.
	parentLock, err := filelock.Acquire(ctx, filepath.Join(parent, lockFile))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, parentLock.Release()) }()
	if _, err := sweep(ctx, parent, KeepFor); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, c.Name+"-")
	if err != nil {
		return nil, fmt.Errorf("making the folder of a run: %w", err)
	}
	lock, err := filelock.Acquire(ctx, filepath.Join(dir, lockFile))
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(dir, logFolder), 0o700); err != nil {
		return nil, errors.Join(fmt.Errorf("making the folder of a run: %w", err), lock.Release())
	}
	return &Run{dir: dir, lock: lock, report: c.Report}, nil
}

// Dir returns the absolute path of the run's folder, which Close removes.
func (r *Run) Dir() string { return r.dir }

// Logs returns the folder of the programs' logs.
func (r *Run) Logs() string { return filepath.Join(r.dir, logFolder) }

// KeepLogs makes Close keep the logs for [KeepFor].
func (r *Run) KeepLogs() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keepLogs = true
}

// Close kills all running programs, the last one first, and removes the folder except for kept logs. Stop a program
// before if it must shut down. A second call does nothing.
func (r *Run) Close() error {
	r.mu.Lock()
	processes, keep, lock := slices.Clone(r.processes), r.keepLogs, r.lock
	r.lock = nil
	r.mu.Unlock()
	if lock == nil {
		return nil
	}
	for _, p := range slices.Backward(processes) {
		p.Stop(0)
	}
	return errors.Join(remove(r.dir, keep), lock.Release())
}

// remove removes a run's cgroup and its folder, or all but the logs. The lock is the last file: without it, a sweep takes
// the folder for a foreign one.
func remove(dir string, keepLogs bool) error {
	if _, err := os.Stat(filepath.Join(dir, cgroupMarker)); err == nil {
		if err := removeCgroup(cgroupOf(dir)); err != nil {
			return err
		}
	}
	keep := []string{lockFile}
	if keepLogs {
		if err := os.WriteFile(filepath.Join(dir, keptMarker), nil, 0o600); err != nil {
			return fmt.Errorf("keeping logs: %w", err)
		}
		keep = append(keep, keptMarker, logFolder)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("removing a run's folder: %w", err)
	}
	for _, entry := range entries {
		if slices.Contains(keep, entry.Name()) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
			return fmt.Errorf("removing a run's folder: %w", err)
		}
	}
	if keepLogs {
		return nil
	}
	return os.RemoveAll(dir)
}

// Sweep removes the runs in parent whose owners have died, and kept logs that are older than keep. It returns the removed
// folders. A missing parent has no runs.
func Sweep(ctx context.Context, parent string, keep time.Duration) (removed []string, err error) {
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	lock, err := filelock.Acquire(ctx, filepath.Join(parent, lockFile))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Release()) }()
	return sweep(ctx, parent, keep)
}

// sweep is Sweep under the parent's lock. It continues after the failure of one run.
func sweep(ctx context.Context, parent string, keep time.Duration) (removed []string, failed error) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return nil, fmt.Errorf("looking for runs: %w", err)
	}
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		dir := filepath.Join(parent, entry.Name())
		lock, err := filelock.Try(filepath.Join(dir, lockFile))
		switch {
		case errors.Is(err, filelock.ErrTaken):
			continue // the owner lives
		case errors.Is(err, fs.ErrNotExist):
			// An owner that dies just before or after it has the lock leaves an empty folder. Any other folder is foreign.
			if os.Remove(dir) == nil {
				removed = append(removed, dir)
			}
			continue
		case err != nil:
			failed = errors.Join(failed, fmt.Errorf("looking at run %s: %w", dir, err))
			continue
		}
		swept, err := sweepRun(ctx, dir, keep)
		if swept {
			removed = append(removed, dir)
		}
		if err := errors.Join(err, lock.Release()); err != nil {
			failed = errors.Join(failed, fmt.Errorf("sweeping run %s: %w", dir, err))
		}
	}
	return removed, failed
}

// killTimeout limits the wait for killed processes. One in uninterruptible sleep can take seconds.
const killTimeout = 10 * time.Second

func sweepRun(ctx context.Context, dir string, keep time.Duration) (swept bool, err error) {
	if info, err := os.Stat(filepath.Join(dir, keptMarker)); err == nil && time.Since(info.ModTime()) < keep {
		return false, nil
	}
	// Linux kills the owner's programs a moment after it releases the lock.
	for deadline := time.Now().Add(killTimeout); ; {
		if err = remove(dir, false); err == nil || ctx.Err() != nil || time.Now().After(deadline) {
			return err == nil, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}
