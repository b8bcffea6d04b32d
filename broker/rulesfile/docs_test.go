package rulesfile_test

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/rulesfile"
)

// TestPage: docs/rules.md lists every field and no other, its example sets each of them, and it names the
// reasons that there are.
func TestPage(t *testing.T) {
	text, err := os.ReadFile("../../docs/rules.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)

	_, example, _ := strings.Cut(page, "```yaml\n")
	example, _, _ = strings.Cut(example, "```")
	file, err := rulesfile.Parse([]byte(example))
	if err != nil {
		t.Fatalf("the example: %v", err)
	}
	row := regexp.MustCompile("(?m)^\\| `([A-Za-z]+)` \\|")
	for heading, v := range map[string]reflect.Value{"## Fields of the file": reflect.ValueOf(file), "## Fields of an entry": reflect.ValueOf(file.Namespaces[0])} {
		_, section, ok := strings.Cut(page, heading+"\n")
		if !ok {
			t.Fatalf("the page has no section %q", heading)
		}
		section, _, _ = strings.Cut(section, "\n## ")
		var got, want []string
		for _, match := range row.FindAllStringSubmatch(section, -1) {
			got = append(got, match[1])
		}
		for i := range v.NumField() {
			name := v.Type().Field(i).Tag.Get("json")
			want = append(want, name)
			if v.Field(i).IsZero() {
				t.Errorf("the example does not set %s", name)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (- the type, + the page):\n%s", heading, diff)
		}
	}

	errors, err := os.ReadFile("../credential/errors.go")
	if err != nil {
		t.Fatal(err)
	}
	reasons := func(text string) []string {
		return slices.Compact(slices.Sorted(slices.Values(regexp.MustCompile(`RULES_[A-Z_]+`).FindAllString(text, -1))))
	}
	if diff := cmp.Diff(reasons(string(errors)), reasons(page)); diff != "" || len(reasons(page)) == 0 {
		t.Errorf("reasons (- the code, + the page):\n%s", diff)
	}
	for _, identity := range []policy.SourceIdentity{policy.SourceNone, policy.SourceServiceAccount, policy.SourceSessionName} {
		if !strings.Contains(page, "`"+string(identity)+"`") {
			t.Errorf("the page does not name the source identity %s", identity)
		}
	}
}
