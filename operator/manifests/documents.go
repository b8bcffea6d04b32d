package manifests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"

	"github.com/credence-iam/credence/operator/yamledit"
)

// document is one document of a file, with all text up to the next document: its separator and the comments around it. So the
// texts of all documents together are the text of the file.
type document struct {
	file   string
	number int // counts from 1 the documents with content; 0 for comments only
	line   int // of the file at which text begins; counts from 1
	text   []byte
	head   int        // offset of the JSON value, with white space around it; 0 in YAML
	json   bool       // text is one JSON value, not YAML
	root   *yaml.Node // nil for comments only
	// objects and passed are the results of the function objects.
	objects, passed []object
}

// maxSize is the maximum size of all files together, in bytes. The manifests of a large cluster are smaller: 10,000 manifests of
// 6 kB. It keeps a log or an image, named by mistake, from filling the memory.
const maxSize = 64 << 20

// parseDocuments splits a file into documents and parses them.
func parseDocuments(ctx context.Context, file string, text []byte) ([]*document, error) {
	var all []*document
	number, line := 0, 1
	for _, part := range split(text) {
		values, head, isJSON := splitJSON(part)
		for _, value := range values {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			d := &document{file: file, line: line, text: value, head: head, json: isJSON}
			head = 0
			var err error
			if isJSON {
				d.root, err = yamledit.ParseJSON(value[d.head:])
			} else {
				d.root, err = yamledit.Parse(value)
			}
			if err == nil {
				d.objects, d.passed, err = objects(d.root)
			} else {
				err = d.unreadable(err)
			}
			if err != nil {
				return nil, fmt.Errorf("%s: cannot read document %d, which begins in line %d: %w", file, number+1, line, err)
			}
			if d.root != nil {
				number++
				d.number = number
			}
			line += bytes.Count(value, []byte("\n"))
			all = append(all, d)
		}
	}
	return all, nil
}

// split splits a text as YAML does: before a line that begins with "---", except one below directives, and after a line that
// begins with "...". No text inside a document can have such a line, not even a quoted one.
func split(text []byte) [][]byte {
	var parts [][]byte
	begin, directives := 0, false
	for at := 0; at < len(text); {
		end := len(text)
		if n := bytes.IndexByte(text[at:], '\n'); n >= 0 {
			end = at + n + 1
		}
		line := text[at:end]
		switch {
		case marks(line, "---"):
			if at > begin && !directives {
				parts = append(parts, text[begin:at])
				begin = at
			}
			directives = false
		case marks(line, "..."):
			parts = append(parts, text[begin:end])
			begin, directives = end, false
		case line[0] == '%' && allBlank(text[begin:at]):
			directives = true
		}
		at = end
	}
	if begin < len(text) {
		parts = append(parts, text[begin:])
	}
	return parts
}

// marks reports whether a line is the marker, or begins with the marker and white space.
func marks(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0)
}

// allBlank reports whether all lines are empty, comments or directives.
func allBlank(text []byte) bool {
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' && line[0] != '%' {
			return false
		}
	}
	return true
}

// splitJSON splits a part of a file that has one JSON value or several. Each result has the white space before its value. The
// first value begins at offset head, after a separator. Any other part is one YAML document.
func splitJSON(part []byte) (values [][]byte, head int, isJSON bool) {
	yaml := [][]byte{part}
	if marks(part, "---") {
		head = bytes.IndexByte(part, '\n') + 1
		if rest := bytes.TrimSpace(part[3:max(head, 3)]); head == 0 || len(rest) > 0 && rest[0] != '#' {
			return yaml, 0, false
		}
	}
	if rest := bytes.TrimLeft(part[head:], " \t\r\n"); len(rest) == 0 || rest[0] != '{' {
		return yaml, 0, false
	}
	decoder := json.NewDecoder(bytes.NewReader(part[head:]))
	begin := 0
	for {
		var value json.RawMessage
		if err := decoder.Decode(&value); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return yaml, 0, false
		}
		end := head + int(decoder.InputOffset())
		values = append(values, part[begin:end])
		begin = end
	}
	last := len(values) - 1
	values[last] = part[len(part)-len(part[begin:])-len(values[last]):]
	return values, head, true
}
