//go:build unix

package filelock_test

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/credence-iam/credence/integration/process/filelock"
)

func TestLockExcludesUntilReleased(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if _, err := filelock.Try(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Try without a file: got %v, want fs.ErrNotExist", err)
	}
	taken, err := filelock.Acquire(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := filelock.Try(path); !errors.Is(err, filelock.ErrTaken) {
		t.Fatalf("Try of a taken lock: got %v, want ErrTaken", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := filelock.Acquire(cancelled, path); !errors.Is(err, context.Canceled) {
		t.Fatalf("Acquire of a taken lock: got %v, want context.Canceled", err)
	}
	if err := taken.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := filelock.Try(path)
	if err != nil {
		t.Fatalf("Try after Release: %v", err)
	}
	if err := again.Release(); err != nil {
		t.Fatal(err)
	}
}
