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

// installPage leads strangers to an installation. Nothing else would tell us when a value that it names is
// renamed.
const installPage = "../../docs/install.md"

var (
	fence = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$")
	// A file of values begins with its name.
	namedFile = regexp.MustCompile(`^# [a-z-]+\.yaml\n`)
	// set matches the arguments of helm, keyLike what looks like the key of a value in running text, alone or
	// with a value behind it.
	set       = regexp.MustCompile(`--set(?:-string|-json|-file)?[ =]'?([^\s=']+)=`)
	codeSpan  = regexp.MustCompile("`([^`\n]+)`")
	keyLike   = regexp.MustCompile(`^([a-z][A-Za-z]*(?:\.[a-z][A-Za-z]*)+)(?:[:=].*)?$`)
	otherFile = regexp.MustCompile(`\.(?:yaml|crt|env|tar)$`)
)

// TestInstallPageNamesValues: docs/install.md names no value that the chart does not have.
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
		t.Fatalf("%s names %q: they are looked for in the wrong way", installPage, named)
	}
	for _, key := range named {
		if !known[key] && !strings.HasPrefix(key, "spec.") {
			t.Errorf("%s names %s, which is no value of the chart", installPage, key)
		}
	}
}

// TestInstallPageRenders: the chart takes every file of values that docs/install.md has, after the first, which
// everybody sets.
func TestInstallPageRenders(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(installPage)
	if err != nil {
		t.Fatal(err)
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
			t.Errorf("the chart does not take:\n%s\n%v", match[2], err)
			continue
		}
		if _, err := chart.Decode(rendered); err != nil {
			t.Errorf("what the chart renders is no Kubernetes with:\n%s\n%v", match[2], err)
		}
	}
	if len(files) < 4 {
		t.Errorf("%s has %d files of values, want at least those for everybody, EKS, keys and OpenShift", installPage, len(files))
	}
}
