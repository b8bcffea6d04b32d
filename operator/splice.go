package operator

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// errShape says that a document is written in a way in which the place of something cannot be told.
var errShape = errors.New("the place for what is to be added cannot be told")

// edit replaces text[start:end] by other text.
type edit struct {
	start, end int
	text       string
}

// apply returns text with the edits, which are in order and do not overlap.
func apply(text []byte, edits []edit) []byte {
	var out []byte
	at := 0
	for _, e := range edits {
		out = append(append(out, text[at:e.start]...), e.text...)
		at = e.end
	}
	return append(out, text[at:]...)
}

// beforeEnd returns edits of a text that was terminated, as edits of the text itself: the first one behind its last line ends
// that line.
func beforeEnd(edits []edit, text []byte) []edit {
	newline := "\n"
	if at := bytes.IndexByte(text, '\n'); at > 0 && text[at-1] == '\r' {
		newline = "\r\n"
	}
	for i := range edits {
		if edits[i].start > len(text) {
			edits[i].start, edits[i].end = len(text), len(text)
			edits[i].text = newline + edits[i].text
			newline = ""
		}
	}
	return edits
}

// splicer finds out where in the text of a document the new nodes of its tree belong. It adds lines, and
// leaves all other bytes as they are: indentation, order, quotes and comments are those who wrote them.
type splicer struct {
	text     []byte
	lines    []int // where each line begins
	tree     *patched
	edits    []edit
	newline  string
	indent   string // of one level
	listStep int    // how much deeper a list is than its key
	json     bool
	comma    string // between elements on one line
	colon    string
}

// splice returns the edits that make the tree's new nodes part of the text.
func splice(text []byte, tree *patched, isJSON bool) (edits []edit, err error) {
	s := &splicer{text: text, lines: lineStarts(text), tree: tree, newline: "\n", indent: "  ", json: isJSON, comma: ", ", colon: ": "}
	if at := bytes.IndexByte(text, '\n'); at > 0 && text[at-1] == '\r' {
		s.newline = "\r\n"
	}
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
		s.measure(tree.root)
	}
	if err := s.visit(tree.root, nil, nil, false); err != nil {
		return nil, err
	}
	slices.SortStableFunc(s.edits, func(a, b edit) int { return a.start - b.start })
	for i := 1; i < len(s.edits); i++ {
		if s.edits[i].start < s.edits[i-1].end {
			return nil, errShape
		}
	}
	return s.edits, nil
}

// measure learns how the document is indented, from the first map and the first list below a key.
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

// visit makes the edits below n, inner ones first: where two are at one place, they stand in this order. key
// is that of n in parent.
func (s *splicer) visit(n, parent, key *yaml.Node, flow bool) error {
	if n.Kind != yaml.MappingNode && n.Kind != yaml.SequenceNode {
		return nil // aliases, too: what they stand for is visited where it is
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
		return s.replace(n, n, parent, key, false) // {} or []: a block reads better
	}
	for i := 0; i+step <= len(n.Content); i += step {
		element := n.Content[i+step-1]
		switch {
		case n.Content[i].Line == 0:
		case element.Line == 0:
			k := n.Content[i]
			old, ok := s.tree.replaced[element]
			if !ok || step != 2 {
				return errShape
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
			// Behind the one before; behind what was added there if that is new itself.
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
		// The first one of a list: below the key, so that comments above the one that was first stay there.
		if key == nil || step != 1 {
			return errShape
		}
		end, err := s.end(key)
		if err != nil || s.lineOf(start) == s.lineOf(end) {
			return errShape
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
		return errShape
	}
	after := start + 1 // where the element goes that is looked at
	begin := s.leading(s.lineStart(start))
	// multiline: elements have lines of their own, indented by deep.
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
	seen := 0 // old ones
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
			element += quote(n.Content[i].Value) + colon
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
		s.edits = append(s.edits, edit{after, after, element})
	}
	return nil
}

// replace puts a new value in the place of an old one, which stands behind key in parent.
func (s *splicer) replace(n, old, parent, key *yaml.Node, flow bool) error {
	if key == nil || old.Anchor != "" || old.Kind == yaml.AliasNode {
		return errAliased
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
			return errShape
		}
	} else if start = s.skip(keyEnd, " \t"); start < len(s.text) && s.text[start] == ':' {
		start++
		end = start
	} else {
		return errShape
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
		s.edits = append(s.edits, edit{start, end, t})
	case n.Kind == yaml.ScalarNode:
		t := scalar(n)
		if absent(old) {
			t = " " + t
		}
		s.edits = append(s.edits, edit{start, end, t})
	default:
		first, err := s.start(parent)
		if err != nil {
			return err
		}
		for start > 0 && s.text[start-1] == ' ' {
			start--
		}
		s.edits = append(s.edits, edit{start, end, ""})
		column := s.column(first) + len(s.indent)
		if n.Kind == yaml.SequenceNode {
			column = s.column(first) + s.listStep
		}
		s.insertLines(end, s.render(n, column))
	}
	return nil
}

// absent reports whether nothing is written where n stands: a null that is left out.
func absent(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Value == "" && n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) == 0
}

// insertLines adds lines behind the line of offset at.
func (s *splicer) insertLines(at int, lines []string) {
	next := s.nextLine(at)
	t := strings.Join(lines, s.newline)
	if s.text[next-1] == '\n' || s.text[next-1] == '\r' {
		t += s.newline
	} else {
		t = s.newline + t
	}
	s.edits = append(s.edits, edit{next, next, t})
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

// scalar writes a scalar, or a collection without elements, so that YAML 1.1 and 1.2 read the same.
func scalar(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "{}"
	case n.Kind == yaml.SequenceNode:
		return "[]"
	case n.Tag != "!!str":
		return n.Value
	}
	// Package yaml knows what must be quoted, words of YAML 1.1 among them.
	b, err := yaml.Marshal(n.Value)
	if plain := strings.TrimSuffix(string(b), "\n"); err == nil && !strings.ContainsAny(plain, "\n\\") {
		return plain
	}
	return quote(n.Value)
}

// quote writes a string as JSON does.
func quote(v string) string {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(v) // a buffer takes all, and any string can be encoded
	return strings.TrimSuffix(b.String(), "\n")
}

// flowText writes a node as JSON; on lines of its own where multiline, deep being the indentation of its first.
func (s *splicer) flowText(n *yaml.Node, multiline bool, deep string) string {
	if n.Kind == yaml.ScalarNode {
		if n.Tag == "!!str" {
			return quote(n.Value)
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
			element = quote(n.Content[i].Value) + colon
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

// start returns where a node's own text begins, behind its anchor and its tag.
func (s *splicer) start(n *yaml.Node) (int, error) {
	if n.Line < 1 || n.Line > len(s.lines) {
		return 0, errShape
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
		return 0, errShape
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
			return 0, errShape
		}
		if first, err := s.start(n.Content[0]); err != nil || n.Content[0].Anchor == "" && first != at {
			return 0, errShape // the form with a question mark
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
		return 0, errShape
	}
	return at, nil
}

// end returns where a node's text ends.
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
		return 0, errShape
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
	if at >= len(s.text) || s.text[at] != s.text[closing]+2 { // ] is two behind [, and } behind {
		return 0, errShape
	}
	return at + 1, nil
}

// entryEnd returns where the element of n ends that begins at index i of its Content.
func (s *splicer) entryEnd(n *yaml.Node, i, step int) (int, error) {
	v := n.Content[i+step-1]
	if old, ok := s.tree.replaced[v]; ok {
		v = old
	}
	if !absent(v) || v.Anchor != "" || v.Style&yaml.TaggedStyle != 0 {
		return s.end(v)
	}
	if step != 2 {
		return 0, errShape
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
		return 0, errShape
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
		return 0, errShape
	case n.Style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		return s.blockEnd(n, at)
	}
	// A plain one may go on over lines; but for white space it is what it stands for.
	for i := 0; i < len(n.Value); i++ {
		if strings.IndexByte(" \t\n", n.Value[i]) >= 0 {
			continue
		}
		if at = s.skip(at, " \t\r\n"); at >= len(s.text) || s.text[at] != n.Value[i] {
			return 0, errShape
		}
		at++
	}
	return at, nil
}

// blockEnd returns the end of the last line of a literal or folded scalar whose header is at.
func (s *splicer) blockEnd(n *yaml.Node, at int) (int, error) {
	header := string(s.text[at:s.nextLine(at)])
	header, _, _ = strings.Cut(header, "#")
	keep := strings.Contains(header, "+")
	line := s.lineOf(at)
	if content := strings.TrimRight(n.Value, "\n"); n.Style&yaml.LiteralStyle != 0 || content == "" {
		count := strings.Count(n.Value, "\n") // lines are as they are written
		if !keep {
			count = strings.Count(content, "\n") + 1
			if content == "" {
				count = 0
			}
		}
		line += count
	} else {
		if strings.ContainsAny(header, "123456789") {
			return 0, errShape
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
		// keep adds the empty lines behind the scalar, but not the rest after the last newline of the text.
		for keep && line+2 < len(s.lines) && len(bytes.TrimSpace(s.text[s.lines[line+1]:s.lines[line+2]])) == 0 {
			line++
		}
	}
	if line >= len(s.lines) {
		return 0, errShape
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

// leading returns the white space that a line begins with.
func (s *splicer) leading(lineStart int) string {
	return string(s.text[lineStart:s.skip(lineStart, " \t")])
}

// column counts the characters before at on its line.
func (s *splicer) column(at int) int {
	return utf8.RuneCount(bytes.TrimPrefix(s.text[s.lineStart(at):at], []byte("\ufeff")))
}

// lineOf returns the index of the line that holds at.
func (s *splicer) lineOf(at int) int {
	i, found := slices.BinarySearch(s.lines, at)
	if !found {
		i--
	}
	return i
}

func (s *splicer) lineStart(at int) int { return s.lines[s.lineOf(at)] }

// nextLine returns where the line begins that follows the one of at.
func (s *splicer) nextLine(at int) int {
	if next := s.lineOf(at) + 1; next < len(s.lines) {
		return s.lines[next]
	}
	return len(s.text)
}

// lineStarts returns where each line begins, by the line breaks of YAML 1.1, as package yaml counts them.
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
