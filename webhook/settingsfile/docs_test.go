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

// fields are the names of what v has, those of structs in it behind its own name and a dot.
func fields(v reflect.Value, prefix string) (names []string, values []reflect.Value) {
	for i := range v.NumField() {
		name := prefix + v.Type().Field(i).Tag.Get("json")
		if field := v.Field(i); field.Kind() == reflect.Struct {
			below, ofThem := fields(field, name+".")
			names, values = append(names, below...), append(values, ofThem...)
		} else {
			names, values = append(names, name), append(values, field)
		}
	}
	return names, values
}

// TestPage: docs/settings.md lists every field and no other, with its default, and its example sets each of them to something else.
func TestPage(t *testing.T) {
	text, err := os.ReadFile("../../docs/settings.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "## Fields of the file\n")
	if !ok {
		t.Fatal("the page has no section on the fields")
	}
	_, example, _ := strings.Cut(section, "```yaml\n")
	example, _, _ = strings.Cut(example, "```")
	base := inject.DefaultSettings()
	settings, err := settingsfile.Parse([]byte(example), base, newKeys(t))
	if err != nil {
		t.Fatalf("the example: %v", err)
	}
	want, values := fields(reflect.ValueOf(settings), "")
	_, defaults := fields(reflect.ValueOf(base), "")
	for i, name := range want {
		if reflect.DeepEqual(values[i].Interface(), defaults[i].Interface()) {
			t.Errorf("the example does not set %s", name)
		}
	}
	var got []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([A-Za-z.]+)` \\|[^|]*\\|([^|]*)\\|").FindAllStringSubmatch(section, -1) {
		got = append(got, row[1])
		if i := len(got) - 1; i < len(defaults) {
			text, ok := strings.CutPrefix(strings.TrimSpace(row[2]), "`")
			if v := defaults[i]; ok != !v.IsZero() || ok && strings.TrimSuffix(text, "`") != encoded(t, v) {
				t.Errorf("the default of %s is %s, not %s", row[1], encoded(t, v), row[2])
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fields (- the type, + the page):\n%s", diff)
	}
}
