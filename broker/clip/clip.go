// Package clip shortens text from outside before it enters a log line, an error, an Event or a response. A shortened
// text ends with "…", so that a reader sees that there was more.
package clip

import (
	"strings"
	"unicode"
)

// mark ends a shortened text. It has three bytes.
const mark = "…"

// Bytes returns s without invalid UTF-8. If s has more than limit bytes, Bytes returns the longest prefix of whole
// characters that has at most limit bytes together with "…". The minimum of limit is 3.
func Bytes(s string, limit int) string {
	if len(s) <= limit {
		return strings.ToValidUTF8(s, "")
	}
	return strings.ToValidUTF8(s[:limit-len(mark)], "") + mark
}

// Runes returns s if it has at most limit characters. Otherwise it returns the first limit-1 characters and "…".
// The minimum of limit is 1.
func Runes(s string, limit int) string {
	if len(s) <= limit { // A character has at least one byte.
		return s
	}
	n, last := 0, 0
	for at := range s {
		if n == limit-1 {
			last = at
		}
		if n++; n > limit {
			return s[:last] + mark
		}
	}
	return s
}

// Line returns [Bytes] of s on one line: a semicolon replaces a newline, and "?" each other character that is not printable.
// Terminals show Events, and others write parts of their texts.
func Line(s string, limit int) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return ';'
		case unicode.IsPrint(r):
			return r
		default:
			return '?'
		}
	}, Bytes(s, limit))
}
