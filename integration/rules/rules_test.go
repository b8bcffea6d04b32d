// Package rules_test holds the house rules of this repository: which package
// may import which, where heavy modules may enter, what a package must say of
// itself, and that links between documents lead somewhere. A rule that only
// stands in a document is broken within a month.
//
// Every rule is a function from a file tree to its violations. TestRepository
// runs all of them over this repository; TestBrokenTrees runs them over small
// trees that each break one rule, so a rule that has gone blind is noticed.
//
// Sources are read through package os and parsed here. A subprocess such as
// "go list" would be less to write, but the test cache does not see what it
// reads: such a test goes on passing, cached, after the tree was broken.
//
// Imports are judged file by file, as written. What a binary links in the end
// is checked beside that binary, by the test of its own package.
package rules_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"strings"
	"testing"
)

const module = "github.com/credence-iam/credence"

// TestRepository runs every rule over the repository.
func TestRepository(t *testing.T) {
	for _, v := range check(t, os.DirFS("../..")) {
		t.Error(v)
	}
}

// violation is one broken rule: where, what, and what to do about it.
type violation struct{ where, what string }

func (v violation) String() string { return v.where + ": " + v.what }

// check runs every rule over a tree.
func check(t *testing.T, tree fs.FS) []violation {
	t.Helper()
	packages, documents, err := load(tree)
	if err != nil {
		t.Fatal(err)
	}
	var all []violation
	if len(packages) == 0 {
		all = append(all, violation{".", "no Go package was found: the rules look in the wrong place"})
	}
	for _, p := range packages {
		all = append(all, checkImports(p)...)
		all = append(all, checkNames(p)...)
		all = append(all, checkDoc(p)...)
		all = append(all, checkMain(p)...)
		all = append(all, checkGenerated(p)...)
	}
	return append(all, checkLinks(tree, documents)...)
}

// pkg is what lies in one folder, the tests included.
type pkg struct {
	dir   string // relative to the root of the module, with slashes
	files []file
}

type file struct {
	path      string
	source    []byte
	test      bool // by its name
	generated bool // by the marker that Go defines
	syntax    *ast.File
}

// load reads every Go file of the module, whatever its build constraints, and
// finds every Markdown document. Like the go command it passes over folders
// whose names begin with "." or "_", testdata, and modules within the module.
func load(tree fs.FS) (packages []*pkg, documents []string, err error) {
	byDir := map[string]*pkg{}
	err = fs.WalkDir(tree, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := path.Base(name)
		if entry.IsDir() {
			if name == "." {
				return nil
			}
			if strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") || base == "testdata" {
				return fs.SkipDir
			}
			if _, err := fs.Stat(tree, path.Join(name, "go.mod")); err == nil {
				return fs.SkipDir
			}
			return nil
		}
		switch path.Ext(base) {
		case ".md":
			documents = append(documents, name)
		case ".go":
			source, err := fs.ReadFile(tree, name)
			if err != nil {
				return err
			}
			syntax, err := parser.ParseFile(token.NewFileSet(), name, source, parser.ImportsOnly|parser.ParseComments)
			if err != nil {
				return fmt.Errorf("parsing %s: %w", name, err)
			}
			dir := path.Dir(name)
			p := byDir[dir]
			if p == nil {
				p = &pkg{dir: dir}
				byDir[dir] = p
				packages = append(packages, p)
			}
			p.files = append(p.files, file{
				path:      name,
				source:    source,
				test:      strings.HasSuffix(base, "_test.go"),
				generated: ast.IsGenerated(syntax),
				syntax:    syntax,
			})
		}
		return nil
	})
	return packages, documents, err
}

// within reports whether dir is one of parents or lies below one.
func within(dir string, parents ...string) bool {
	for _, parent := range parents {
		if dir == parent || strings.HasPrefix(dir, parent+"/") {
			return true
		}
	}
	return false
}
