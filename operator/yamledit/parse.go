package yamledit

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Child returns the value of a key in a mapping, and the index of the key in Content. Without such a key it returns nil
// and -1. If a mapping has a key twice, the last one counts, as for kubectl.
func Child(n *yaml.Node, key string) (*yaml.Node, int) {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil, -1
	}
	for i := len(n.Content) - 2; i >= 0; i -= 2 {
		if n.Content[i].Kind == yaml.ScalarNode && n.Content[i].Value == key {
			return n.Content[i+1], i
		}
	}
	return nil, -1
}

// Value returns n, or the node that the alias n refers to.
func Value(n *yaml.Node) *yaml.Node {
	for n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// Text returns the text of the scalar at path, or "" if there is none.
func Text(n *yaml.Node, path ...string) string {
	for _, key := range path {
		n, _ = Child(Value(n), key)
	}
	if n = Value(n); n == nil || n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		return ""
	}
	return n.Value
}

// Terminated returns text with a newline at its end. kubectl reads a file without its last newline the same way
// (k8s.io/apimachinery/pkg/util/yaml adds a newline to each line). A block scalar at the end depends on it.
func Terminated(text []byte) []byte {
	if len(text) == 0 || text[len(text)-1] == '\n' {
		return text
	}
	return append(slices.Clip(text), '\n')
}

// Parse parses the terminated text of one YAML document. It returns nil if b has no document, or only comments.
func Parse(b []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(Terminated(b)))
	var document yaml.Node
	switch err := decoder.Decode(&document); {
	case errors.Is(err, io.EOF):
		return nil, nil //nolint:nilnil // A text without a document is no error.
	case err != nil:
		return nil, err
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("it has several documents; separate them by lines that begin with ---")
	}
	return document.Content[0], nil
}

// ParseJSON parses one JSON value into nodes with lines and columns, like [Parse]. Package yaml cannot do it: it refuses
// surrogate pairs, by which many programs write characters above U+FFFF.
func ParseJSON(b []byte) (*yaml.Node, error) {
	if !json.Valid(b) { // This also bounds the depth.
		return nil, errors.New("not valid JSON")
	}
	p := jsonParser{b: b, d: json.NewDecoder(bytes.NewReader(b)), lines: lineStarts(b)}
	p.d.UseNumber()
	return p.next()
}

type jsonParser struct {
	b     []byte
	d     *json.Decoder
	lines []int
	// The place of the last value.
	at, line, column int
}

// moveTo advances the place to an offset. Lines and columns start at 1; columns count characters. It counts from the last
// place, because JSON often is one long line: counting each column from the start of its line takes quadratic time.
func (p *jsonParser) moveTo(at int) {
	for p.line < len(p.lines) && p.lines[p.line] <= at {
		p.at, p.column = p.lines[p.line], 1
		p.line++
	}
	p.column += utf8.RuneCount(p.b[p.at:at])
	p.at = at
}

func (p *jsonParser) next() (*yaml.Node, error) {
	at := int(p.d.InputOffset())
	for at < len(p.b) && strings.IndexByte(" \t\r\n,:", p.b[at]) >= 0 {
		at++
	}
	token, err := p.d.Token()
	if err != nil {
		return nil, err
	}
	n := &yaml.Node{Kind: yaml.ScalarNode}
	p.moveTo(at)
	n.Line, n.Column = p.line, p.column
	switch token := token.(type) {
	case json.Delim:
		n.Kind, n.Tag, n.Style = yaml.SequenceNode, "!!seq", yaml.FlowStyle
		if token == '{' {
			n.Kind, n.Tag = yaml.MappingNode, "!!map"
		}
		for p.d.More() {
			element, err := p.next()
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, element)
		}
		_, err = p.d.Token() // the closing bracket
		return n, err
	case string:
		n.Tag, n.Style, n.Value = "!!str", yaml.DoubleQuotedStyle, token
	case json.Number:
		n.Tag, n.Value = "!!int", token.String()
		if strings.ContainsAny(n.Value, ".eE") {
			n.Tag = "!!float"
		}
	case bool:
		n.Tag, n.Value = "!!bool", strconv.FormatBool(token)
	default:
		n.Tag, n.Value = "!!null", "null"
	}
	return n, nil
}

// newNode returns the node of a value to add. It and all below have Line 0, which marks them as new.
func newNode(v any) (*yaml.Node, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	n, err := ParseJSON(b)
	if err != nil {
		return nil, err
	}
	var clear func(n *yaml.Node)
	clear = func(n *yaml.Node) {
		n.Line, n.Column, n.Style = 0, 0, 0
		for _, c := range n.Content {
			clear(c)
		}
	}
	clear(n)
	return n, nil
}

// Quote returns v as a JSON string, which YAML reads the same way.
func Quote(v string) string {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(v) // Neither a buffer nor a string causes an error.
	return strings.TrimSuffix(b.String(), "\n")
}

// lineStarts returns the offset of each line. It counts the line breaks of YAML 1.1, like package yaml.
func lineStarts(b []byte) []int {
	lines := []int{0}
	for i := range b {
		switch {
		case b[i] == '\n', b[i] == '\r' && (i+1 == len(b) || b[i+1] != '\n'):
			lines = append(lines, i+1)
		case b[i] == 0xC2 && i+1 < len(b) && b[i+1] == 0x85:
			lines = append(lines, i+2)
		case b[i] == 0xE2 && i+2 < len(b) && b[i+1] == 0x80 && (b[i+2] == 0xA8 || b[i+2] == 0xA9):
			lines = append(lines, i+3)
		}
	}
	return lines
}
