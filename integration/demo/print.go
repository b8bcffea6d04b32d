//go:build unix

package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
)

// printer formats what is shown. It may be used concurrently: programs report their progress and their end at any time.
type printer struct {
	color bool

	mu  sync.Mutex
	out io.Writer
}

// wantsColor reports whether colors are visible and wanted (https://no-color.org).
func wantsColor(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// Styles, as ANSI escape sequences.
const (
	plain  = ""
	bold   = "\x1b[1m"
	faint  = "\x1b[2m"
	green  = "\x1b[32m"
	normal = "\x1b[0m"
)

// print prints each line of a text after an indent. If the output is closed, the steps continue and clean up.
func (p *printer) print(style, indent, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		if line = strings.TrimRight(indent+line, " \t"); p.color && style != plain {
			line = style + line + normal
		}
		_, _ = fmt.Fprintln(p.out, line)
	}
}

func (p *printer) headline(text string) { p.print(bold, "", "\n"+text) }

// say prints the demo's own text.
func (p *printer) say(text string) { p.print(plain, "   ", text) }

// output prints the output of a program.
func (p *printer) output(text string) {
	if text != "" {
		p.print(plain, "     ", text)
	}
}

// Write prints complete lines of progress.
func (p *printer) Write(b []byte) (int, error) { //nolint:unparam // The form of an io.Writer.
	p.print(faint, "     ", string(b))
	return len(b), nil
}

// typed prints a command and its input as a user would type them.
func (p *printer) typed(stdin string, args ...string) {
	words := []string{"$"}
	for _, arg := range args {
		if !bare.MatchString(arg) {
			arg = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
		words = append(words, arg)
	}
	line := strings.Join(words, " ")
	if stdin != "" {
		line += " <<'END'\n" + strings.TrimSpace(stdin) + "\nEND"
	}
	p.print(green, "   ", line)
}

// bare matches arguments that no shell changes.
var bare = regexp.MustCompile(`^[\w@%+=:,./-]+$`)
