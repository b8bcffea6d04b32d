//go:build unix

// Package filelock takes exclusive locks on files, between processes and within one.
//
// A lock ends with the process that holds it, however that process ends: the kernel drops it. That makes a
// held lock the simplest proof that its owner is alive. A lock is advisory, and works on a local file
// system; nothing is promised on a network one.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// ErrHeld is returned by [Try] while somebody else holds the lock.
var ErrHeld = errors.New("lock is held")

// pollInterval is how often [Acquire] looks again. A blocking flock can't be interrupted by a context, and a
// tenth of a second is short beside anything that is done under these locks.
const pollInterval = 100 * time.Millisecond

// A Lock is a lock that is held until Release, or until its process ends.
type Lock struct{ file *os.File }

// Acquire makes the file if it is missing, and waits until the lock is free or ctx ends. The file is never
// removed by this package: removing it would let two holders have a lock each, one on the old file and one
// on the new.
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
		if !errors.Is(err, ErrHeld) {
			return nil, errors.Join(err, file.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("waiting for lock %s: %w", path, context.Cause(ctx)), file.Close())
		case <-ticker.C:
		}
	}
}

// Try takes the lock of a file that exists, or returns at once: [ErrHeld] when somebody has it,
// [io/fs.ErrNotExist] when there is no such file.
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

// try locks an open file. The descriptor is close-on-exec, so no child inherits the lock and keeps it alive.
func try(file *os.File) (*Lock, error) {
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return &Lock{file}, nil
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EWOULDBLOCK):
			return nil, ErrHeld
		default:
			return nil, fmt.Errorf("locking %s: %w", file.Name(), err)
		}
	}
}

// Release gives the lock up. It must be called once.
func (l *Lock) Release() error {
	if err := l.file.Close(); err != nil {
		return fmt.Errorf("releasing lock: %w", err)
	}
	return nil
}
