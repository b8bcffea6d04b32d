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

// TestPage: docs/rules.md lists all fields and no others, sets each in its example, and names all reasons.
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
		t.Fatalf("parsing the example: %v", err)
	}
	row := regexp.MustCompile("(?m)^\\| `([A-Za-z]+)` \\|")
	for heading, v := range map[string]reflect.Value{"## Fields of the file": reflect.ValueOf(file), "## Fields of an entry": reflect.ValueOf(file.Namespaces[0])} {
		_, section, ok := strings.Cut(page, heading+"\n")
		if !ok {
			t.Fatalf("page has no section %q", heading)
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
				t.Errorf("example does not set %s", name)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-type +page):\n%s", heading, diff)
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
		t.Errorf("reasons (-code +page):\n%s", diff)
	}
	for _, identity := range []policy.SourceIdentity{policy.SourceNone, policy.SourceServiceAccount, policy.SourceSessionName} {
		if !strings.Contains(page, "`"+string(identity)+"`") {
			t.Errorf("page does not name source identity %s", identity)
		}
	}
}
