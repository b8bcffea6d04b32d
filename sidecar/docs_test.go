package sidecar_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/credential"
)

// docs/errors.md has each code that the sidecar itself sends, and docs/sidecar.md has each path that it serves.
func TestDocs(t *testing.T) {
	errorsPage, page := read(t, "errors.md"), read(t, "sidecar.md")
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	isCode, isPath := regexp.MustCompile(`^[A-Z]+(_[A-Z]+)+$`), regexp.MustCompile(`^/(v1|latest)/`)
	codes, paths := 0, 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			literal, ok := n.(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				return true
			}
			text, err := strconv.Unquote(literal.Value)
			switch {
			case err != nil:
				t.Error(err)
			case isCode.MatchString(text):
				codes++
				if !strings.Contains(errorsPage, "`"+text+"`") {
					t.Errorf("%s: %s is not in docs/errors.md", file, text)
				}
			case isPath.MatchString(text):
				paths++
				if !regexp.MustCompile("`(GET|PUT) " + regexp.QuoteMeta(text) + "[`/]").MatchString(page) {
					t.Errorf("%s: %s is not in docs/sidecar.md", file, text)
				}
			}
			return true
		})
	}
	if codes < 10 || paths < 8 {
		t.Errorf("found %d codes and %d paths, want at least 10 and 8: the test reads the wrong files", codes, paths)
	}
	if !strings.Contains(errorsPage, string(credential.ReasonInternal)) {
		t.Errorf("docs/errors.md does not contain %s: the test reads the wrong page", credential.ReasonInternal)
	}
}

func read(t *testing.T, page string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "docs", page))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
