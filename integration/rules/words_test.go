package rules_test

import (
	"fmt"
	"go/scanner"
	"go/token"
	"path"
	"regexp"
	"strings"
)

// minDoc is the minimum length of a package comment in characters. No comment of less than two lines says what the
// package is for and what it guarantees.
const minDoc = 120

// checkDoc requires one package comment in the form that go doc shows. A folder with tests only has it in one of them.
func checkDoc(p *pkg) (all []violation) {
	testsOnly := true
	for _, f := range p.files {
		testsOnly = testsOnly && f.test
	}
	var found []string
	for _, f := range p.files {
		if f.syntax.Doc == nil || f.generated || f.test && !testsOnly {
			continue
		}
		text := f.syntax.Doc.Text()
		want := "Package " + f.syntax.Name.Name + " "
		if f.syntax.Name.Name == "main" {
			want = "Command "
		}
		found = append(found, f.path)
		switch {
		case !strings.HasPrefix(text, want):
			all = append(all, violation{f.path, fmt.Sprintf("its package comment must begin with %q", want)})
		case len(text) < minDoc || !strings.Contains(text, "."):
			all = append(all, violation{f.path, "its package comment must say in sentences what the package is for, what it guarantees and what it does not do"})
		}
	}
	switch len(found) {
	case 0:
		all = append(all, violation{p.dir, "has no package comment"})
	case 1:
	default:
		all = append(all, violation{p.dir, "has package comments in " + strings.Join(found, " and ") + "; keep one"})
	}
	return all
}

// maxMain bounds the lines of code of a program's main.go. A main declares its flags, builds the parts and runs them.
// The broker has about thirty flags of one line each, and as many lines to build and run its parts. More is logic and
// belongs into a package with tests.
const maxMain = 120

func checkMain(p *pkg) (all []violation) {
	if path.Dir(p.dir) != "cmd" {
		return nil
	}
	for _, f := range p.files {
		if path.Base(f.path) != "main.go" {
			continue
		}
		if n := linesOfCode(f.source); n > maxMain {
			all = append(all, violation{f.path, fmt.Sprintf("has %d lines of code, more than %d: move logic into a package", n, maxMain)})
		}
	}
	return all
}

// linesOfCode counts the lines that are not blank and not only a comment.
func linesOfCode(source []byte) int {
	files := token.NewFileSet()
	f := files.AddFile("", -1, len(source))
	var s scanner.Scanner
	s.Init(f, source, nil, 0)
	lines := map[int]bool{}
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return len(lines)
		}
		if tok == token.SEMICOLON && lit == "\n" {
			continue // The scanner inserted it.
		}
		first := f.Line(pos)
		for i := range 1 + strings.Count(lit, "\n") {
			lines[first+i] = true
		}
	}
}

// generatedNames are the endings of the files that our generators write.
var generatedNames = []string{".pb.go", "_gen.go", "_string.go"}

// checkGenerated requires the marker of generated files. Without it, a developer edits the file, and the next
// generation discards the edit.
func checkGenerated(p *pkg) (all []violation) {
	for _, f := range p.files {
		for _, ending := range generatedNames {
			if strings.HasSuffix(f.path, ending) && !f.generated {
				all = append(all, violation{f.path, `has the name of a generated file, but no line "// Code generated … DO NOT EDIT."`})
			}
		}
	}
	return all
}

// unclear matches words that the glossary of CONTRIBUTING.md replaces, and that never mean anything else in this code. A
// reader whose first language is not English would have to look them up.
var unclear = regexp.MustCompile(`(?i)\b(anew|becomes of|mend|whoever)\b`)

// checkWords refuses unclear words in Go files: in comments, messages and names of tests.
func checkWords(p *pkg) (all []violation) {
	for _, f := range p.files {
		if p.dir == "integration/rules" || f.generated {
			continue // This package quotes them.
		}
		if word := unclear.Find(f.source); word != nil {
			all = append(all, violation{f.path, fmt.Sprintf("says %q; use a word of the glossary in CONTRIBUTING.md", word)})
		}
	}
	return all
}
