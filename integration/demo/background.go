//go:build unix

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/credence-iam/credence/integration/tools"
)

// background builds programs while steps are shown. It shows no progress before show, so that no line of a compiler tears
// a step apart. A nil background has nothing to build.
type background struct {
	missing []tools.Tool // not yet reported as built
	built   func(tools.Tool) bool
	ended   chan struct{}
	err     error // after ended

	mu    sync.Mutex
	shown io.Writer // nil before show
}

// inBackground starts to build the tools. ctx stops it.
func inBackground(ctx context.Context, list []tools.Tool, build func(context.Context, io.Writer) error) *background {
	b := &background{missing: slices.Clone(list), built: tools.Built, ended: make(chan struct{})}
	go func() {
		defer close(b.ended)
		b.err = build(ctx, b)
	}()
	return b
}

// Write receives the progress of the build.
func (b *background) Write(text []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shown == nil {
		return len(text), nil
	}
	return b.shown.Write(text)
}

// news says what was built since the last call, in the form of an addition to a line.
func (b *background) news() string {
	if b == nil || len(b.missing) == 0 {
		return ""
	}
	var done []tools.Tool
	b.missing = slices.DeleteFunc(b.missing, func(tool tools.Tool) bool {
		if !b.built(tool) {
			return false
		}
		done = append(done, tool)
		return true
	})
	if len(done) == 0 {
		return ""
	}
	left := "all are built"
	if n := len(b.missing); n > 0 {
		left = fmt.Sprintf("%d to go", n)
	}
	return fmt.Sprintf("; meanwhile built %s: %s", names(done), left)
}

// show shows the progress on w from now on.
func (b *background) show(w io.Writer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.shown = w
}

// wait waits until the build has ended, and returns its error.
func (b *background) wait() error {
	if b == nil {
		return nil
	}
	<-b.ended
	return b.err
}
