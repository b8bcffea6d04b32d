package rules_test

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// quotedPath matches a path in a code span or code block: words with slashes, with or without "./".
var quotedPath = regexp.MustCompile("(?:^|[\\s`'\"=(])(?:\\./)?([A-Za-z][A-Za-z0-9_-]*/[A-Za-z0-9_./-]*)")

// formerPaths are paths that records of decisions name although they no longer exist, because the decision removed them.
var formerPaths = map[string][]string{
	"docs/decisions/0023-smaller-packages.md": {"certs/pki"},
	"docs/decisions/0027-one-module.md":       {"integration/go.mod"},
}

// checkQuotedPaths requires that a path in the code of a document exists if it begins with a top-level folder: a file, a
// package, or an identifier of a package.
func checkQuotedPaths(tree fs.FS, documents []string) (all []violation) {
	for _, document := range documents {
		lines, err := code(tree, document)
		if err != nil {
			return append(all, violation{document, err.Error()})
		}
		for _, line := range lines {
			for _, match := range quotedPath.FindAllStringSubmatch(line, -1) {
				name := path.Clean(strings.TrimRight(match[1], "./"))
				top, _, _ := strings.Cut(match[1], "/")
				if !exists(tree, top) || exists(tree, name) || slices.Contains(formerPaths[document], name) {
					continue
				}
				if dot := strings.LastIndex(name, "."); dot > 0 && dot+1 < len(name) && unicode.IsUpper(rune(name[dot+1])) && exists(tree, name[:dot]) {
					continue
				}
				all = append(all, violation{document, fmt.Sprintf("names %s, which does not exist", name)})
			}
		}
	}
	return all
}

func exists(tree fs.FS, name string) bool {
	_, err := fs.Stat(tree, name)
	return err == nil
}

// code returns what a document writes as code: its code spans, and the lines of its fenced code blocks.
func code(tree fs.FS, document string) ([]string, error) {
	data, err := fs.ReadFile(tree, document)
	if err != nil {
		return nil, err //nolint:wrapcheck // The error names the file.
	}
	var found []string
	fenced := false
	for line := range strings.Lines(string(data)) {
		switch {
		case strings.HasPrefix(strings.TrimSpace(line), "```"):
			fenced = !fenced
		case fenced:
			found = append(found, line)
		default:
			found = append(found, codeSpan.FindAllString(line, -1)...)
		}
	}
	return found, nil
}

// TestBrokenQuotedPaths runs the rule on documents that name paths.
func TestBrokenQuotedPaths(t *testing.T) {
	for _, c := range []struct{ text, missing string }{
		{"see `broker/policy`, `./broker/policy/` and `broker/policy/policy.go`", ""},
		{"see `broker/policy.Request` and `go test ./broker/...`", ""},
		{"see `broker/policy: refuse an empty namespace`", ""},
		{"see broker/gone, which is no code, and `elsewhere/gone`", ""},
		{"see `broker/gone`", "broker/gone"},
		{"see `go test ./broker/policy/gone`", "broker/policy/gone"},
		{"see `broker/policy/gone.go`", "broker/policy/gone.go"},
		{"see `broker/gone.Request`", "broker/gone.Request"},
		{"```\ngo run ./cmd/gone -help\n```", "cmd/gone"},
		{"```\n```\nsee `broker/gone`", "broker/gone"},
	} {
		files := good.with(tree{"docs/a.md": c.text})
		var want []violation
		if c.missing != "" {
			want = append(want, violation{"docs/a.md", "names " + c.missing + ", which does not exist"})
		}
		if got := checkQuotedPaths(files.fs(), []string{"docs/a.md"}); !slices.Equal(got, want) {
			t.Errorf("%q: got violations %v, want %v", c.text, got, want)
		}
	}
}

// TestFormerPaths fails for exceptions that nothing needs.
func TestFormerPaths(t *testing.T) {
	tree := os.DirFS("../..")
	for document, names := range formerPaths {
		lines, err := code(tree, document)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if exists(tree, name) || !strings.Contains(strings.Join(lines, "\n"), name) {
				t.Errorf("%s of %s exists, or the document does not name it; remove it from formerPaths", name, document)
			}
		}
	}
}
