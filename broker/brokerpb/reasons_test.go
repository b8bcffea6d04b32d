package brokerpb_test

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

// reasons reads the Reason constants from their source, so that no test can miss a new one.
func reasons(t *testing.T) map[string]credential.Reason {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), filepath.FromSlash("../credential/errors.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]credential.Reason{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Reason") || len(spec.Values) != 1 {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Reason" {
			t.Errorf("constant %s does not have type Reason", spec.Names[0].Name)
		}
		value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		found[spec.Names[0].Name] = credential.Reason(value)
		return true
	})
	if len(found) < 20 {
		t.Fatalf("found %d reasons, want at least 20: the test reads the wrong file", len(found))
	}
	return found
}

func TestReasonForm(t *testing.T) {
	form := regexp.MustCompile(`^[A-Z][A-Z0-9_]{0,61}[A-Z0-9]$`)
	names := map[credential.Reason]string{}
	for name, reason := range reasons(t) {
		if !form.MatchString(string(reason)) {
			t.Errorf("%s is %q: google.rpc.ErrorInfo accepts at most 63 of A-Z, 0-9 and _", name, reason)
		}
		if other, taken := names[reason]; taken {
			t.Errorf("%s and %s are both %q", name, other, reason)
		}
		names[reason] = name
	}
}

// documentedKinds are the kinds of error in docs/errors.md: the gRPC code, and the HTTP status of the sidecar's response.
var documentedKinds = map[string]struct {
	kind         error
	code, status string
}{
	"unauthenticated": {credential.ErrUnauthenticated, "`UNAUTHENTICATED`", "403"},
	"denied":          {credential.ErrDenied, "`PERMISSION_DENIED`", "403"},
	"invalid":         {credential.ErrInvalid, "`FAILED_PRECONDITION`", "400"},
	"not found":       {credential.ErrNotFound, "`NOT_FOUND`", "403"},
	"unavailable":     {credential.ErrUnavailable, "`UNAVAILABLE`", "503"},
	"internal":        {nil, "`INTERNAL`", "503"},
}

// docs/errors.md has one row for each reason, and no other rows.
func TestReasonsAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.FromSlash("../../docs/errors.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(page), "\n## Reasons\n")
	if !ok {
		t.Fatal("docs/errors.md has no section Reasons")
	}
	section, _, _ = strings.Cut(section, "\n## ")

	documented := map[credential.Reason]bool{}
	for line := range strings.Lines(section) {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if len(cells) != 5 {
			t.Errorf("the row %q has %d cells, want reason, kind, code, status and meaning", line, len(cells))
			continue
		}
		reason := credential.Reason(strings.Trim(cells[0], "`"))
		if documented[reason] {
			t.Errorf("%s has two rows", reason)
		}
		documented[reason] = true
		want, ok := documentedKinds[cells[1]]
		if !ok {
			t.Errorf("%s: %q is not a kind of error", reason, cells[1])
		}
		if cells[2] != want.code || cells[3] != want.status {
			t.Errorf("%s: code %s and status %s do not belong to kind %s", reason, cells[2], cells[3], cells[1])
		}
		if len(cells[4]) < 40 || !strings.HasSuffix(cells[4], ".") {
			t.Errorf("%s: %q is not a sentence that says what the reason means and how to fix it", reason, cells[4])
		}
	}
	known := map[credential.Reason]bool{}
	for name, reason := range reasons(t) {
		known[reason] = true
		if !documented[reason] {
			t.Errorf("docs/errors.md has no row for %s (%s)", reason, name)
		}
	}
	for reason := range documented {
		if !known[reason] {
			t.Errorf("docs/errors.md has a row for %q, which is not a reason", reason)
		}
	}
}

// The table has the gRPC codes that ToStatus sends.
func TestDocumentedKinds(t *testing.T) {
	upper := func(code string) string {
		return "`" + strings.ToUpper(regexp.MustCompile(`([a-z])([A-Z])`).ReplaceAllString(code, "${1}_$2")) + "`"
	}
	var checked int
	for name, documented := range documentedKinds {
		if documented.kind == nil {
			continue
		}
		checked++
		if got := upper(kinds[documented.kind].String()); got != documented.code {
			t.Errorf("%s has the code %s, docs/errors.md says %s", name, got, documented.code)
		}
	}
	if checked != len(kinds) {
		t.Errorf("docs/errors.md has %d kinds, want %d", checked, len(kinds))
	}
}
