//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/credence-iam/credence/integration/tools"
)

// TestBackground shows that progress of the background waits for the end of a step, and what the demo says then.
func TestBackground(t *testing.T) {
	t.Parallel()
	turn, failed := make(chan string), errors.New("the compiler failed")
	var done []tools.Tool
	b := inBackground(t.Context(), []tools.Tool{tools.Helm, tools.CoreDNS, tools.Ctr}, func(_ context.Context, w io.Writer) error {
		for name := range turn {
			_, _ = fmt.Fprintf(w, "built %s\n", name)
			turn <- ""
		}
		return failed
	})
	b.built = func(tool tools.Tool) bool { return slices.Contains(done, tool) }
	build := func(tool tools.Tool) {
		turn <- string(tool)
		<-turn
		done = append(done, tool)
	}
	if got := b.news(); got != "" {
		t.Errorf("before a program is built: %q", got)
	}
	build(tools.CoreDNS)
	build(tools.Helm)
	if got := b.news(); got != "; meanwhile built helm, coredns: 1 to go" {
		t.Errorf("got %q", got)
	}
	if got := b.news(); got != "" {
		t.Errorf("the same news again: %q", got)
	}
	var shown bytes.Buffer
	b.show(&shown)
	build(tools.Ctr)
	close(turn)
	if err := b.wait(); !errors.Is(err, failed) || shown.String() != "built ctr\n" {
		t.Errorf("it showed %q and returned %v", shown.String(), err)
	}
	if got := b.news(); got != "; meanwhile built ctr: all are built" {
		t.Errorf("at the end: %q", got)
	}
}

// TestRunEndsTheBackground shows that a failed demo stops its compilers before it cleans up.
func TestRunEndsTheBackground(t *testing.T) {
	t.Parallel()
	ended, stopped := false, false
	failed := errors.New("the step failed")
	d := &demo{printer: &printer{out: io.Discard}}
	err := d.run(t.Context(), play{
		steps: []step{{do: func(ctx context.Context) error {
			d.background = inBackground(ctx, nil, func(ctx context.Context, _ io.Writer) error {
				<-ctx.Done()
				ended = true
				return ctx.Err()
			})
			return failed
		}}},
		stop: func(ctx context.Context) error {
			stopped = ended && ctx.Err() == nil
			return nil
		},
	})
	if !errors.Is(err, failed) || !stopped {
		t.Errorf("the demo returned %v; stopped after the background: %t", err, stopped)
	}
}
