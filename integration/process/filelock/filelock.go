//go:build unix

// Package filelock takes exclusive locks on files, between processes and within one.
//
// The kernel releases a lock when its process dies in any way, so a lock shows that its owner is alive. Locks are
// advisory. They need a local file system; on a network file system there is no guarantee.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// ErrTaken is the error of [Try] if the lock is taken.
var ErrTaken = errors.New("lock is taken")

// pollInterval is the time between tries of [Acquire]: a context cannot interrupt a blocking flock, and everything under
// these locks takes longer.
const pollInterval = 100 * time.Millisecond

// Lock is a taken lock. Release or the death of the process releases it.
type Lock struct{ file *os.File }

// Acquire creates the file if necessary, and waits until it has the lock or ctx ends. This package never removes the file:
// two processes could then each have a lock, one on the old file and one on the new one.
func Acquire(ctx context.Context, path string) (*Lock, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening lock file: %w", err)
	}
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		lock, err := try(file)
		if err == nil {
			return lock, nil
		}
		if !errors.Is(err, ErrTaken) {
			return nil, errors.Join(err, file.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("waiting for lock %s: %w", path, context.Cause(ctx)), file.Close())
		case <-ticker.C:
		}
	}
}

// Try takes the lock of an existing file without waiting. It returns [ErrTaken] if the lock is taken, and
// [io/fs.ErrNotExist] if there is no file.
func Try(path string) (*Lock, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("opening lock file: %w", err)
	}
	lock, err := try(file)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return lock, nil
}

// try locks an open file. The descriptor is close-on-exec, so no child inherits the lock.
func try(file *os.File) (*Lock, error) {
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return &Lock{file}, nil
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EWOULDBLOCK):
			return nil, ErrTaken
		default:
			return nil, fmt.Errorf("locking %s: %w", file.Name(), err)
		}
	}
}

// Release releases the lock. It must be called once.
func (l *Lock) Release() error {
	if err := l.file.Close(); err != nil {
		return fmt.Errorf("releasing lock: %w", err)
	}
	return nil
}
