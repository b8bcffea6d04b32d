package policy

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// docs/annotations.md lists each key in its section, and no other key.
func TestAnnotationsPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/annotations.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\|")
	for heading, want := range map[string][]Key{
		"## On a namespace":         namespaceKeys,
		"## On a pod":               podKeys[:],
		"## Written by the webhook": {Injected, ServiceAccount, Warnings},
	} {
		_, section, ok := strings.Cut(string(page), heading+"\n")
		if !ok {
			t.Fatalf("the page has no section %q", heading)
		}
		section, _, _ = strings.Cut(section, "\n## ")
		var got []Key
		for _, match := range row.FindAllStringSubmatch(section, -1) {
			got = append(got, Key(match[1]))
		}
		if !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
			t.Errorf("section %q has rows for %q, want %q", heading, got, want)
		}
	}
}
