package yamledit

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Tree is a document to which [Tree.Add] adds values, in place.
type Tree struct {
	Root     *yaml.Node
	replaced map[*yaml.Node]*yaml.Node // :: new node → the node that it replaces
}

// NewTree returns a tree that owns root, the result of [Parse] or [ParseJSON].
func NewTree(root *yaml.Node) *Tree {
	return &Tree{Root: root, replaced: map[*yaml.Node]*yaml.Node{}}
}

// Add adds a value at path, a list of keys and indices, like an "add" operation of JSON Patch (RFC 6902, section 4.1).
// In a mapping, it sets a key. In a list, it inserts before an index or, with "-", at the end. It returns [ErrAliased]
// if the path leads through an alias or a merged key.
func (t *Tree) Add(path []string, v any) error {
	parent := t.Root
	for _, token := range path[:len(path)-1] {
		var below *yaml.Node
		if parent.Kind == yaml.SequenceNode {
			if i, err := strconv.Atoi(token); err == nil && i >= 0 && i < len(parent.Content) {
				below = parent.Content[i]
			}
		} else {
			below, _ = Child(parent, token)
		}
		if below == nil || below.Kind == yaml.AliasNode {
			return ErrAliased // The value of the document has the path, so a merge key or an alias provides it.
		}
		parent = below
	}
	added, err := newNode(v)
	if err != nil {
		return err
	}
	last := path[len(path)-1]
	switch parent.Kind {
	case yaml.MappingNode:
		old, at := Child(parent, last)
		if at >= 0 {
			t.replaced[added] = old
			parent.Content[at+1] = added
			return nil
		}
		parent.Content = append(parent.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: last}, added)
		return nil
	case yaml.SequenceNode:
		at := len(parent.Content)
		if last != "-" {
			if at, err = strconv.Atoi(last); err != nil || at < 0 || at > len(parent.Content) {
				return fmt.Errorf("the list has no index %q", last)
			}
		}
		parent.Content = slices.Insert(parent.Content, at, added)
		return nil
	default:
		return ErrAliased
	}
}

// Same reports whether two trees are equal. It compares numbers and other scalars as they are written. If anyOrder is
// true, the order of keys does not matter.
func Same(a, b *yaml.Node, anyOrder bool) bool {
	a, b = Value(a), Value(b)
	if a.Kind != b.Kind || a.ShortTag() != b.ShortTag() || a.Value != b.Value || len(a.Content) != len(b.Content) {
		return false
	}
	if a.Kind == yaml.MappingNode && anyOrder {
		a, b = sorted(a), sorted(b)
	}
	for i := range a.Content {
		if !Same(a.Content[i], b.Content[i], anyOrder) {
			return false
		}
	}
	return true
}

// sorted returns the mapping n with its scalar keys in order.
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

// MaxNodes is the maximum number of nodes after aliases are resolved: a few lines of aliases can stand for billions of
// nodes. An object of 3 MiB, the maximum of an API server, has fewer.
const MaxNodes = 1 << 20

// Expand returns the text of a document with its aliases and merge keys resolved. It fails above [MaxNodes].
func Expand(root *yaml.Node) ([]byte, error) {
	left := MaxNodes
	var write func(n *yaml.Node) (*yaml.Node, error)
	write = func(n *yaml.Node) (*yaml.Node, error) {
		if left--; left < 0 {
			return nil, fmt.Errorf("its aliases stand for more than %d values; shorten the document", MaxNodes)
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
				if _, at := Child(&c, m.Content[i].Value); at < 0 {
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
