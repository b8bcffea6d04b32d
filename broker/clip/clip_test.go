package clip_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/credence-iam/credence/broker/clip"
)

func TestBytes(t *testing.T) {
	for _, test := range []struct {
		s     string
		limit int
		want  string
	}{
		{"", 3, ""},
		{"abcd", 4, "abcd"},
		{"abcde", 4, "a…"},
		{"abcde", 3, "…"},
		{"äöü", 6, "äöü"},
		{"äöüx", 6, "ä…"}, // three bytes are left: one and a half characters
		{"a\xffbcdef", 6, "ab…"},
		{"a\xffb", 6, "ab"},
	} {
		if got := clip.Bytes(test.s, test.limit); got != test.want {
			t.Errorf("Bytes(%q, %d) = %q, want %q", test.s, test.limit, got, test.want)
		}
	}
}

func TestRunes(t *testing.T) {
	for _, test := range []struct {
		s     string
		limit int
		want  string
	}{
		{"", 1, ""},
		{"äöü", 3, "äöü"},
		{"äöüx", 3, "äö…"},
		{"abc", 1, "…"},
	} {
		if got := clip.Runes(test.s, test.limit); got != test.want {
			t.Errorf("Runes(%q, %d) = %q, want %q", test.s, test.limit, got, test.want)
		}
	}
}

func FuzzClip(f *testing.F) {
	f.Add("a\xffö…", 3)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		if limit < len("…") || limit > 1000 {
			t.Skip("the limit is out of bounds")
		}
		if got := clip.Bytes(s, limit); len(got) > limit || !utf8.ValidString(got) {
			t.Errorf("Bytes(%q, %d) = %q", s, limit, got)
		}
		if got := clip.Runes(s, limit); utf8.RuneCountInString(got) > limit || !strings.HasPrefix(s, strings.TrimSuffix(got, "…")) {
			t.Errorf("Runes(%q, %d) = %q", s, limit, got)
		}
	})
}

func TestLine(t *testing.T) {
	for s, want := range map[string]string{
		"":                       "",
		"a\nb":                   "a;b",
		"\x1b[2Jä\u202e\tb\xff":  "?[2Jä??b",
		strings.Repeat("x", 100): strings.Repeat("x", 27) + "…",
	} {
		if got := clip.Line(s, 30); got != want {
			t.Errorf("Line(%q) = %q, want %q", s, got, want)
		}
	}
}
