//go:build unix

package chart_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/credence-iam/credence/integration/chart"
)

// installPage leads new users to an installation.
const installPage = "../../docs/install.md"

var (
	fence = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$")
	// namedFile matches a file of values, which starts with its name.
	namedFile = regexp.MustCompile(`^# [a-z-]+\.yaml\n`)
	// set matches the arguments of helm. keyLike matches the key of a value in the text, with or without its value.
	set       = regexp.MustCompile(`--set(?:-string|-json|-file)?[ =]'?([^\s=']+)=`)
	codeSpan  = regexp.MustCompile("`([^`\n]+)`")
	keyLike   = regexp.MustCompile(`^([a-z][A-Za-z]*(?:\.[a-z][A-Za-z]*)+)(?:[:=].*)?$`)
	otherFile = regexp.MustCompile(`\.(?:yaml|crt|env|tar)$`)
)

// TestInstallPageNamesValues shows that the chart has all values that docs/install.md names.
func TestInstallPageNamesValues(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(installPage)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for key := range leaves(t, valuesFile) {
		for at := len(key); at > 0; at = strings.LastIndexByte(key[:at], '.') {
			known[key[:at]] = true
		}
	}
	var named []string
	for _, match := range set.FindAllStringSubmatch(string(text), -1) {
		named = append(named, match[1])
	}
	for _, match := range codeSpan.FindAllStringSubmatch(fence.ReplaceAllString(string(text), ""), -1) {
		if key := keyLike.FindStringSubmatch(match[1]); key != nil && (known[key[1]] || !otherFile.MatchString(key[1])) {
			named = append(named, key[1])
		}
	}
	if len(named) < 5 {
		t.Fatalf("found only %[2]q in %[1]s", installPage, named)
	}
	for _, key := range named {
		if !known[key] && !strings.HasPrefix(key, "spec.") {
			t.Errorf("%s names %s, which the chart does not have", installPage, key)
		}
	}
}

// TestInstallPageRenders shows that the chart accepts each file of values in docs/install.md after the first one, which all
// users need, and those in the pages with its details.
func TestInstallPageRenders(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(installPage)
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{"../../docs/aws.md", "../../docs/network.md"} {
		more, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, more...)
	}
	var files []string
	for _, match := range fence.FindAllStringSubmatch(string(text), -1) {
		if match[1] != "yaml" || !namedFile.MatchString(match[2]) {
			continue
		}
		file := filepath.Join(t.TempDir(), "values.yaml")
		if err := os.WriteFile(file, []byte(match[2]), 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
		rendered, err := chart.Render(t.Context(), chart.Config{Helm: helm, ValueFiles: []string{files[0], file}})
		if err != nil {
			t.Errorf("the chart refuses:\n%s\n%v", match[2], err)
			continue
		}
		if _, err := chart.Decode(rendered); err != nil {
			t.Errorf("the objects are invalid with:\n%s\n%v", match[2], err)
		}
	}
	if len(files) < 6 {
		t.Errorf("%s and the pages with its details have %d files of values, want at least 6", installPage, len(files))
	}
}

// TestComparisonNamesValues shows that the chart has all values in its column of docs/chart.md.
func TestComparisonNamesValues(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/chart.md")
	if err != nil {
		t.Fatal(err)
	}
	known, named := leaves(t, valuesFile), 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, "|")
		if len(cells) != 9 {
			continue
		}
		for _, match := range codeSpan.FindAllStringSubmatch(cells[2], -1) {
			named++
			if _, ok := known[match[1]]; !ok {
				t.Errorf("the chart has no value %s", match[1])
			}
		}
	}
	if named < 20 {
		t.Errorf("found only %d values", named)
	}
}
