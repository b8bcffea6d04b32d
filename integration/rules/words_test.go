package rules_test

import (
	"fmt"
	"go/scanner"
	"go/token"
	"path"
	"strings"
)

// minDoc is the least length of a package comment, in characters: below two
// lines of text, none has said what the package is for and what it promises.
const minDoc = 120

// checkDoc asks that each package says what it is for, once, in the form that
// go doc shows. A folder that holds tests alone says it in one of them.
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
			all = append(all, violation{f.path, fmt.Sprintf("its package comment should begin with %q", want)})
		case len(text) < minDoc || !strings.Contains(text, "."):
			all = append(all, violation{f.path, "its package comment should say in sentences what the package is for, what it promises and what it does not do"})
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

// maxMain bounds the lines of code of a program's main.go. A main declares its
// flags, builds the parts and runs them. The broker has some thirty flags of one
// line each, and as much again for parts and for running them; whatever needs
// more is logic, and belongs where a test can reach it.
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

// linesOfCode counts lines that hold more than comment.
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
			continue // inserted by the scanner, not written
		}
		first := f.Line(pos)
		for i := range 1 + strings.Count(lit, "\n") {
			lines[first+i] = true
		}
	}
}

// generatedNames are endings that the generators in use give to their files.
var generatedNames = []string{".pb.go", "_gen.go", "_string.go"}

// checkGenerated asks for the marker by which tools, and readers, know a
// generated file; without it, a change by hand lives until the next generation.
func checkGenerated(p *pkg) (all []violation) {
	for _, f := range p.files {
		for _, ending := range generatedNames {
			if strings.HasSuffix(f.path, ending) && !f.generated {
				all = append(all, violation{f.path, `is named as generated, but has no line "// Code generated … DO NOT EDIT."`})
			}
		}
	}
	return all
}
