//go:build unix

// Package process runs child programs for tests and the demonstration, and leaves nothing behind.
//
// A [Run] is a folder with a lock, logs, and a record of each program that runs. Its owner is the process
// that opened it. Programs end with [Run.Close]. Should the owner die without it, even by SIGKILL, Linux
// ends them with the owner; and on every system the next [Open] or [Sweep] ends what is left and removes the
// folder. Runs whose owner is alive are never touched, so several work side by side. Nor is a process that
// merely got the number of one that has ended: a record holds the time a process started at.
//
// Only the programs themselves are looked after when their owner dies. Processes they started in turn end
// with them on [Process.Stop], and when an owner's leftovers are swept, as long as they stay in the process
// group.
package process

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/credence-iam/credence/integration/process/filelock"
)

// Files of a run's folder, and of the folder that holds runs.
const (
	lockFile   = "lock"
	logFolder  = "logs"
	recFolder  = "processes" // a record per running program
	keptMarker = "kept"      // stands beside the logs of a run that was closed with them kept
	cgroupFile = "cgroup"    // is there if the run has a cgroup
)

// KeepFor is how long kept logs of a closed run stay before a later run's start removes them: long enough to
// come back to a failure the next day, and short enough to bound the disk they take.
const KeepFor = 24 * time.Hour

// Config configures a run.
type Config struct {
	// Parent is the folder that runs are made in. Required; made if missing, for this user alone. Only
	// folders of runs may lie in it.
	Parent string
	// Name begins the name of the run's folder. Required.
	Name string
	// Report is told of each program that ends without having been stopped, from a goroutine of its own.
	// Default: nobody is told, and the error waits in Process.Err.
	Report func(error)
}

// A Run owns child programs and their folder.
type Run struct {
	dir    string
	lock   *filelock.Lock
	report func(error)

	mu        sync.Mutex
	processes []*Process // in order of their start
	keepLogs  bool
}

// Open sweeps what dead owners left in c.Parent, and makes a new run there. ctx bounds the sweep and the
// wait for another process that does the same.
func Open(ctx context.Context, c Config) (_ *Run, err error) {
	if c.Parent == "" || c.Name == "" {
		return nil, errors.New("opening a run: Parent and Name must be set")
	}
	// Absolute, since a program can have another working folder.
	parent, err := filepath.Abs(c.Parent)
	if err != nil {
		return nil, fmt.Errorf("opening a run: %w", err)
	}
	unlock, err := lockParent(ctx, parent)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
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
	for _, folder := range []string{logFolder, recFolder} {
		if err := os.Mkdir(filepath.Join(dir, folder), 0o700); err != nil {
			return nil, errors.Join(fmt.Errorf("making the folder of a run: %w", err), lock.Release())
		}
	}
	return &Run{dir: dir, lock: lock, report: c.Report}, nil
}

// lockParent keeps runs from being made while others sweep: a new folder must not be seen before it is
// locked.
func lockParent(ctx context.Context, parent string) (unlock func() error, err error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("making the folder of runs: %w", err)
	}
	lock, err := filelock.Acquire(ctx, filepath.Join(parent, lockFile))
	if err != nil {
		return nil, err
	}
	return lock.Release, nil
}

// Dir returns the run's folder, an absolute path. It goes away with the run.
func (r *Run) Dir() string { return r.dir }

// Logs returns the folder of the programs' logs.
func (r *Run) Logs() string { return filepath.Join(r.dir, logFolder) }

// KeepLogs makes Close leave the logs where they are, for [KeepFor].
func (r *Run) KeepLogs() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keepLogs = true
}

// Close kills the programs that still run, the last one started first, and removes the folder, but for logs
// that are to be kept. What needs a chance to end by itself must be stopped before. A second call does
// nothing.
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
	var err error
	if keep {
		err = keepOnlyLogs(r.dir)
	} else {
		err = remove(r.dir)
	}
	return errors.Join(err, lock.Release())
}

// remove removes a run's cgroup and folder, its lock last: a sweep takes a folder that has none for somebody
// else's.
func remove(dir string) error {
	if err := removeCgroupOf(dir); err != nil {
		return err
	}
	return errors.Join(removeExcept(dir, lockFile), os.RemoveAll(dir))
}

// Cgroup makes a cgroup of the run's own with that name, in every hierarchy of this machine, and returns its
// absolute path as seen from their roots. It is empty: what is to run there goes there by itself. When the
// run is closed or swept, what is in it or below is killed, and it is removed. Linux only; needs root.
func (r *Run) Cgroup(name string) (string, error) {
	top := cgroupOf(r.dir)
	// Marked first: what is not made yet need not be removed, but what is made must be.
	if err := os.WriteFile(filepath.Join(r.dir, cgroupFile), nil, 0o600); err != nil {
		return "", fmt.Errorf("recording the cgroup: %w", err)
	}
	path := filepath.Join(top, name)
	return path, errors.Join(makeCgroup(top), makeCgroup(path))
}

// CPULimit makes such a cgroup, whose processes get milliCPUs thousandths of a processor as the kubelet does it: a quota
// for each 100 ms. It returns the file that takes the number of a process which is to go there.
func (r *Run) CPULimit(name string, milliCPUs int) (procs string, err error) {
	path, err := r.Cgroup(name)
	if err != nil {
		return "", err
	}
	return limitCPU(path, milliCPUs)
}

// MemoryLimit makes such a cgroup, whose processes together get that many bytes of memory, and no swap. The kernel kills
// one of them if they need more. Page cache counts too, as in a container.
func (r *Run) MemoryLimit(name string, bytes int64) (*MemoryLimit, error) {
	path, err := r.Cgroup(name)
	if err != nil {
		return nil, err
	}
	return limitMemory(path, bytes)
}

// A MemoryLimit is a cgroup with a memory limit.
type MemoryLimit struct {
	dir, peak string
}

// Procs is the file that takes the number of a process which is to run under the limit.
func (m *MemoryLimit) Procs() string { return filepath.Join(m.dir, "cgroup.procs") }

// Peak is the most memory that the cgroup has had at a time, in bytes.
func (m *MemoryLimit) Peak() (int64, error) {
	text, err := os.ReadFile(filepath.Join(m.dir, m.peak))
	if err != nil {
		return 0, fmt.Errorf("reading the memory peak of a cgroup: %w", err)
	}
	peak, err := strconv.ParseInt(string(bytes.TrimSpace(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("reading the memory peak of a cgroup: %w", err)
	}
	return peak, nil
}

// cgroupOf is the cgroup of the run in dir.
func cgroupOf(dir string) string { return "/credence-" + filepath.Base(dir) }

// removeCgroupOf removes the cgroup of the run in dir, if it has one.
func removeCgroupOf(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, cgroupFile)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("looking for the run's cgroup: %w", err)
	}
	return removeCgroup(cgroupOf(dir))
}

// CgroupsPossible returns nil where [Run.Cgroup] works, with the controllers that a kubelet needs, and
// otherwise what is in the way.
func CgroupsPossible() error {
	name := fmt.Sprintf("/credence-probe-%d", os.Getpid())
	return errors.Join(makeCgroup(name), removeCgroup(name))
}

func keepOnlyLogs(dir string) error {
	if err := removeCgroupOf(dir); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, keptMarker), nil, 0o600); err != nil {
		return fmt.Errorf("keeping logs: %w", err)
	}
	return removeExcept(dir, lockFile, keptMarker, logFolder)
}

func removeExcept(dir string, names ...string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("removing a run's folder: %w", err)
	}
	for _, entry := range entries {
		if slices.Contains(names, entry.Name()) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
			return fmt.Errorf("removing a run's folder: %w", err)
		}
	}
	return nil
}

// Sweep ends the programs of runs in parent whose owners have died, and removes the folders. Kept logs stay
// until they are older than keep. It returns the folders that it removed. A parent that does not exist has
// nothing to sweep.
func Sweep(ctx context.Context, parent string, keep time.Duration) (removed []string, err error) {
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	unlock, err := lockParent(ctx, parent)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	return sweep(ctx, parent, keep)
}

// sweep does it, under the parent's lock. One run that cannot be swept is no reason to leave the others.
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
		case errors.Is(err, filelock.ErrHeld):
			continue // its owner lives
		case errors.Is(err, fs.ErrNotExist):
			// An owner that died right before or after it had the lock leaves an empty folder. Anything
			// else is not a run.
			if os.Remove(dir) == nil {
				removed = append(removed, dir)
			}
			continue
		case err != nil:
			failed = errors.Join(failed, fmt.Errorf("looking at run %s: %w", dir, err))
			continue
		}
		gone, err := sweepOne(ctx, dir, keep)
		if gone {
			removed = append(removed, dir)
		}
		if err := errors.Join(err, lock.Release()); err != nil {
			failed = errors.Join(failed, fmt.Errorf("sweeping run %s: %w", dir, err))
		}
	}
	return removed, failed
}

func sweepOne(ctx context.Context, dir string, keep time.Duration) (gone bool, err error) {
	if info, err := os.Stat(filepath.Join(dir, keptMarker)); err == nil && time.Since(info.ModTime()) < keep {
		return false, nil
	}
	records, err := filepath.Glob(filepath.Join(dir, recFolder, "*.json"))
	if err != nil {
		return false, fmt.Errorf("looking for records: %w", err)
	}
	for _, path := range records {
		content, err := os.ReadFile(path)
		if err != nil {
			return false, fmt.Errorf("reading a record: %w", err)
		}
		var rec record
		if len(bytes.TrimSpace(content)) == 0 || json.Unmarshal(content, &rec) != nil {
			continue // the owner died while it wrote; a program is let run only after that
		}
		if err := rec.end(ctx); err != nil {
			return false, err
		}
	}
	return true, remove(dir)
}

// A record identifies a process beyond doubt, for as long as it lies on disk.
type record struct {
	PID int `json:"pid"`
	// Started is when it started, in a form that only this system understands and that no process which
	// later gets the same number can have.
	Started string `json:"started"`
}

func newRecord(pid int) (record, error) {
	at, alive := started(pid)
	if !alive {
		return record{}, os.ErrProcessDone
	}
	return record{pid, at}, nil
}

// endTimeout bounds the wait for a killed process to go. A process in uninterruptible sleep can take
// seconds; one that takes longer hangs in the kernel, and waiting is no use.
const endTimeout = 10 * time.Second

// end kills the recorded process and its group, and waits until the process is gone.
//
// On Linux the handle is a pidfd: whatever it names stays the same process even if the number is given to
// another one. It is taken before the start time is compared, so what was compared is what gets stopped.
// Stopped, it can't end by itself, and its number can't become another group's before the group is killed.
func (rec record) end(ctx context.Context) error {
	handle, err := os.FindProcess(rec.PID)
	if err != nil {
		return fmt.Errorf("finding process %d: %w", rec.PID, err)
	}
	defer func() { _ = handle.Release() }()
	if !rec.alive() {
		return nil
	}
	if err := handle.Signal(syscall.SIGSTOP); errors.Is(err, os.ErrProcessDone) {
		return nil
	} else if err != nil {
		return fmt.Errorf("stopping process %d: %w", rec.PID, err)
	}
	if err := signalGroup(rec.PID, syscall.SIGKILL); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, endTimeout, fmt.Errorf("it lives on after SIGKILL for %v", endTimeout))
	defer cancel()
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for rec.alive() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("ending process %d: %w", rec.PID, context.Cause(ctx))
		case <-ticker.C:
		}
	}
	return nil
}

func (rec record) alive() bool {
	at, alive := started(rec.PID)
	return alive && at == rec.Started
}
