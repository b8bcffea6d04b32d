package operator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"
)

// A document is one of those in a file, with all the text up to the next one: its separator and the comments
// around it are a part of it, so that the texts of all documents are the text of the file.
type document struct {
	file   string
	number int // from 1 on, among those that hold anything; 0 for comments alone
	line   int // of the file where text begins, from 1 on
	text   []byte
	head   int        // where the JSON value begins, with white space around it; 0 in YAML
	json   bool       // one JSON value, and not YAML
	root   *yaml.Node // nil for comments alone
	// objects are those of root that concern us, and passed those of kinds that are not known here.
	objects, passed []object
}

// maxSize bounds what is read, in bytes, all files together. It is far more than the manifests of a large
// cluster have, 10,000 of 6 kB, and keeps a log or an image that was named by mistake from filling memory.
const maxSize = 64 << 20

// parseDocuments takes a file apart, and parses what it holds.
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
				d.root, err = parseJSON(value[d.head:])
			} else {
				d.root, err = parseYAML(value)
			}
			if err == nil {
				d.objects, d.passed, err = objects(d.root)
			} else {
				err = d.unreadable(err)
			}
			if err != nil {
				return nil, fmt.Errorf("%s: document %d, which begins in line %d, cannot be read: %w", file, number+1, line, err)
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

// split parts a text where YAML does: before a line that begins with ---, but for one below directives, and
// behind one that begins with "...". No text of a document can have such a line, not even a quoted one.
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

// marks reports whether a line begins with a marker that nothing but white space follows directly.
func marks(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0)
}

// allBlank reports whether lines hold nothing but comments and directives.
func allBlank(text []byte) bool {
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' && line[0] != '%' {
			return false
		}
	}
	return true
}

// splitJSON takes a part of a file apart that holds JSON values, one or several one after the other, each with
// the white space before it. The first begins at head, behind a separator. Anything else is one YAML document.
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
