package rules_test

import (
	"bytes"
	"fmt"
	"io/fs"
)

// maxLines bounds the lines of Go in one product package, without its tests and generated files. A package that is
// larger has more than one subject.
const maxLines = 1500

// large are packages that may have more lines than maxLines, up to the ceiling. The record is the decision record
// that says why; without one, the ceiling is the size that was measured, and the package has to shrink.
var large = map[string]struct {
	ceiling int
	record  string
}{
	"broker/kube":    {ceiling: 2815},
	"broker/policy":  {ceiling: 2363},
	"operator":       {ceiling: 2413},
	"webhook/inject": {ceiling: 2008},
}

func checkSize(tree fs.FS, p *pkg) []violation {
	if !isProduct(p) {
		return nil
	}
	lines := 0
	for _, f := range p.files {
		if !f.test && !f.generated {
			lines += bytes.Count(f.source, []byte("\n"))
		}
	}
	limit := maxLines
	if entry, ok := large[p.dir]; ok {
		limit = entry.ceiling
		if entry.record != "" {
			if _, err := fs.Stat(tree, entry.record); err != nil {
				return []violation{{p.dir, "names the decision record " + entry.record + ", which is not there"}}
			}
		}
	}
	if lines > limit {
		return []violation{{p.dir, fmt.Sprintf("has %d lines of Go, more than %d: split it into packages of one subject each", lines, limit)}}
	}
	return nil
}
