package settingsfile_test

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/webhook/inject"
	"github.com/credence-iam/credence/webhook/settingsfile"
)

// fields returns names and values of the fields of v. The name of a nested field starts with that of its struct and a dot.
func fields(v reflect.Value, prefix string) (names []string, values []reflect.Value) {
	for i := range v.NumField() {
		name := prefix + v.Type().Field(i).Tag.Get("json")
		if field := v.Field(i); field.Kind() == reflect.Struct {
			nestedNames, nestedValues := fields(field, name+".")
			names, values = append(names, nestedNames...), append(values, nestedValues...)
		} else {
			names, values = append(names, name), append(values, field)
		}
	}
	return names, values
}

// TestPage: docs/settings.md lists all fields and no others, with their defaults. Its example sets each to another value.
func TestPage(t *testing.T) {
	text, err := os.ReadFile("../../docs/settings.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "## Fields of the file\n")
	if !ok {
		t.Fatal("page has no section on the fields")
	}
	_, example, _ := strings.Cut(section, "```yaml\n")
	example, _, _ = strings.Cut(example, "```")
	base := inject.DefaultSettings()
	settings, err := settingsfile.Parse([]byte(example), base, newKeys(t))
	if err != nil {
		t.Fatalf("parsing the example: %v", err)
	}
	want, values := fields(reflect.ValueOf(settings), "")
	_, defaults := fields(reflect.ValueOf(base), "")
	for i, name := range want {
		if reflect.DeepEqual(values[i].Interface(), defaults[i].Interface()) {
			t.Errorf("example does not set %s", name)
		}
	}
	var got []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([A-Za-z.]+)` \\|[^|]*\\|([^|]*)\\|").FindAllStringSubmatch(section, -1) {
		got = append(got, row[1])
		if i := len(got) - 1; i < len(defaults) {
			text, ok := strings.CutPrefix(strings.TrimSpace(row[2]), "`")
			if v := defaults[i]; ok != !v.IsZero() || ok && strings.TrimSuffix(text, "`") != encoded(t, v) {
				t.Errorf("default of %s is %s, but the page has %s", row[1], encoded(t, v), row[2])
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fields (-type +page):\n%s", diff)
	}
}
