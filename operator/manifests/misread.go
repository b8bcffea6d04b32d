package manifests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/operator/yamledit"
)

// This file makes messages about input that cannot be read. They name the line of the file and the key, and say what to
// write instead. It runs after a failure and changes no decision.

// fileLine returns the line of n in the file, counted from 1.
func (d *document) fileLine(n *yaml.Node) int {
	line := d.line + n.Line - 1
	if d.json {
		line += bytes.Count(d.text[:d.head], []byte("\n"))
	}
	return line
}

// relativeLine matches the line that package yaml names in an error. It counts from the start of the document.
var relativeLine = regexp.MustCompile(`^line (\d+): `)

// unknownAnchor matches package yaml's error about an alias without an anchor before it. The error names no line.
var unknownAnchor = regexp.MustCompile(`^unknown anchor '(.+)' referenced$`)

// unreadable returns err, an error of a YAML or JSON parser, with the line of the file. It adds a hint if the document has a
// Helm template: such a file becomes YAML only by "helm template".
func (d *document) unreadable(err error) error {
	message := strings.TrimPrefix(strings.Join(strings.Fields(err.Error()), " "), "yaml: ")
	if match := relativeLine.FindStringSubmatch(message); match != nil {
		// Package yaml names the line of the mistake or the line before it.
		if line, err := strconv.Atoi(match[1]); err == nil {
			message = fmt.Sprintf("near line %d: %s", d.line+line-1, message[len(match[0]):])
		}
	} else if match := unknownAnchor.FindStringSubmatch(message); match != nil {
		message = fmt.Sprintf("there is no anchor &%s before the alias *%s in this document", match[1], match[1])
		if at := regexp.MustCompile(`(?m)[\s\[{,:-]\*` + regexp.QuoteMeta(match[1]) + `(?:[\s,\]}]|$)`).FindIndex(d.text); at != nil {
			message = fmt.Sprintf("line %d: %s", d.line+bytes.Count(d.text[:at[0]+1], []byte("\n")), message)
		}
	} else if strings.HasPrefix(err.Error(), "yaml: ") && d.root == nil {
		message = fmt.Sprintf("near line %d: %s", d.line, message) // Package yaml does not name the first line.
	}
	if n := mappingAsKey(d.root); n != nil {
		message = fmt.Sprintf("line %d: a mapping cannot be a key", d.fileLine(n))
	}
	return errors.New(clip.Bytes(message, 500) + d.helmHint())
}

// helmHint returns a hint about the first Helm template of the document, which continues an error, or "".
func (d *document) helmHint() string {
	line := d.line
	for text := range bytes.Lines(d.text) {
		if at := bytes.Index(text, []byte("{{")); at >= 0 && !bytes.HasPrefix(bytes.TrimSpace(text), []byte("#")) {
			return fmt.Sprintf("; line %d has a Helm template, %.60q; run \"helm template\" and give its output to credence inject",
				line, bytes.TrimSpace(text[at:]))
		}
		line++
	}
	return ""
}

// mappingAsKey returns the first mapping in the place of a key, such as an unquoted {{ … }}, or nil.
func mappingAsKey(n *yaml.Node) *yaml.Node {
	if n == nil {
		return nil
	}
	for i, c := range n.Content {
		if n.Kind == yaml.MappingNode && i%2 == 0 && c.Kind == yaml.MappingNode {
			return c
		}
		if found := mappingAsKey(c); found != nil {
			return found
		}
	}
	return nil
}

// misread returns the error for raw, the JSON of the value at path, which could not be decoded because of err. If a value has
// the wrong type, the error names the line, the key, the value and what to write.
func (d *document) misread(path []string, raw []byte, err error) error {
	if raw == nil && err == nil {
		n := find(d.root, path)
		return fmt.Errorf("line %d: %s is empty; write the object, or remove it", d.fileLine(n), keyName(path))
	}
	var wrong *json.UnmarshalTypeError
	if !errors.As(err, &wrong) {
		return d.unreadable(err)
	}
	below, got, found := locate(raw, wrong)
	if !found {
		return err
	}
	full := slices.Concat(path, below)
	n := find(d.root, full)
	where := fmt.Sprintf("line %d: %s must be %s", d.fileLine(n), keyName(full), typeName(wrong.Type))
	written := fmt.Sprint(got)
	if v := yamledit.Value(n); v != nil && v.Kind == yaml.ScalarNode {
		written = v.Value // as in the file: off, not false
	}
	wantString := wrong.Type.Kind() == reflect.String
	switch got := got.(type) {
	case bool:
		reader := ""
		if !d.json && written != strconv.FormatBool(got) {
			reader = " in YAML 1.1, which kubectl reads"
		}
		where += fmt.Sprintf(", but %.100s is the boolean %t%s", written, got, reader)
		if wantString {
			where += "; write " + yamledit.Quote(written)
		}
	case json.Number:
		where += fmt.Sprintf(", but %.100s is a number", written)
		if wantString {
			where += "; write " + yamledit.Quote(written)
		}
	case string:
		where += fmt.Sprintf(", but %.100q is a string", got)
		if unquoted := new(any); utiljson.Unmarshal([]byte(got), unquoted) == nil && wrong.Type.Kind() <= reflect.Float64 {
			where += "; remove the quotes"
		}
	case json.Delim:
		where += ", but it is a list"
		if got == '{' {
			where = strings.TrimSuffix(where, "a list") + "a mapping"
		}
	}
	return errors.New(where)
}

// misreadPod is misread for an error of the injector about the pod at path, which names no line. It returns any other refusal
// unchanged.
func (d *document) misreadPod(path []string, pod []byte, err error) error {
	var typed corev1.Pod
	var wrong *json.UnmarshalTypeError
	if mistyped := utiljson.Unmarshal(pod, &typed); errors.As(mistyped, &wrong) {
		if _, _, found := locate(pod, wrong); found {
			return d.misread(path, pod, mistyped)
		}
	}
	return err
}

// templated returns an error if the pod at path has an annotation with the prefix whose value is a Helm template. No
// decision is possible before "helm template" replaces that value.
func (d *document) templated(path []string, prefix string) error {
	annotations := yamledit.Value(find(d.root, append(slices.Clone(path), "metadata", "annotations")))
	if annotations == nil || annotations.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(annotations.Content); i += 2 {
		key, v := annotations.Content[i], yamledit.Value(annotations.Content[i+1])
		if strings.HasPrefix(key.Value, prefix) && v.Kind == yaml.ScalarNode && strings.Contains(v.Value, "{{") {
			return fmt.Errorf("line %d: annotation %q is a Helm template, %.60q; run \"helm template\" and give its output to credence inject",
				d.fileLine(key), key.Value, v.Value)
		}
	}
	return nil
}

// locate returns the path and the first token of the value in raw that wrong is about. It finds nothing if wrong comes from a
// type that decodes itself, because its offsets start elsewhere.
func locate(raw []byte, wrong *json.UnmarshalTypeError) (path []string, got json.Token, found bool) {
	type level struct {
		isMap, keyRead bool
		key            string
		index          int
	}
	var levels []level
	done := func() { // ends a value of the last level
		if last := len(levels) - 1; last >= 0 {
			levels[last].keyRead = false
			levels[last].index++
		}
	}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	for {
		token, err := decoder.Token()
		if err != nil { // io.EOF, because raw was decoded before
			return nil, nil, false
		}
		if token == json.Delim('}') || token == json.Delim(']') {
			levels = levels[:len(levels)-1]
			done()
			continue
		}
		if last := len(levels) - 1; last >= 0 && levels[last].isMap && !levels[last].keyRead {
			levels[last].key, _ = token.(string)
			levels[last].keyRead = true
			continue
		}
		if decoder.InputOffset() >= wrong.Offset {
			for _, l := range levels {
				if l.isMap {
					path = append(path, l.key)
				} else {
					path = append(path, strconv.Itoa(l.index))
				}
			}
			kind, _, _ := strings.Cut(wrong.Value, " ")
			return path, token, kind == tokenKind(token)
		}
		if delim, ok := token.(json.Delim); ok {
			levels = append(levels, level{isMap: delim == '{'})
		} else {
			done()
		}
	}
}

// tokenKind returns the word of encoding/json for a value in its errors.
func tokenKind(token json.Token) string {
	switch token := token.(type) {
	case bool:
		return "bool"
	case json.Number:
		return "number"
	case string:
		return "string"
	case json.Delim:
		if token == '[' {
			return "array"
		}
		return "object"
	}
	return "null"
}

// typeName names a value of type t in YAML's words.
func typeName(t reflect.Type) string {
	switch k := t.Kind(); {
	case k == reflect.String:
		return "a string"
	case k == reflect.Bool:
		return "true or false"
	case k >= reflect.Int && k <= reflect.Uint64:
		return "a whole number"
	case k == reflect.Float32 || k == reflect.Float64:
		return "a number"
	case k == reflect.Slice || k == reflect.Array:
		return "a list"
	default:
		return "a mapping"
	}
}

// keyName writes a path as users of kubectl and jq do: spec.containers[0].name.
func keyName(path []string) string {
	var b strings.Builder
	for i, token := range path {
		switch _, err := strconv.Atoi(token); {
		case err == nil:
			b.WriteString("[" + token + "]")
		case strings.ContainsAny(token, ". "):
			_, _ = fmt.Fprintf(&b, "[%.200q]", token)
		default:
			if i > 0 {
				b.WriteByte('.')
			}
			_, _ = fmt.Fprintf(&b, "%.200s", token)
		}
	}
	if b.Len() == 0 {
		return "the document"
	}
	return b.String()
}

// find returns the node at path. If merge keys or aliases provide the value, find returns the deepest node on the path that
// has a place of its own.
func find(n *yaml.Node, path []string) *yaml.Node {
	for _, token := range path {
		var next *yaml.Node
		switch v := yamledit.Value(n); v.Kind {
		case yaml.MappingNode:
			next, _ = yamledit.Child(v, token)
		case yaml.SequenceNode:
			if i, err := strconv.Atoi(token); err == nil && i >= 0 && i < len(v.Content) {
				next = v.Content[i]
			}
		default: // A scalar has nothing below it.
		}
		if next == nil {
			return n
		}
		n = next
	}
	return n
}
