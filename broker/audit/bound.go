package audit

import (
	"strings"
	"time"
	"unicode/utf8"
)

// MaxLine bounds a line with its newline, in bytes: as much as a pipe takes in one piece (PIPE_BUF on
// Linux), and a quarter of what container runtimes pass on as one line (16 kB).
const MaxLine = 4096

// cutMark ends a field of which something was left out.
const cutMark = "…[cut]"

// Bounds of the fields, in bytes of their JSON form, in which a control character takes six. Names of
// Kubernetes objects have at most 253 bytes, of namespaces 63, UIDs 36; session names 64 and access
// key ids 128 (STS API reference); the ARN of a role 649 at the longest path. What is left of a line
// is the message's: refusals quote what users wrote.
const (
	maxWord    = 64 // Decision, Reason, PodUID
	maxName    = 260
	maxSession = 130 // SessionName, AccessKeyID, Namespace, Peer
	maxRole    = 660
	maxMessage = 1500
)

// bound cuts what is too long, and drops what cannot be encoded.
func (e *Entry) bound() {
	e.Time, e.Expiration, e.Since = encodable(e.Time), encodable(e.Expiration), encodable(e.Since)
	for _, field := range []struct {
		text *string
		most int
	}{
		{(*string)(&e.Decision), maxWord}, {(*string)(&e.Reason), maxWord}, {&e.PodUID, maxWord},
		{&e.Message, maxMessage}, {&e.Role, maxRole},
		{&e.Pod, maxName}, {&e.ServiceAccount, maxName},
		{&e.Namespace, maxSession}, {&e.SessionName, maxSession}, {&e.AccessKeyID, maxSession}, {&e.Peer, maxSession},
	} {
		*field.text = cut(*field.text, field.most)
	}
}

// encodable is t in UTC, or the zero time where RFC 3339 has no form for it. No clock and no session
// comes near.
func encodable(t time.Time) time.Time {
	t = t.UTC()
	if y := t.Year(); y < 1 || y > 9999 {
		return time.Time{}
	}
	return t
}

// cut returns s, or as much of its beginning as takes at most the given bytes in JSON, and the mark.
func cut(s string, most int) string {
	if len(s)*6 <= most {
		return s // No byte takes more than six.
	}
	size, end := 0, 0
	for i, r := range s {
		n := utf8.RuneLen(r)
		switch {
		case r == utf8.RuneError || r < ' ' || r == '<' || r == '>' || r == '&' || r == '\u2028' || r == '\u2029':
			n = 6 // \u and four digits, as encoding/json writes it
		case r == '"' || r == '\\':
			n = 2
		}
		size += n
		if size <= most-len(cutMark) {
			// An invalid byte is read as U+FFFD, and is one byte of s.
			_, width := utf8.DecodeRuneInString(s[i:])
			end = i + width
		}
		if size > most {
			return strings.Clone(s[:end]) + cutMark
		}
	}
	return s
}
