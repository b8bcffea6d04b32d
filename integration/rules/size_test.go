package rules_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"testing"
)

// maxLines bounds the lines of Go in one product package, without its tests and generated files. A package that is
// larger has more than one subject.
const maxLines = 1500

// large are packages that may have more lines than maxLines, up to the ceiling. The decision record says why.
var large = map[string]exception{
	"broker/policy":    {ceiling: 2100, record: "docs/decisions/0023-smaller-packages.md"},
	"operator/explain": {ceiling: 1900, record: "docs/decisions/0042-steps-of-explain.md"},
}

type exception struct {
	ceiling int
	record  string
}

func checkSize(p *pkg) []violation {
	if !isProduct(p) {
		return nil
	}
	lines, limit := linesOf(p), maxLines
	if entry, ok := large[p.dir]; ok {
		limit = entry.ceiling
	}
	if lines > limit {
		return []violation{{p.dir, fmt.Sprintf("has %d lines of Go, more than %d: split it into packages of one subject each", lines, limit)}}
	}
	return nil
}

func linesOf(p *pkg) (lines int) {
	for _, f := range p.files {
		if !f.test && !f.generated {
			lines += bytes.Count(f.source, []byte("\n"))
		}
	}
	return lines
}

// checkLarge finds entries of exceptions that no package needs any more, and entries without their decision record.
func checkLarge(tree fs.FS, packages []*pkg, exceptions map[string]exception) (all []violation) {
	needed := map[string]bool{}
	for _, p := range packages {
		needed[p.dir] = linesOf(p) > maxLines
	}
	for dir, entry := range exceptions {
		if !needed[dir] {
			all = append(all, violation{dir, fmt.Sprintf("has at most %d lines of Go: remove its exception", maxLines)})
		}
		if record, err := fs.ReadFile(tree, entry.record); err != nil || !bytes.Contains(record, []byte(dir)) {
			all = append(all, violation{dir, "is large, but the decision record " + entry.record + " does not say why"})
		}
	}
	return all
}

func TestLargeExceptions(t *testing.T) {
	tree := os.DirFS("../..")
	packages, _, err := load(tree)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range checkLarge(tree, packages, large) {
		t.Error(v)
	}
}

// The maximum lines of Go in integration, without its nested modules. The record docs/decisions/0028-size-of-integration.md
// and 0038 say where they go. Lower these numbers when integration shrinks.
const (
	maxIntegration      = 15_700
	maxIntegrationTests = 23_300
)

// TestSizeOfIntegration keeps the test house from growing beside the product.
func TestSizeOfIntegration(t *testing.T) {
	packages, _, err := load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	code, tests := 0, 0
	for _, p := range packages {
		if !within(p.dir, integration) {
			continue
		}
		code += linesOf(p)
		for _, f := range p.files {
			if f.test {
				tests += bytes.Count(f.source, []byte("\n"))
			}
		}
	}
	if code == 0 || tests == 0 || code > maxIntegration || tests > maxIntegrationTests {
		t.Errorf("integration has %d lines and %d of tests, want at most %d and %d", code, tests, maxIntegration, maxIntegrationTests)
	}
}
