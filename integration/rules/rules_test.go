// Package rules_test checks the house rules of this repository. They limit which packages a package may import, which
// packages may import heavy modules, and how large a package is. They also check its exports and its comment, and that
// links between documents have a target. A rule without a test is broken within a month.
//
// Each rule is a function that returns the violations in a file tree. TestRepository runs all rules on this
// repository. TestBrokenTrees runs them on small trees that break one rule each, and so detects a rule that finds
// nothing.
//
// The tests read and parse the sources themselves. "go list" would be shorter, but Go's test cache does not see the
// files that a subprocess reads: such a test passes from the cache after the tree was broken.
//
// The import rules check each file as it is written. The packages that a binary links are checked by the binary's
// own test.
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

func TestRepository(t *testing.T) {
	for _, v := range check(t, os.DirFS("../..")) {
		t.Error(v)
	}
}

// violation is one broken rule: the file or folder, the fault and the fix.
type violation struct{ where, what string }

func (v violation) String() string { return v.where + ": " + v.what }

// check runs all rules on a tree.
func check(t *testing.T, tree fs.FS) []violation {
	t.Helper()
	packages, documents, err := load(tree)
	if err != nil {
		t.Fatal(err)
	}
	var all []violation
	if len(packages) == 0 {
		all = append(all, violation{".", "found no Go package; the rules look in the wrong place"})
	}
	for _, p := range packages {
		all = append(all, checkImports(p)...)
		all = append(all, checkNames(p)...)
		all = append(all, checkDoc(p)...)
		all = append(all, checkMain(p)...)
		all = append(all, checkGenerated(p)...)
		all = append(all, checkWords(p)...)
		all = append(all, checkSize(p)...)
	}
	all = append(all, checkExported(packages)...)
	all = append(all, checkQuotedPaths(tree, documents)...)
	return append(all, checkLinks(tree, documents)...)
}

// pkg is one folder with its Go files, tests included.
type pkg struct {
	dir   string // relative to the module root, with slashes
	files []file
}

type file struct {
	path      string
	source    []byte
	test      bool // its name ends in _test.go
	generated bool // it has the marker that Go defines
	syntax    *ast.File
}

// load reads all Go files of the module, whatever their build constraints, and finds all Markdown documents. Like the
// go command, it skips folders whose names begin with "." or "_", testdata, and nested modules.
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
			syntax, err := parser.ParseFile(token.NewFileSet(), name, source, parser.SkipObjectResolution|parser.ParseComments)
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

// within reports whether dir is one of parents or is below one.
func within(dir string, parents ...string) bool {
	for _, parent := range parents {
		if dir == parent || strings.HasPrefix(dir, parent+"/") {
			return true
		}
	}
	return false
}
