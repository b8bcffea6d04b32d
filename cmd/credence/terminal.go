package main

import (
	"context"
	"io"
	"os"

	"golang.org/x/term"
)

// isTerminal reports whether a person may be at the other end of the stream.
func isTerminal(stream any) bool {
	file, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// colored reports whether a stream is a terminal whose user wants colors (no-color.org).
func colored(stream any) bool {
	return isTerminal(stream) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// interruptible returns what in contains until ctx ends. A terminal or a pipe may never end.
func interruptible(ctx context.Context, in io.Reader) io.Reader {
	r, w := io.Pipe()
	context.AfterFunc(ctx, func() { _ = w.CloseWithError(context.Cause(ctx)) })
	go func() { // If ctx ends first, it ends with the program.
		_, err := io.Copy(w, in)
		_ = w.CloseWithError(err)
	}()
	return r
}
