// Package await waits in tests for what a cluster does by itself: a watch that delivers, a controller that acts, a pod
// that becomes ready.
//
// It polls, because these events have no other signal that a test can see. Its limit only keeps a failed test from
// hanging: no test may measure time with it.
package await

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

const (
	// patience is the limit of one wait. On a loaded machine a pod can need more than a minute to start.
	patience = 6 * time.Minute
	interval = 50 * time.Millisecond
)

// Never marks an error after which waiting makes no sense.
type Never struct{ Err error }

func (n Never) Error() string { return n.Err.Error() }

func (n Never) Unwrap() error { return n.Err }

// Until waits until check returns nil. If it returns [Never] or the limit passes, Until fails the test with what and
// the last error.
func Until(t testing.TB, what string, check func() error) {
	t.Helper()
	if err := Poll(t.Context(), check); err != nil {
		t.Fatalf("waiting until %s: %v", what, err)
	}
}

// Poll is Until outside of a test. It returns the last error of check.
func Poll(ctx context.Context, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		err := check()
		if _, never := errors.AsType[Never](err); never || err == nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gave up: %w", err)
		case <-ticker.C:
		}
	}
}
