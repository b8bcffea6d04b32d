package operator

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
)

// This file makes messages for input that cannot be read: they name the line of the file and the key, and say what to
// write instead. It runs after something failed, and changes no decision.

// fileLine returns the line of the file on which n is written, from 1 on.
func (d *document) fileLine(n *yaml.Node) int {
	line := d.line + n.Line - 1
	if d.json {
		line += bytes.Count(d.text[:d.head], []byte("\n"))
	}
	return line
}

// relativeLine is the line that package yaml names in an error. It counts from the beginning of the document.
var relativeLine = regexp.MustCompile(`^line (\d+): `)

// unknownAnchor is the error of package yaml for an alias whose anchor is not written before it in the document. It names no line.
var unknownAnchor = regexp.MustCompile(`^unknown anchor '(.+)' referenced$`)

// unreadable returns err, an error of a YAML or JSON parser, with the line of the file, and with the line of the first Helm
// template if there is one: such a file becomes YAML by "helm template" only.
func (d *document) unreadable(err error) error {
	message := strings.TrimPrefix(strings.Join(strings.Fields(err.Error()), " "), "yaml: ")
	if match := relativeLine.FindStringSubmatch(message); match != nil {
		// Package yaml names the line of the mistake or the one before it.
		if line, err := strconv.Atoi(match[1]); err == nil {
			message = fmt.Sprintf("near line %d: %s", d.line+line-1, message[len(match[0]):])
		}
	} else if match := unknownAnchor.FindStringSubmatch(message); match != nil {
		message = fmt.Sprintf("there is no anchor &%s before the alias *%s in this document", match[1], match[1])
		if at := regexp.MustCompile(`(?m)[\s\[{,:-]\*` + regexp.QuoteMeta(match[1]) + `(?:[\s,\]}]|$)`).FindIndex(d.text); at != nil {
			message = fmt.Sprintf("line %d: %s", d.line+bytes.Count(d.text[:at[0]+1], []byte("\n")), message)
		}
	} else if strings.HasPrefix(err.Error(), "yaml: ") && d.root == nil {
		message = fmt.Sprintf("near line %d: %s", d.line, message) // package yaml names no first line
	}
	if n := mappingAsKey(d.root); n != nil {
		message = fmt.Sprintf("line %d: a mapping cannot be a key", d.fileLine(n))
	}
	return errors.New(clip.Bytes(message, 500) + d.helmHint())
}

// helmHint says where the first Helm template of the document is, in the form of a continued sentence, or "".
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

// mappingAsKey returns the first mapping that is written where a key belongs, as an unquoted {{ … }} is, or nil.
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

// misread returns the error for raw, the JSON of the value at path in the document, which could not be decoded because of err.
// If a value has the wrong type, it names the line, the key, the value and what to write.
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
	if v := value(n); v != nil && v.Kind == yaml.ScalarNode {
		written = v.Value // as it is in the file: off, and not false
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
			where += "; write " + quote(written)
		}
	case json.Number:
		where += fmt.Sprintf(", but %.100s is a number", written)
		if wantString {
			where += "; write " + quote(written)
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

// misreadPod is misread for an error of the injector about the pod at path, whose own words name no line. Any other refusal
// is returned as it is.
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

// templated returns an error if an annotation with the prefix, of the pod at path, has a Helm template as its value: nothing can
// be decided by it.
func (d *document) templated(path []string, prefix string) error {
	annotations := value(find(d.root, append(slices.Clone(path), "metadata", "annotations")))
	if annotations == nil || annotations.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(annotations.Content); i += 2 {
		key, v := annotations.Content[i], value(annotations.Content[i+1])
		if strings.HasPrefix(key.Value, prefix) && v.Kind == yaml.ScalarNode && strings.Contains(v.Value, "{{") {
			return fmt.Errorf("line %d: annotation %q is a Helm template, %.60q; run \"helm template\" and give its output to credence inject",
				d.fileLine(key), key.Value, v.Value)
		}
	}
	return nil
}

// locate finds the value of raw that wrong is about: its path and its first token. It is not found where wrong comes from a
// type that decodes itself, whose offsets begin elsewhere.
func locate(raw []byte, wrong *json.UnmarshalTypeError) (path []string, got json.Token, found bool) {
	type level struct {
		isMap, keyRead bool
		key            string
		index          int
	}
	var levels []level
	done := func() { // with a value of the last level
		if last := len(levels) - 1; last >= 0 {
			levels[last].keyRead = false
			levels[last].index++
		}
	}
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	for {
		token, err := decoder.Token()
		if err != nil { // io.EOF, for raw was decoded before
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

// tokenKind returns the word that encoding/json has for a value in its errors.
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

// typeName says what a value of type t is in YAML.
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

// find returns the node at path. If merge keys or aliases put it where it has no place of its own, it is the deepest node
// on the way that has one.
func find(n *yaml.Node, path []string) *yaml.Node {
	for _, token := range path {
		var next *yaml.Node
		switch v := value(n); v.Kind {
		case yaml.MappingNode:
			next, _ = child(v, token)
		case yaml.SequenceNode:
			if i, err := strconv.Atoi(token); err == nil && i >= 0 && i < len(v.Content) {
				next = v.Content[i]
			}
		default: // a scalar has nothing below
		}
		if next == nil {
			return n
		}
		n = next
	}
	return n
}
