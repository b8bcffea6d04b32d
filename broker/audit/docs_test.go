package audit_test

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/credence-iam/credence/broker/audit"
)

// docs/audit.md has a row for each field of a line, in their order, and names its maximum size.
func TestFieldsAreDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.FromSlash("../../docs/audit.md"))
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| (.*) \\|$").FindAllStringSubmatch(string(page), -1) {
		documented = append(documented, row[1])
		if len(row[2]) < 20 || !strings.HasSuffix(row[2], ".") {
			t.Errorf("%s: %q is no sentence", row[1], row[2])
		}
	}
	var fields []string
	entry := reflect.TypeFor[audit.Entry]()
	for field := range entry.Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		fields = append(fields, name)
	}
	if len(fields) < 10 {
		t.Fatalf("an entry has only %d fields", len(fields))
	}
	if !reflect.DeepEqual(documented, fields) {
		t.Errorf("docs/audit.md has the fields\n%v, want\n%v", documented, fields)
	}
	for _, d := range []audit.Decision{audit.Allow, audit.Deny, audit.Renew, audit.Drop} {
		if !strings.Contains(string(page), "`"+string(d)+"`") {
			t.Errorf("docs/audit.md does not name the decision %s", d)
		}
	}
	limit := regexp.MustCompile(`at most ([0-9,]+) bytes`).FindStringSubmatch(string(page))
	if limit == nil || strings.ReplaceAll(limit[1], ",", "") != strconv.Itoa(audit.MaxLine) {
		t.Errorf("docs/audit.md has the limit %q, want %d", limit, audit.MaxLine)
	}
}
