//go:build unix

package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"unicode/utf8"
)

const (
	// width is the length of a line: it fits beside another window on most screens.
	width = 100
	// The demo's own text and the output of programs have different indents.
	proseIndent  = "   "
	outputIndent = "     "
)

// printer formats what is shown. It may be used concurrently: programs report their progress and their end at any time.
type printer struct {
	color bool

	mu  sync.Mutex
	out io.Writer
}

func newPrinter(out io.Writer, color bool) *printer { return &printer{out: out, color: color} }

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

// line prints one line. If the output is closed, the steps continue and clean up.
func (p *printer) line(style, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.color && style != plain {
		text = style + text + normal
	}
	_, _ = fmt.Fprintln(p.out, text)
}

func (p *printer) headline(text string) {
	p.line(plain, "")
	p.line(bold, text)
}

// say prints the demo's own text.
func (p *printer) say(text string) {
	for _, line := range fold(text, width-len(proseIndent)) {
		p.line(plain, proseIndent+line)
	}
}

// output prints the output of a program. The rest of a folded line is indented further.
func (p *printer) output(text string) {
	if text == "" {
		return
	}
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		indent := outputIndent
		if line == "" {
			p.line(plain, "")
		}
		for _, part := range fold(line, width-len(outputIndent)-2) {
			p.line(plain, indent+part)
			indent = outputIndent + "  "
		}
	}
}

// typed prints a command and its input as a user would type them.
func (p *printer) typed(stdin string, args ...string) {
	line := proseIndent + "$"
	for i, arg := range args {
		if arg = quote(arg); i > 0 && len(line+" "+arg+` \`) > width {
			p.line(green, line+` \`)
			line = proseIndent + "   "
		}
		line += " " + arg
	}
	if stdin == "" {
		p.line(green, line)
		return
	}
	p.line(green, line+" <<'END'")
	for text := range strings.SplitSeq(strings.TrimSpace(stdin), "\n") {
		p.line(plain, outputIndent+text)
	}
	p.line(green, outputIndent+"END")
}

// bare matches arguments that no shell changes.
var bare = regexp.MustCompile(`^[\w@%+=:,./-]+$`)

func quote(arg string) string {
	if bare.MatchString(arg) {
		return arg
	}
	return "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
}

// Write prints complete lines of progress.
func (p *printer) Write(b []byte) (int, error) { //nolint:unparam // The form of an io.Writer.
	for line := range strings.Lines(string(b)) {
		p.line(faint, outputIndent+strings.TrimRight(line, "\n"))
	}
	return len(b), nil
}

// fold breaks a line after the last space or comma that fits, or at the limit.
func fold(line string, limit int) (lines []string) {
	if line == "" {
		return nil
	}
	for len(line) > limit {
		at := strings.LastIndexAny(line[:limit], " ,") + 1
		if at == 0 {
			for at = limit; !utf8.RuneStart(line[at]); at-- {
			}
		}
		lines = append(lines, strings.TrimRight(line[:at], " "))
		line = line[at:]
	}
	return append(lines, line)
}
