package pattern

import (
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// A glob matches a whole text: the text begins with the part before the first *, ends with the part behind the last *, and has
// the other parts in between, in order and without overlap.
func TestGlobs(t *testing.T) {
	for _, tt := range []struct {
		glob, text string
		want       bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "a", true},
		{"a", "aa", false},
		{"a", "ba", false},
		{"a", "", false},
		{"*", "", true},
		{"*", "a/b", true},
		{"**", "", true},
		{"**", "a", true},

		{"a*", "a", true},
		{"a*", "ab", true},
		{"a*", "ba", false},
		{"a*", "", false},
		{"admin*", "x-admin", false},

		{"*a", "a", true},
		{"*a", "ba", true},
		{"*a", "ab", false},
		{"*-read", "x-read", true},
		{"*-read", "x-read-admin", false},
		{"*-read", "x-read-read", true},
		{"*-read", "-read", true},
		{"*-read", "read", false},

		{"a*c", "ac", true},
		{"a*c", "abc", true},
		{"a*c", "abcd", false},
		{"a*c", "babc", false},
		{"a*a", "a", false}, // one a does not match twice
		{"a*a", "aa", true},
		{"ab*ba", "aba", false},
		{"ab*ba", "abba", true},

		{"*b*", "abc", true},
		{"*b*", "b", true},
		{"*b*", "ac", false},
		{"*a*b*", "ab", true},
		{"*a*b*", "ba", false}, // the order matters
		{"*a*a*", "a", false},  // the same a does not match twice
		{"*a*a*", "xaya", true},
		{"*ab*b", "ab", false},
		{"*ab*b", "abb", true},
		{"a*b*c", "a-b-c", true},
		{"a*b*c", "a-c", false},
		{"a*b*c", "a-b", false},
		{"a*b*c", "a-b-cd", false},
		{"a*bb*c", "abc", false},
		{"a*b*b*c", "abc", false},
		{"a*b*b*c", "abbc", true},

		{"A*", "a", false},
		{"a?c", "abc", false},
		{"a.c", "abc", false},
		{"[a]*", "a", false},
		{`\*`, "*", false},
		{`\*`, `\x`, true},
	} {
		if got := NewGlob(tt.glob).Match(tt.text); got != tt.want {
			t.Errorf("glob %q matches %q: %v", tt.glob, tt.text, got)
		}
	}
}

// FuzzGlob compares globs with equivalent regular expressions.
func FuzzGlob(f *testing.F) {
	for _, pair := range [][2]string{{"a*", "abc"}, {"*", ""}, {"", ""}, {"a*a", "a"}, {"*a*b*", "xaxbx"}, {"a**b", "ab"}, {"ab*ba", "aba"}, {"a.c", "abc"}} {
		f.Add(pair[0], pair[1])
	}
	f.Fuzz(func(t *testing.T, glob, s string) {
		if !utf8.ValidString(glob) || !utf8.ValidString(s) || len(glob) > 200 {
			t.Skip("regular expressions read invalid UTF-8 differently, and take long globs slowly")
		}
		var parts []string
		for part := range strings.SplitSeq(glob, "*") {
			parts = append(parts, regexp.QuoteMeta(part))
		}
		want := regexp.MustCompile(`(?s)\A` + strings.Join(parts, ".*") + `\z`).MatchString(s)
		if got := NewGlob(glob).Match(s); got != want {
			t.Errorf("glob %q matches %q: %v", glob, s, got)
		}
	})
}
