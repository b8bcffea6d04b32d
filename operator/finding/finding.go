// Package finding has the results of a diagnosis: steps in the order in which a credential travels, each ok, failed or
// unknown, and for each failure the cause, the person who can fix it, and the commands that do. It guarantees: no output
// contains characters that move the reader's cursor; no text is too long to read; a command is shown whole or not at all.
package finding

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/credence-iam/credence/broker/clip"
)

// State is the result of one step.
type State string

// The states, from harmless to severe.
const (
	OK      State = "ok"
	Unknown State = "unknown" // it could not be determined; Text says why
	Warning State = "warning" // it works now, but not for ever or not for everything
	Failed  State = "failed"
)

// Person is who can carry out a remedy.
type Person string

// The persons. A remedy names the one with the fewest rights.
const (
	Author         Person = "author of the pod"
	NamespaceOwner Person = "owner of the namespace"
	ClusterAdmin   Person = "cluster admin"
	AWSAdmin       Person = "AWS admin"
)

// Remedy ends a failure.
type Remedy struct {
	Who Person `json:"who"`
	// What is one sentence in the imperative, without a final period.
	What string `json:"what"`
	// Commands carry it out, one per line, as they can be pasted into a shell. None if only a person can decide, for example
	// on a policy in AWS.
	Commands []string `json:"commands,omitempty"`
	// Page is the path of a page in docs with more, such as "docs/aws.md#trust".
	Page string `json:"page,omitempty"`
}

// Finding is the result of one step.
type Finding struct {
	// Step names what was looked at, such as "namespace label".
	Step string `json:"step"`
	// Subject is the object that was looked at, such as "namespace/shop", if the report is about several.
	Subject string `json:"subject,omitempty"`
	State   State  `json:"state"`
	// Text is what was found, in one sentence without a final period.
	Text string `json:"text"`
	// Remedy ends a failure or a warning. Each of these has one.
	Remedy *Remedy `json:"remedy,omitempty"`
}

// Report is a whole diagnosis.
type Report struct {
	// Subject is what was diagnosed, such as "pod shop/app".
	Subject  string    `json:"subject"`
	Findings []Finding `json:"findings"`
}

// Limits of one finding, in bytes. Annotations, logs and the pages of a broker can be of any size.
const (
	maxText    = 1200
	maxCommand = 4 << 10
)

// Add appends findings. It shortens texts, and leaves out commands that cannot be shown as they are: a part of a command
// would do something else.
func (r *Report) Add(findings ...Finding) {
	for _, f := range findings {
		f.Step, f.Subject, f.Text = bounded(f.Step), bounded(f.Subject), bounded(f.Text)
		if f.Remedy != nil {
			m := *f.Remedy
			m.What = bounded(m.What)
			m.Commands = slices.DeleteFunc(slices.Clone(m.Commands), func(c string) bool { return len(c) > maxCommand || Printable(c) != c })
			f.Remedy = &m
		}
		r.Findings = append(r.Findings, f)
	}
}

func bounded(text string) string { return Printable(clip.Bytes(text, maxText)) }

// Worst returns the most severe state, OK if there is no finding.
func (r *Report) Worst() State {
	worst := OK
	for _, f := range r.Findings {
		if severity(f.State) > severity(worst) {
			worst = f.State
		}
	}
	return worst
}

// Cause returns the first finding of the most severe state, because each step depends on those before it. It returns
// false if nothing failed and there is no warning.
func (r *Report) Cause() (Finding, bool) {
	worst := r.Worst()
	if severity(worst) < severity(Warning) {
		return Finding{}, false
	}
	for _, f := range r.Findings {
		if f.State == worst {
			return f, true
		}
	}
	return Finding{}, false
}

func severity(s State) int {
	switch s {
	case OK:
		return 0
	case Unknown:
		return 1
	case Warning:
		return 2
	default:
		return 3
	}
}

// marks begin the lines of a report. They are words' worth without color, so that a report can be pasted anywhere.
var marks = map[State]string{OK: "✓", Unknown: "?", Warning: "!", Failed: "✗"}

// Style is how a report is printed.
type Style struct {
	// Color uses the terminal's colors.
	Color bool
	// Quiet leaves out the steps that are ok.
	Quiet bool
}

// colors are the escape sequences of the states.
var colors = map[State]string{OK: "\x1b[32m", Unknown: "\x1b[36m", Warning: "\x1b[33m", Failed: "\x1b[31m"}

// Write prints the report for a terminal, each finding with its remedy.
func (r *Report) Write(w io.Writer, style Style) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", Printable(r.Subject))
	width := 0
	for _, f := range r.Findings {
		width = max(width, len(f.Step))
	}
	for _, f := range r.Findings {
		if style.Quiet && f.State == OK {
			continue
		}
		mark := marks[f.State]
		if style.Color {
			mark = colors[f.State] + mark + "\x1b[0m"
		}
		text := f.Text
		if f.Subject != "" {
			text = f.Subject + ": " + text
		}
		fmt.Fprintf(&b, "  %s %-*s  %s\n", mark, width, Printable(f.Step), Printable(text))
		if f.Remedy != nil {
			f.Remedy.write(&b, strings.Repeat(" ", width+6))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (m *Remedy) write(b *strings.Builder, indent string) {
	fmt.Fprintf(b, "%s%s: %s\n", indent, m.Who, Printable(m.What))
	for _, command := range m.Commands {
		fmt.Fprintf(b, "%s  $ %s\n", indent, Printable(command))
	}
	if m.Page != "" {
		fmt.Fprintf(b, "%s  see %s\n", indent, m.Page)
	}
}

// WriteJSON prints value as JSON. It escapes characters that could move the cursor, which encoding/json leaves beyond ASCII.
func WriteJSON(w io.Writer, value any) error {
	encoder := json.NewEncoder(escaper{w})
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(value)
}

// escaper writes JSON with escapes for characters that do not print. A character must be within one Write.
type escaper struct{ next io.Writer }

// Write implements [io.Writer].
func (e escaper) Write(text []byte) (int, error) {
	written := 0
	for at := 0; at < len(text); {
		r, size := utf8.DecodeRune(text[at:])
		if r != '\n' && !unicode.IsPrint(r) {
			var escaped []byte
			for _, half := range utf16.Encode([]rune{r}) {
				escaped = fmt.Appendf(escaped, `\u%04x`, half)
			}
			if _, err := e.next.Write(slices.Concat(text[written:at], escaped)); err != nil {
				return written, err
			}
			written = at + size
		}
		at += size
	}
	_, err := e.next.Write(text[written:])
	return len(text), err
}

// Printable replaces characters with which the author of an annotation or a log line could change the reader's terminal.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}
