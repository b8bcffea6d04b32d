package audit

import (
	"strings"
	"time"
	"unicode/utf8"
)

// maxLine is the maximum size of a line with its newline, in bytes: PIPE_BUF on Linux, which a pipe takes in one piece,
// and a quarter of what container runtimes pass on as one line (16 kB).
const maxLine = 4096

// cutMark ends a field that was cut.
const cutMark = "…[cut]"

// Maximum sizes of the fields, in bytes of their JSON form, in which a control character takes six. Names of Kubernetes
// objects have at most 253 bytes, namespaces 63, UIDs 36; session names 64 and access key IDs 128 (STS API reference);
// a role ARN 649 with the longest path. The message gets the rest of the line, because refusals quote what users wrote.
const (
	maxWord    = 64 // Decision, Reason, PodUID
	maxName    = 260
	maxSession = 130 // SessionName, AccessKeyID, Namespace, Peer
	maxRole    = 660
	maxMessage = 1500
)

// bound cuts fields that are too long, and clears times that cannot be encoded.
func (e *Entry) bound() {
	e.Time, e.Expiration, e.Since = encodable(e.Time), encodable(e.Expiration), encodable(e.Since)
	for _, field := range []struct {
		text  *string
		limit int
	}{
		{(*string)(&e.Decision), maxWord}, {(*string)(&e.Reason), maxWord}, {&e.PodUID, maxWord},
		{&e.Message, maxMessage}, {&e.Role, maxRole},
		{&e.Pod, maxName}, {&e.ServiceAccount, maxName},
		{&e.Namespace, maxSession}, {&e.SessionName, maxSession}, {&e.AccessKeyID, maxSession}, {&e.Peer, maxSession},
	} {
		*field.text = cut(*field.text, field.limit)
	}
}

// encodable returns t in UTC, or the zero time if RFC 3339 has no form for it. No clock and no session gets near that.
func encodable(t time.Time) time.Time {
	t = t.UTC()
	if y := t.Year(); y < 1 || y > 9999 {
		return time.Time{}
	}
	return t
}

// cut returns s if it takes at most limit bytes in JSON, otherwise as much of its beginning as fits, with cutMark.
func cut(s string, limit int) string {
	if len(s)*6 <= limit {
		return s // A byte takes at most six.
	}
	size, end := 0, 0
	for i, r := range s {
		n := utf8.RuneLen(r)
		switch {
		case r == utf8.RuneError || r < ' ' || r == '<' || r == '>' || r == '&' || r == '\u2028' || r == '\u2029':
			n = 6 // \u and four digits in encoding/json
		case r == '"' || r == '\\':
			n = 2
		}
		size += n
		if size <= limit-len(cutMark) {
			// An invalid byte is read as U+FFFD, but is one byte of s.
			_, width := utf8.DecodeRuneInString(s[i:])
			end = i + width
		}
		if size > limit {
			return strings.Clone(s[:end]) + cutMark
		}
	}
	return s
}
