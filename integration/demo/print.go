//go:build unix

package main

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	// width is what lines are folded at: it fits beside another window on most screens.
	width = 100
	// proseIndent and outputIndent tell what we say from what programs say.
	proseIndent  = "   "
	outputIndent = "     "
)

// printer lays out what is shown. It may be used concurrently: programs report their progress, and
// their end, whenever they like.
type printer struct {
	color bool

	mu  sync.Mutex
	out io.Writer
}

func newPrinter(out io.Writer, color bool) *printer { return &printer{out: out, color: color} }

// wantsColor says whether colors would be seen, and are not unwanted (https://no-color.org).
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

// line prints one line as it is. Nothing can be done about an output that is gone: the steps go on,
// and clean up.
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

func (p *printer) took(d time.Duration) {
	p.line(faint, fmt.Sprintf("%s(%.2f s)", proseIndent, d.Seconds()))
}

// say prints a sentence of ours.
func (p *printer) say(text string) {
	for _, line := range fold(text, width-len(proseIndent)) {
		p.line(plain, proseIndent+line)
	}
}

// item prints a line of a table.
func (p *printer) item(key, value string) {
	p.line(plain, fmt.Sprintf("%s%-26s %s", proseIndent, key, value))
}

// output prints what a program has said. Lines that are folded go on further to the right.
func (p *printer) output(text string) {
	if text == "" {
		return
	}
	for line := range strings.SplitSeq(strings.TrimRight(text, "\n"), "\n") {
		if line == "" {
			p.line(plain, "")
		}
		for i, part := range fold(line, width-len(outputIndent)-2) {
			if i > 0 {
				part = "  " + part
			}
			p.line(plain, outputIndent+part)
		}
	}
}

// typed prints a command, and what it reads, as it would be typed.
func (p *printer) typed(stdin string, args ...string) {
	line := "$"
	var lines []string
	for _, arg := range args {
		arg = quote(arg)
		if len(proseIndent+line+" "+arg+` \`) > width && line != "$" {
			lines = append(lines, line+` \`)
			line = "   "
		}
		line += " " + arg
	}
	if stdin != "" {
		line += " <<'END'"
	}
	for _, line := range append(lines, line) {
		p.line(green, proseIndent+line)
	}
	if stdin == "" {
		return
	}
	for text := range strings.SplitSeq(strings.TrimSpace(stdin), "\n") {
		p.line(plain, outputIndent+text)
	}
	p.line(green, outputIndent+"END")
}

// bare matches what no shell treats specially.
var bare = regexp.MustCompile(`^[\w@%+=:,./-]+$`)

func quote(arg string) string {
	if bare.MatchString(arg) {
		return arg
	}
	return "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
}

// Write prints lines of progress, which come whole.
func (p *printer) Write(b []byte) (int, error) { //nolint:unparam // The form of an io.Writer.
	for line := range strings.Lines(string(b)) {
		p.line(faint, outputIndent+strings.TrimRight(line, "\n"))
	}
	return len(b), nil
}

// fold breaks a line, after the last space or comma that fits, or where it must.
func fold(line string, most int) []string {
	if line == "" {
		return nil
	}
	var lines []string
	for len(line) > most {
		at := strings.LastIndexAny(line[:most], " ,") + 1
		if at == 0 {
			for at = most; !utf8.RuneStart(line[at]); at-- {
			}
		}
		lines = append(lines, strings.TrimRight(line[:at], " "))
		line = line[at:]
	}
	return append(lines, line)
}
