package main

import (
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
