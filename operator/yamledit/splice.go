package yamledit

import (
	"bytes"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// splicer finds the places of a tree's new nodes in the text of the document. It adds lines and keeps all other bytes.
type splicer struct {
	text     []byte
	lines    []int // the offset of each line
	tree     *Tree
	edits    []Edit
	newline  string
	indent   string // of one level
	listStep int    // indentation of a list below its key, in spaces
	json     bool
	comma    string // between elements on one line
	colon    string
}

// Splice returns the edits that add the new nodes of tree to text, the text that it was parsed from. It returns [ErrShape]
// or [ErrAliased] if it finds no place for one of them.
func Splice(text []byte, tree *Tree, isJSON bool) ([]Edit, error) {
	original := text
	if !isJSON {
		text = Terminated(text)
	}
	s := &splicer{text: text, lines: lineStarts(text), tree: tree, newline: newlineOf(text), indent: "  ", json: isJSON, comma: ", ", colon: ": "}
	if isJSON {
		if !bytes.Contains(text, []byte(`": `)) {
			s.comma, s.colon = ",", ":"
		}
		for i := 1; i < len(s.lines); i++ {
			if white := s.leading(s.lines[i]); white != "" {
				s.indent = white
				break
			}
		}
	} else {
		s.measure(tree.Root)
	}
	if err := s.visit(tree.Root, nil, nil, false); err != nil {
		return nil, err
	}
	slices.SortStableFunc(s.edits, func(a, b Edit) int { return a.Start - b.Start })
	for i := 1; i < len(s.edits); i++ {
		if s.edits[i].Start < s.edits[i-1].End {
			return nil, ErrShape
		}
	}
	return beforeEnd(s.edits, original), nil
}

// measure sets the indentation of the document, from its first mapping and its first list below a key.
func (s *splicer) measure(root *yaml.Node) {
	maps, lists := false, false
	var look func(n *yaml.Node)
	look = func(n *yaml.Node) {
		if n.Kind != yaml.MappingNode || n.Style&yaml.FlowStyle != 0 {
			for _, c := range n.Content {
				if n.Kind == yaml.SequenceNode && n.Style&yaml.FlowStyle == 0 {
					look(c)
				}
			}
			return
		}
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, below := n.Content[i], n.Content[i+1]
			if key.Line > 0 && below.Line > key.Line && below.Style&yaml.FlowStyle == 0 && below.Anchor == "" {
				step := below.Column - key.Column
				switch {
				case below.Kind == yaml.MappingNode && !maps && step > 0 && step <= 8:
					s.indent, maps = strings.Repeat(" ", step), true
				case below.Kind == yaml.SequenceNode && !lists && step >= 0 && step <= 8:
					s.listStep, lists = step, true
				}
			}
			look(below)
		}
	}
	look(root)
}

// visit makes the edits below n, inner ones first, because edits at one place keep this order. key is the key of n in parent.
func (s *splicer) visit(n, parent, key *yaml.Node, flow bool) error {
	if n.Kind != yaml.MappingNode && n.Kind != yaml.SequenceNode {
		return nil // This includes aliases. Their node is visited at its own place.
	}
	step := 1
	if n.Kind == yaml.MappingNode {
		step = 2
	}
	news, olds := 0, 0
	for i := 0; i+step <= len(n.Content); i += step {
		if n.Content[i].Line == 0 {
			news++
		} else {
			olds++
		}
	}
	isFlow := flow || n.Style&yaml.FlowStyle != 0
	if news > 0 && olds == 0 && isFlow && !flow && !s.json {
		return s.replace(n, n, parent, key, false) // {} or []: replace it by a block, which is easier to read.
	}
	for i := 0; i+step <= len(n.Content); i += step {
		element := n.Content[i+step-1]
		switch {
		case n.Content[i].Line == 0:
		case element.Line == 0:
			k := n.Content[i]
			old, ok := s.tree.replaced[element]
			if !ok || step != 2 {
				return ErrShape
			}
			if err := s.replace(element, old, n, k, isFlow); err != nil {
				return err
			}
		default:
			var k *yaml.Node
			if step == 2 {
				k = n.Content[i]
			}
			if err := s.visit(element, n, k, isFlow); err != nil {
				return err
			}
		}
	}
	if news == 0 {
		return nil
	}
	if isFlow {
		return s.addInFlow(n, step, olds)
	}
	return s.addInBlock(n, key, step)
}

// addInBlock adds lines for the new elements of n.
func (s *splicer) addInBlock(n, key *yaml.Node, step int) error {
	start, err := s.start(n)
	if err != nil {
		return err
	}
	column := s.column(start)
	for i := 0; i+step <= len(n.Content); i += step {
		if n.Content[i].Line > 0 {
			continue
		}
		lines := s.render(&yaml.Node{Kind: n.Kind, Content: n.Content[i : i+step]}, column)
		if i > 0 {
			// It follows the last old element before it, and the new elements after that one.
			last := i
			for last > 0 && n.Content[last].Line == 0 {
				last -= step
			}
			if n.Content[last].Line > 0 {
				end, err := s.entryEnd(n, last, step)
				if err != nil {
					return err
				}
				s.insertLines(end, lines)
				continue
			}
		}
		// The first element of a list goes below the key, so that comments stay above the old first element.
		if key == nil || step != 1 {
			return ErrShape
		}
		end, err := s.end(key)
		if err != nil || s.lineOf(start) == s.lineOf(end) {
			return ErrShape
		}
		s.insertLines(end, lines)
	}
	return nil
}

// addInFlow adds the new elements of n between its brackets.
func (s *splicer) addInFlow(n *yaml.Node, step, olds int) error {
	start, err := s.start(n)
	if err != nil {
		return err
	}
	if c := s.text[start]; c != '[' && c != '{' {
		return ErrShape
	}
	after := start + 1 // the place of the next element
	begin := s.leading(s.lineStart(start))
	// multiline: each element has its own line, indented by deep.
	multiline, deep := false, begin+s.indent
	if olds > 0 {
		for i := 0; i < len(n.Content); i += step {
			if n.Content[i].Line > 0 {
				first, err := s.start(n.Content[i])
				if err != nil {
					return err
				}
				multiline = s.lineOf(first) != s.lineOf(start)
				deep = s.leading(s.lineStart(first))
				break
			}
		}
	} else {
		multiline = s.json && bytes.IndexByte(bytes.TrimSpace(s.text), '\n') >= 0
	}
	comma, colon, before := s.comma, s.colon, ""
	if multiline {
		comma, colon, before = ",", ": ", s.newline+deep
	}
	seen := 0 // old elements
	for i := 0; i+step <= len(n.Content); i += step {
		if n.Content[i].Line > 0 {
			if after, err = s.entryEnd(n, i, step); err != nil {
				return err
			}
			seen++
			continue
		}
		element := before
		if step == 2 {
			element += Quote(n.Content[i].Value) + colon
		}
		element += s.flowText(n.Content[i+step-1], multiline, deep)
		switch {
		case seen == 0 && olds > 0:
			element += comma
		case i > 0:
			element = comma + element
		}
		if olds == 0 && multiline && i+step == len(n.Content) {
			element += s.newline + begin
		}
		s.edits = append(s.edits, Edit{after, after, element})
	}
	return nil
}

// replace replaces the value old of key in parent by n.
func (s *splicer) replace(n, old, parent, key *yaml.Node, flow bool) error {
	if key == nil || old.Anchor != "" || old.Kind == yaml.AliasNode {
		return ErrAliased
	}
	keyEnd, err := s.end(key)
	if err != nil {
		return err
	}
	start, end := keyEnd, keyEnd
	if !absent(old) {
		if start, err = s.start(old); err != nil {
			return err
		}
		if end, err = s.end(old); err != nil {
			return err
		}
		if s.lineOf(start) != s.lineOf(keyEnd) || s.lineOf(end) != s.lineOf(start) {
			return ErrShape
		}
	} else if start = s.skip(keyEnd, " \t"); start < len(s.text) && s.text[start] == ':' {
		start++
		end = start
	} else {
		return ErrShape
	}
	switch {
	case flow || s.json:
		t := s.flowText(n, false, "")
		if s.json && bytes.IndexByte(bytes.TrimSpace(s.text), '\n') >= 0 {
			t = s.flowText(n, true, s.leading(s.lineStart(start)))
		}
		if absent(old) {
			t = " " + t
		}
		s.edits = append(s.edits, Edit{start, end, t})
	case n.Kind == yaml.ScalarNode:
		t := scalar(n)
		if absent(old) {
			t = " " + t
		}
		s.edits = append(s.edits, Edit{start, end, t})
	default:
		first, err := s.start(parent)
		if err != nil {
			return err
		}
		for start > 0 && s.text[start-1] == ' ' {
			start--
		}
		s.edits = append(s.edits, Edit{start, end, ""})
		column := s.column(first) + len(s.indent)
		if n.Kind == yaml.SequenceNode {
			column = s.column(first) + s.listStep
		}
		s.insertLines(end, s.render(n, column))
	}
	return nil
}

// absent reports whether n is a null without text.
func absent(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Value == "" && n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) == 0
}

// insertLines adds lines after the line of offset at.
func (s *splicer) insertLines(at int, lines []string) {
	next := s.nextLine(at)
	t := strings.Join(lines, s.newline)
	if s.text[next-1] == '\n' || s.text[next-1] == '\r' {
		t += s.newline
	} else {
		t = s.newline + t
	}
	s.edits = append(s.edits, Edit{next, next, t})
}

// render writes a node in block style, indented by column spaces.
func (s *splicer) render(n *yaml.Node, column int) []string {
	var lines []string
	white := strings.Repeat(" ", column)
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, v := scalar(n.Content[i]), n.Content[i+1]
			if len(v.Content) == 0 {
				lines = append(lines, white+key+": "+scalar(v))
				continue
			}
			deeper := column + len(s.indent)
			if v.Kind == yaml.SequenceNode {
				deeper = column + s.listStep
			}
			lines = append(append(lines, white+key+":"), s.render(v, deeper)...)
		}
	default:
		for _, v := range n.Content {
			if len(v.Content) == 0 {
				lines = append(lines, white+"- "+scalar(v))
				continue
			}
			item := s.render(v, column+2)
			item[0] = white + "- " + item[0][column+2:]
			lines = append(lines, item...)
		}
	}
	return lines
}

// scalar returns the text of a scalar, or of a collection without elements. YAML 1.1 and 1.2 read it the same way.
func scalar(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "{}"
	case n.Kind == yaml.SequenceNode:
		return "[]"
	case n.Tag != "!!str":
		return n.Value
	}
	// Package yaml knows which texts need quotes, including the words of YAML 1.1.
	b, err := yaml.Marshal(n.Value)
	if plain := strings.TrimSuffix(string(b), "\n"); err == nil && !strings.ContainsAny(plain, "\n\\") {
		return plain
	}
	return Quote(n.Value)
}

// flowText returns n as JSON. If multiline is true, each element has its own line, and deep is the indentation of n's line.
func (s *splicer) flowText(n *yaml.Node, multiline bool, deep string) string {
	if n.Kind == yaml.ScalarNode {
		if n.Tag == "!!str" {
			return Quote(n.Value)
		}
		return n.Value
	}
	open, closing := "[", "]"
	if n.Kind == yaml.MappingNode {
		open, closing = "{", "}"
	}
	var elements []string
	for i := 0; i < len(n.Content); i++ {
		element := ""
		if n.Kind == yaml.MappingNode {
			colon := s.colon
			if multiline {
				colon = ": "
			}
			element = Quote(n.Content[i].Value) + colon
			i++
		}
		elements = append(elements, element+s.flowText(n.Content[i], multiline, deep+s.indent))
	}
	if !multiline || len(elements) == 0 {
		return open + strings.Join(elements, s.comma) + closing
	}
	between := "," + s.newline + deep + s.indent
	return open + between[1:] + strings.Join(elements, between) + s.newline + deep + closing
}

// start returns the offset of n's own text, after its anchor and its tag.
func (s *splicer) start(n *yaml.Node) (int, error) {
	if n.Line < 1 || n.Line > len(s.lines) {
		return 0, ErrShape
	}
	at := s.lines[n.Line-1]
	if at == 0 && bytes.HasPrefix(s.text, []byte("\ufeff")) {
		at = 3
	}
	for range n.Column - 1 {
		_, size := utf8.DecodeRune(s.text[at:])
		at += size
	}
	for at < len(s.text) && (s.text[at] == '&' || s.text[at] == '!') {
		for at < len(s.text) && strings.IndexByte(" \t\r\n", s.text[at]) < 0 {
			at++
		}
		at = s.skipWhite(at)
	}
	if at >= len(s.text) && !absent(n) {
		return 0, ErrShape
	}
	want := ""
	switch flow := n.Style&yaml.FlowStyle != 0; {
	case n.Kind == yaml.SequenceNode && flow:
		want = "["
	case n.Kind == yaml.SequenceNode:
		want = "-"
	case n.Kind == yaml.MappingNode && flow:
		want = "{"
	case n.Kind == yaml.MappingNode:
		if len(n.Content) == 0 || n.Content[0].Line < 1 {
			return 0, ErrShape
		}
		if first, err := s.start(n.Content[0]); err != nil || n.Content[0].Anchor == "" && first != at {
			return 0, ErrShape // "? key : value"
		}
	case n.Kind == yaml.AliasNode:
		want = "*"
	case n.Style&yaml.DoubleQuotedStyle != 0:
		want = `"`
	case n.Style&yaml.SingleQuotedStyle != 0:
		want = "'"
	case n.Style&yaml.LiteralStyle != 0:
		want = "|"
	case n.Style&yaml.FoldedStyle != 0:
		want = ">"
	}
	if want != "" && s.text[at] != want[0] {
		return 0, ErrShape
	}
	return at, nil
}

// end returns the offset after n's text.
func (s *splicer) end(n *yaml.Node) (int, error) {
	at, err := s.start(n)
	if err != nil {
		return 0, err
	}
	step := 1
	switch n.Kind {
	case yaml.MappingNode:
		step = 2
	case yaml.AliasNode:
		return at + 1 + len(n.Value), nil
	case yaml.ScalarNode:
		return s.scalarEnd(n, at)
	default: // a list
	}
	if n.Style&yaml.FlowStyle == 0 {
		for i := len(n.Content) - step; i >= 0; i -= step {
			if n.Content[i].Line > 0 {
				return s.entryEnd(n, i, step)
			}
		}
		return 0, ErrShape
	}
	closing := at
	at++
	for i := 0; i+step <= len(n.Content); i += step {
		if n.Content[i].Line == 0 {
			continue
		}
		if at, err = s.entryEnd(n, i, step); err != nil {
			return 0, err
		}
	}
	for at = s.skipWhite(at); at < len(s.text) && s.text[at] == ','; at = s.skipWhite(at) {
		at++
	}
	if at >= len(s.text) || s.text[at] != s.text[closing]+2 { // In ASCII, ] is [ plus 2, and } is { plus 2.
		return 0, ErrShape
	}
	return at + 1, nil
}

// entryEnd returns the offset after the element at index i of n.Content, which has step nodes.
func (s *splicer) entryEnd(n *yaml.Node, i, step int) (int, error) {
	v := n.Content[i+step-1]
	if old, ok := s.tree.replaced[v]; ok {
		v = old
	}
	if !absent(v) || v.Anchor != "" || v.Style&yaml.TaggedStyle != 0 {
		return s.end(v)
	}
	if step != 2 {
		return 0, ErrShape
	}
	at, err := s.end(n.Content[i])
	if err != nil {
		return 0, err
	}
	if next := s.skip(at, " \t"); next < len(s.text) && s.text[next] == ':' {
		return next + 1, nil
	}
	return at, nil // {a}
}

func (s *splicer) scalarEnd(n *yaml.Node, at int) (int, error) {
	switch {
	case n.Style&yaml.DoubleQuotedStyle != 0:
		for at++; at < len(s.text); at++ {
			switch s.text[at] {
			case '\\':
				at++
			case '"':
				return at + 1, nil
			}
		}
		return 0, ErrShape
	case n.Style&yaml.SingleQuotedStyle != 0:
		for at++; at < len(s.text); at++ {
			if s.text[at] != '\'' {
				continue
			}
			if at+1 == len(s.text) || s.text[at+1] != '\'' {
				return at + 1, nil
			}
			at++
		}
		return 0, ErrShape
	case n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		return s.blockEnd(n, at)
	}
	// A plain scalar can have several lines. Its text equals its value, except for white space.
	for i := 0; i < len(n.Value); i++ {
		if strings.IndexByte(" \t\n", n.Value[i]) >= 0 {
			continue
		}
		if at = s.skip(at, " \t\r\n"); at >= len(s.text) || s.text[at] != n.Value[i] {
			return 0, ErrShape
		}
		at++
	}
	return at, nil
}

// blockEnd returns the end of the last line of a literal or folded scalar. Its header is at offset at.
func (s *splicer) blockEnd(n *yaml.Node, at int) (int, error) {
	header := string(s.text[at:s.nextLine(at)])
	header, _, _ = strings.Cut(header, "#")
	keep := strings.Contains(header, "+")
	line := s.lineOf(at)
	if content := strings.TrimRight(n.Value, "\n"); n.Style&yaml.LiteralStyle != 0 || content == "" {
		count := strings.Count(n.Value, "\n") // The value has the lines of the text.
		if !keep {
			count = strings.Count(content, "\n") + 1
			if content == "" {
				count = 0
			}
		}
		line += count
	} else {
		if strings.ContainsAny(header, "123456789") {
			return 0, ErrShape
		}
		indent := ""
		for next := line + 1; next < len(s.lines); next++ {
			white := s.leading(s.lines[next])
			if len(bytes.TrimSpace(s.text[s.lines[next]:s.nextLine(s.lines[next])])) == 0 {
				continue
			}
			if indent == "" {
				indent = white
			}
			if !strings.HasPrefix(white, indent) {
				break
			}
			line = next
		}
		// keep also takes the empty lines after the scalar, but not the rest after the last newline of the text.
		for keep && line+2 < len(s.lines) && len(bytes.TrimSpace(s.text[s.lines[line+1]:s.lines[line+2]])) == 0 {
			line++
		}
	}
	if line >= len(s.lines) {
		return 0, ErrShape
	}
	return max(s.nextLine(s.lines[line])-1, at), nil
}

func (s *splicer) skip(at int, chars string) int {
	for at < len(s.text) && strings.IndexByte(chars, s.text[at]) >= 0 {
		at++
	}
	return at
}

// skipWhite skips white space and comments.
func (s *splicer) skipWhite(at int) int {
	for {
		at = s.skip(at, " \t\r\n")
		if at >= len(s.text) || s.text[at] != '#' {
			return at
		}
		at = s.nextLine(at)
	}
}

// leading returns the white space at the start of a line.
func (s *splicer) leading(lineStart int) string {
	return string(s.text[lineStart:s.skip(lineStart, " \t")])
}

// column counts the characters before at on its line.
func (s *splicer) column(at int) int {
	return utf8.RuneCount(bytes.TrimPrefix(s.text[s.lineStart(at):at], []byte("\ufeff")))
}

// lineOf returns the index of the line with offset at.
func (s *splicer) lineOf(at int) int {
	i, found := slices.BinarySearch(s.lines, at)
	if !found {
		i--
	}
	return i
}

func (s *splicer) lineStart(at int) int { return s.lines[s.lineOf(at)] }

// nextLine returns the offset of the line after the line of at.
func (s *splicer) nextLine(at int) int {
	if next := s.lineOf(at) + 1; next < len(s.lines) {
		return s.lines[next]
	}
	return len(s.text)
}
