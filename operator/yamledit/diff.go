package yamledit

import (
	"bytes"
	"fmt"
	"strings"
)

// contextLines is the number of lines around each change, as in diff -u.
const contextLines = 3

// change replaces a run of lines by others.
type change struct {
	start, end int // lines of before, counted from 0
	lines      []string
}

// WriteDiff writes the edits of a file as a unified diff, and nothing if they change nothing. The edits are the difference,
// so it searches for nothing: the diff is exact, and its time is linear.
func WriteDiff(out *bytes.Buffer, name string, before []byte, edits []Edit) {
	changes := changesOf(before, edits)
	if len(changes) == 0 {
		return
	}
	lines := splitLines(string(before))
	fmt.Fprintf(out, "--- %s\n+++ %s\n", name, name)
	shift := 0 // number of lines added so far
	for i := 0; i < len(changes); {
		last := i
		for last+1 < len(changes) && changes[last+1].start-changes[last].end <= 2*contextLines {
			last++
		}
		from := max(changes[i].start-contextLines, 0)
		to := min(changes[last].end+contextLines, len(lines))
		var body bytes.Buffer
		write := func(mark byte, line string) {
			body.WriteByte(mark)
			body.WriteString(line)
			if !strings.HasSuffix(line, "\n") {
				body.WriteString("\n\\ No newline at end of file\n")
			}
		}
		at, added := from, 0
		for _, c := range changes[i : last+1] {
			for ; at < c.start; at++ {
				write(' ', lines[at])
			}
			for ; at < c.end; at++ {
				write('-', lines[at])
			}
			for _, line := range c.lines {
				write('+', line)
			}
			added += len(c.lines) - (c.end - c.start)
		}
		for ; at < to; at++ {
			write(' ', lines[at])
		}
		fmt.Fprintf(out, "@@ -%s +%s @@\n", span(from, to-from), span(from+shift, to-from+added))
		out.Write(body.Bytes())
		shift += added
		i = last + 1
	}
}

// span returns a range of lines as diff writes it.
func span(from, count int) string {
	switch count {
	case 0:
		return fmt.Sprintf("%d,0", from)
	case 1:
		return fmt.Sprint(from + 1)
	default:
		return fmt.Sprintf("%d,%d", from+1, count)
	}
}

func splitLines(s string) []string {
	lines := strings.SplitAfter(s, "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// changesOf returns the edits of bytes as changes of lines. It leaves out edits that change nothing.
func changesOf(before []byte, edits []Edit) []change {
	starts := []int{0}
	for i, c := range before {
		if c == '\n' && i+1 < len(before) {
			starts = append(starts, i+1)
		}
	}
	line := 0
	lineOf := func(at int) int { // It needs growing offsets.
		for line+1 < len(starts) && starts[line+1] <= at {
			line++
		}
		return line
	}
	endOf := func(line int) int {
		if line+1 < len(starts) {
			return starts[line+1]
		}
		return len(before)
	}
	var changes []change
	for i := 0; i < len(edits); {
		first := lineOf(edits[i].Start)
		// Edits of the same lines are one change.
		begin, end := starts[first], edits[i].End
		last := i
		for {
			whole := end == len(before) || end > 0 && before[end-1] == '\n'
			if !whole {
				end = endOf(lineOf(end))
			}
			if last+1 == len(edits) || edits[last+1].Start > end || edits[last+1].Start == end && end > 0 && before[end-1] == '\n' {
				break
			}
			last++
			end = max(end, edits[last].End)
		}
		old := before[begin:end]
		moved := make([]Edit, 0, last+1-i)
		for _, e := range edits[i : last+1] {
			moved = append(moved, Edit{e.Start - begin, e.End - begin, e.Text})
		}
		if c, differs := trim(first, splitLines(string(old)), splitLines(string(Apply(old, moved)))); differs {
			changes = append(changes, c)
		}
		i = last + 1
	}
	return changes
}

// trim leaves out the lines that old and now have in common at the start and at the end.
func trim(first int, old, now []string) (c change, differs bool) {
	for len(old) > 0 && len(now) > 0 && old[0] == now[0] {
		old, now = old[1:], now[1:]
		first++
	}
	for len(old) > 0 && len(now) > 0 && old[len(old)-1] == now[len(now)-1] {
		old, now = old[:len(old)-1], now[:len(now)-1]
	}
	return change{first, first + len(old), now}, len(old)+len(now) > 0
}
