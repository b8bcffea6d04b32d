package policy_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/policy"
)

// The constants of type Key, the two lists of keys, the switch that parses values and the tables of these tests have the same
// keys. A key that is missing in a list would be refused as unknown, or never parsed.
func TestKeysAgree(t *testing.T) {
	constants := map[string]policy.Key{} // :: constant → key
	var parsed []policy.Key
	for _, name := range []string{"keys.go", "settings.go"} {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ValueSpec:
				if typ, ok := n.Type.(*ast.Ident); ok && typ.Name == "Key" && len(n.Values) == 1 {
					value, err := strconv.Unquote(n.Values[0].(*ast.BasicLit).Value)
					if err != nil {
						t.Fatal(err)
					}
					constants[n.Names[0].Name] = policy.Key(value)
				}
			case *ast.FuncDecl:
				return name == "keys.go" || n.Name.Name == "set"
			case *ast.CaseClause:
				for _, expression := range n.List {
					constant := expression.(*ast.Ident).Name
					key, ok := constants[constant]
					if !ok {
						t.Errorf("the switch that parses has the case %s, which is not a key", constant)
					}
					parsed = append(parsed, key)
				}
			}
			return true
		})
	}
	if len(constants) == 0 || len(parsed) == 0 {
		t.Fatalf("found %d constants and %d cases: the test looks in the wrong place", len(constants), len(parsed))
	}
	sortedEqual(t, "podKeys and the switch that parses", policy.PodKeys, parsed)

	all := slices.Concat(policy.PodKeys, policy.NamespaceKeys, []policy.Key{policy.Injected, policy.ServiceAccount, policy.Warnings})
	var declared []policy.Key
	for _, key := range constants {
		declared = append(declared, key)
	}
	sortedEqual(t, "the lists of keys and the constants", all, declared)

	var good, bad []policy.Key
	for key, values := range goodValues {
		good = append(good, key)
		if len(values) == 0 {
			t.Errorf("no good value of %s is tested", key)
		}
	}
	for key, values := range badValues {
		bad = append(bad, key)
		if len(values) == 0 && key != policy.Role {
			t.Errorf("no bad value of %s is tested", key)
		}
	}
	sortedEqual(t, "podKeys and the good values tested", policy.PodKeys, good)
	sortedEqual(t, "podKeys and the bad values tested", policy.PodKeys, bad)
}

func sortedEqual(t *testing.T, what string, a, b []policy.Key) {
	t.Helper()
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	if !slices.Equal(a, b) {
		t.Errorf("%s differ:\n%s\n%s", what, join(a), join(b))
	}
}

func join(keys []policy.Key) string { return strings.Trim(fmt.Sprint(keys), "[]") }
