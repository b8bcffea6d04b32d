package operator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/credence-iam/credence/webhook/inject"
)

// errAliased says that an edit would touch what several places of the document share.
var errAliased = errors.New("anchors, aliases or merge keys are where something is to be added")

// child returns the value of a key in a mapping, and the index of its key in Content, or -1. The last of
// two keys of the same name counts, as it does to kubectl.
func child(n *yaml.Node, key string) (*yaml.Node, int) {
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

// value follows aliases.
func value(n *yaml.Node) *yaml.Node {
	for n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// text returns the text of a scalar below a mapping, or "".
func text(n *yaml.Node, path ...string) string {
	for _, key := range path {
		n, _ = child(value(n), key)
	}
	if n = value(n); n == nil || n.Kind != yaml.ScalarNode || n.ShortTag() == "!!null" {
		return ""
	}
	return n.Value
}

// terminated returns text with a newline at its end. A file without its last newline is read so by kubectl
// (k8s.io/apimachinery/pkg/util/yaml adds one to each line), and a block scalar there has another value without it.
func terminated(text []byte) []byte {
	if len(text) == 0 || text[len(text)-1] == '\n' {
		return text
	}
	return append(slices.Clip(text), '\n')
}

// parseYAML parses the one document in b as if its last line were terminated; nil if there is none, but perhaps comments.
func parseYAML(b []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(terminated(b)))
	var document yaml.Node
	switch err := decoder.Decode(&document); {
	case errors.Is(err, io.EOF):
		return nil, nil //nolint:nilnil // there is no document, and that is no error
	case err != nil:
		return nil, err
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("documents are not parted by lines that begin with ---")
	}
	return document.Content[0], nil
}

// parseJSON parses one JSON value into nodes that know their places, as parseYAML does. Package yaml would
// refuse pairs of surrogates, which are how many programs write what is beyond U+FFFF.
func parseJSON(b []byte) (*yaml.Node, error) {
	if !json.Valid(b) { // which bounds the depth, too
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

// moveTo moves the place on to an offset. Lines and columns are from 1 on, and in characters. To count each column from the
// beginning of its line would take for ever: much JSON is a single line.
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
		_, err = p.d.Token() // the other bracket
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

// made returns the nodes of a value of a patch. They have no place yet: their Line is 0.
func made(v any) (*yaml.Node, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	n, err := parseJSON(b)
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

// patched is a tree with operations applied to it, in place. What was added has no line, and what took the
// place of something else is listed.
type patched struct {
	root     *yaml.Node
	replaced map[*yaml.Node]*yaml.Node // :: new → old
}

func newPatched(root *yaml.Node) *patched {
	return &patched{root: root, replaced: map[*yaml.Node]*yaml.Node{}}
}

// addAll applies the operations of all templates.
func (p *patched) addAll(ctx context.Context, adds []placed) error {
	for _, add := range adds {
		if err := ctx.Err(); err != nil {
			return err
		}
		for _, op := range add.ops {
			if err := p.add(add.template, op); err != nil {
				return err
			}
		}
	}
	return nil
}

// add applies one operation whose path is below the value at prefix, a list of keys and indices.
func (p *patched) add(prefix []string, op inject.Operation) error {
	if op.Op != "add" {
		return fmt.Errorf("operation %q is not understood", op.Op)
	}
	tokens := slices.Clone(prefix)
	for token := range strings.SplitSeq(strings.TrimPrefix(op.Path, "/"), "/") {
		tokens = append(tokens, strings.NewReplacer("~1", "/", "~0", "~").Replace(token))
	}
	n := p.root
	for _, token := range tokens[:len(tokens)-1] {
		if n.Kind == yaml.AliasNode {
			return errAliased
		}
		var below *yaml.Node
		if n.Kind == yaml.SequenceNode {
			if i, err := strconv.Atoi(token); err == nil && i >= 0 && i < len(n.Content) {
				below = n.Content[i]
			}
		} else {
			below, _ = child(n, token)
		}
		if below == nil {
			return errAliased // it is there to who decided, so something has merged it
		}
		n = below
	}
	added, err := made(op.Value)
	if err != nil {
		return err
	}
	last := tokens[len(tokens)-1]
	switch n.Kind {
	case yaml.MappingNode:
		old, at := child(n, last)
		if at >= 0 {
			p.replaced[added] = old
			n.Content[at+1] = added
			return nil
		}
		n.Content = append(n.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: last}, added)
		return nil
	case yaml.SequenceNode:
		at := len(n.Content)
		if last != "-" {
			if at, err = strconv.Atoi(last); err != nil || at < 0 || at > len(n.Content) {
				return fmt.Errorf("the list has no place %q", last)
			}
		}
		n.Content = slices.Insert(n.Content, at, added)
		return nil
	default:
		return errAliased
	}
}

// same reports whether two trees hold the same, in the same order unless anyOrder says that keys may differ
// in theirs. Numbers and all other scalars are compared as they are written.
func same(a, b *yaml.Node, anyOrder bool) bool {
	a, b = value(a), value(b)
	if a.Kind != b.Kind || a.ShortTag() != b.ShortTag() || a.Value != b.Value || len(a.Content) != len(b.Content) {
		return false
	}
	if a.Kind == yaml.MappingNode && anyOrder {
		a, b = sorted(a), sorted(b)
	}
	for i := range a.Content {
		if !same(a.Content[i], b.Content[i], anyOrder) {
			return false
		}
	}
	return true
}

// sorted returns a mapping with scalar keys in the order of the keys.
func sorted(n *yaml.Node) *yaml.Node {
	pairs := make([][2]*yaml.Node, 0, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		pairs = append(pairs, [2]*yaml.Node{n.Content[i], n.Content[i+1]})
	}
	slices.SortStableFunc(pairs, func(a, b [2]*yaml.Node) int { return strings.Compare(a[0].Value, b[0].Value) })
	s := &yaml.Node{Kind: n.Kind}
	for _, pair := range pairs {
		s.Content = append(s.Content, pair[0], pair[1])
	}
	return s
}

// maxNodes bounds a document whose aliases are written out or followed: a few lines of them can stand for billions of
// nodes. An object of 3 MiB, the most that an API server reads, has fewer.
const maxNodes = 1 << 20

// expand writes out all aliases and merge keys of a document, and returns its new text.
func expand(root *yaml.Node) ([]byte, error) {
	left := maxNodes
	var write func(n *yaml.Node) (*yaml.Node, error)
	write = func(n *yaml.Node) (*yaml.Node, error) {
		if left--; left < 0 {
			return nil, fmt.Errorf("its aliases stand for more than %d values", maxNodes)
		}
		if n.Kind == yaml.AliasNode {
			return write(n.Alias)
		}
		c := *n
		c.Anchor, c.Content = "", nil
		var merged []*yaml.Node
		for i, element := range n.Content {
			written, err := write(element)
			if err != nil {
				return nil, err
			}
			if n.Kind == yaml.MappingNode && i%2 == 1 && n.Content[i-1].Tag == "!!merge" {
				c.Content = c.Content[:len(c.Content)-1]
				if written.Kind == yaml.SequenceNode {
					merged = append(merged, written.Content...)
				} else {
					merged = append(merged, written)
				}
				continue
			}
			c.Content = append(c.Content, written)
		}
		for _, m := range merged {
			if m.Kind != yaml.MappingNode {
				return nil, errors.New("a merge key has no mapping")
			}
			for i := 0; i+1 < len(m.Content); i += 2 {
				if _, at := child(&c, m.Content[i].Value); at < 0 {
					c.Content = append(c.Content, m.Content[i], m.Content[i+1])
				}
			}
		}
		return &c, nil
	}
	written, err := write(root)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	encoder := yaml.NewEncoder(&b)
	encoder.SetIndent(2)
	if err := encoder.Encode(written); err != nil {
		return nil, err
	}
	return b.Bytes(), encoder.Close()
}
