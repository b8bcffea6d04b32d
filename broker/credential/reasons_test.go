package credential_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
)

// TestReasonsAreAllOfThem: Reasons returns each reason that errors.go declares, once.
func TestReasonsAreAllOfThem(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "errors.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var declared []credential.Reason
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Reason") || len(spec.Values) != 1 {
			return true
		}
		text, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		declared = append(declared, credential.Reason(text))
		return true
	})
	if len(declared) < 20 {
		t.Fatalf("found %d reasons in errors.go, want at least 20: the test reads the wrong file", len(declared))
	}
	listed := credential.Reasons()
	for _, reason := range declared {
		if !slices.Contains(listed, reason) {
			t.Errorf("Reasons lacks %s: add it in reasons.go", reason)
		}
	}
	if len(listed) != len(declared) {
		t.Errorf("Reasons has %d entries for %d reasons", len(listed), len(declared))
	}
}
