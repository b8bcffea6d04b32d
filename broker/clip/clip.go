// Package clip shortens text from outside before it enters a log line, an error, an Event or a response. A shortened
// text ends with [Mark], so that a reader sees that there was more.
package clip

import "strings"

// Mark ends a shortened text. It has three bytes.
const Mark = "…"

// Bytes returns s without invalid UTF-8. If s has more than limit bytes, Bytes returns the longest prefix of whole
// characters that has at most limit bytes together with [Mark]. The minimum of limit is len(Mark).
func Bytes(s string, limit int) string {
	if len(s) <= limit {
		return strings.ToValidUTF8(s, "")
	}
	return strings.ToValidUTF8(s[:limit-len(Mark)], "") + Mark
}

// Runes returns s if it has at most limit characters. Otherwise it returns the first limit-1 characters and [Mark].
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
			return s[:last] + Mark
		}
	}
	return s
}
