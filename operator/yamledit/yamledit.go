// Package yamledit adds values to YAML and JSON documents by adding lines to their text, so that a reviewer sees only
// what was added. Parse a document with [Parse] or [ParseJSON], add values to its [Tree], and let [Splice] return the
// edits of the text. Comments, order, indentation, quotes and numbers stay as their author wrote them.
//
// It does not guarantee that the edits are right: a caller parses the edited text again and compares it with the tree by
// [Same]. If Splice fails because parts of the document are shared (anchors, aliases, merge keys), [Expand] returns the
// document without them, in another style. The package knows nothing of Kubernetes.
package yamledit

import (
	"bytes"
	"errors"
)

var (
	// ErrAliased is the error for an addition to a part of the document that several places share.
	ErrAliased = errors.New("the addition belongs to a part that anchors, aliases or merge keys share")
	// ErrShape is the error for an addition whose place in the text is unknown.
	ErrShape = errors.New("the place of the addition in the text is unknown")
)

// Edit replaces the bytes from Start to End of a text by Text.
type Edit struct {
	Start, End int
	Text       string
}

// Apply returns text with the edits, which must be in order and must not overlap.
func Apply(text []byte, edits []Edit) []byte {
	var out []byte
	at := 0
	for _, e := range edits {
		out = append(append(out, text[at:e.Start]...), e.Text...)
		at = e.End
	}
	return append(out, text[at:]...)
}

// beforeEnd changes edits of the terminated text into edits of text itself: the first edit after the last line also
// ends that line.
func beforeEnd(edits []Edit, text []byte) []Edit {
	newline := newlineOf(text)
	for i := range edits {
		if edits[i].Start > len(text) {
			edits[i].Start, edits[i].End = len(text), len(text)
			edits[i].Text = newline + edits[i].Text
			newline = ""
		}
	}
	return edits
}

// newlineOf returns the line break that text uses.
func newlineOf(text []byte) string {
	if at := bytes.IndexByte(text, '\n'); at > 0 && text[at-1] == '\r' {
		return "\r\n"
	}
	return "\n"
}
