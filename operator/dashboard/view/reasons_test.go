package view_test

import (
	"flag"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/operator/dashboard/view"
)

var update = flag.Bool("update", false, "write reasons.txt from docs/errors.md")

// row matches a row of the reasons in docs/errors.md: reason, kind, and text.
var row = regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| ([a-z ]+) \\|[^|]*\\|[^|]*\\| (.*) \\|$")

var (
	pageLink = regexp.MustCompile(`\[([^\]]*)\]\(([a-z-]+\.md)[^)]*\)`)
	ownLink  = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
)

// TestReasons compares what the page says of each reason with docs/errors.md, its only source.
func TestReasons(t *testing.T) {
	docs, err := os.ReadFile("../../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(docs), "\n## Reasons\n")
	var want strings.Builder
	for _, match := range row.FindAllStringSubmatch(table, -1) {
		text := pageLink.ReplaceAllString(match[3], "$1 (docs/$2)")
		want.WriteString(match[1] + "\t" + match[2] + "\t" + ownLink.ReplaceAllString(text, "$1") + "\n")
	}
	if *update {
		if err := os.WriteFile("reasons.txt", []byte(want.String()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile("reasons.txt")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.String(), string(got)); diff != "" {
		t.Errorf("reasons.txt differs from docs/errors.md; run go test ./operator/dashboard/view -run TestReasons -update (-want +got):\n%s", diff)
	}
	if reasons := credential.Reasons(); len(reasons) == 0 || len(view.Meanings) != len(reasons) {
		t.Errorf("%d reasons have a meaning, want %d", len(view.Meanings), len(reasons))
	}
	for _, reason := range credential.Reasons() {
		if len(view.Meanings[reason].Text()) < 40 {
			t.Errorf("reason %s has no meaning", reason)
		}
	}
}
