package rules_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strings"
	"unicode"
)

// linkForms are the forms of a link in Markdown.
var linkForms = []*regexp.Regexp{
	regexp.MustCompile(`\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)`), // [text](target "title"), and images
	regexp.MustCompile(`^\s{0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?`),       // [label]: target
	regexp.MustCompile(`(?:src|href)="([^"]+)"`),
}

var (
	codeSpan = regexp.MustCompile("`[^`]*`")
	scheme   = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*:`)
	heading  = regexp.MustCompile(`^#{1,6}\s+(.*?)\s*#*$`)
	linkText = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
)

// checkLinks requires that the target of each relative link exists: the file, and in a document the heading. It does not
// follow links to other hosts, because a test must not fail when their server does.
func checkLinks(tree fs.FS, documents []string) (all []violation) {
	if len(documents) == 0 {
		return []violation{{".", "found no Markdown document; the rules look in the wrong place"}}
	}
	for _, document := range documents {
		lines, err := prose(tree, document)
		if err != nil {
			return append(all, violation{document, err.Error()})
		}
		for _, line := range lines {
			line = codeSpan.ReplaceAllString(line, "")
			for _, form := range linkForms {
				for _, match := range form.FindAllStringSubmatch(line, -1) {
					if why := broken(tree, document, match[1]); why != "" {
						all = append(all, violation{document, fmt.Sprintf("link to %s: %s", match[1], why)})
					}
				}
			}
		}
	}
	return all
}

// broken returns why a link of a document has no target, or "".
func broken(tree fs.FS, document, target string) string {
	if scheme.MatchString(target) {
		return ""
	}
	if strings.HasPrefix(target, "/") {
		return "write it relative to the document, so that it works in a checkout too"
	}
	file, fragment, _ := strings.Cut(target, "#")
	name := document
	if file != "" {
		name = path.Join(path.Dir(document), file)
	}
	if !fs.ValidPath(name) {
		return "the target is outside of the repository"
	}
	if _, err := fs.Stat(tree, name); err != nil {
		return "there is no such file"
	}
	if fragment == "" || path.Ext(name) != ".md" {
		return ""
	}
	lines, err := prose(tree, name)
	if err != nil {
		return err.Error()
	}
	seen := map[string]int{}
	for _, line := range lines {
		match := heading.FindStringSubmatch(line)
		if match == nil {
			continue
		}
		anchor := slug(match[1])
		n := seen[anchor]
		seen[anchor]++
		if n > 0 {
			anchor = fmt.Sprintf("%s-%d", anchor, n)
		}
		if anchor == fragment {
			return ""
		}
	}
	return "there is no such heading"
}

// slug returns the anchor that GitHub gives a heading.
func slug(title string) string {
	title = linkText.ReplaceAllString(title, "$1")
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
			return unicode.ToLower(r)
		}
		return -1
	}, title)
}

// prose returns the lines of a document that are not in a fenced code block.
func prose(tree fs.FS, document string) ([]string, error) {
	data, err := fs.ReadFile(tree, document)
	if err != nil {
		return nil, err
	}
	var lines []string
	fence := ""
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		line := s.Text()
		trimmed := strings.TrimSpace(line)
		switch {
		case fence != "":
			if strings.HasPrefix(trimmed, fence) {
				fence = ""
			}
		case strings.HasPrefix(trimmed, "```"), strings.HasPrefix(trimmed, "~~~"):
			fence = trimmed[:3]
		default:
			lines = append(lines, line)
		}
	}
	return lines, nil
}
