package pattern

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"strings"
	"testing"
)

const rolePrefix = "arn:aws:iam::123456789012:role/"

// countVisits returns the visits of matching expression with text.
func countVisits(expression, text string) (int, error) {
	re, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return 0, err
	}
	prog, err := syntax.Compile(re.Simplify())
	if err != nil {
		return 0, err
	}
	return visits(prog, text), nil
}

// longest returns a role with the longest path and name that IAM has.
func longest(path string) string {
	path = strings.Repeat(path, 512/len(path)+1)
	return rolePrefix + strings.TrimRight(path[:510], "/") + "/" + strings.Repeat("a", 64)
}

// names joins n role names of some length.
func names(n int) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("%c-service-%03d", 'a'+i%26, i))
	}
	return strings.Join(list, "|")
}

// Expressions of real namespaces match the longest ARN with a tenth of the limit at most.
func TestOrdinaryExpressionsAreCheap(t *testing.T) {
	for _, expression := range []string{
		".*",
		"arn:aws:iam::123456789012:role/team-.*",
		".*/(a|b|c)",
		".*role/.*cart.*",
		"arn:aws:iam::.*:role/(" + names(250) + ")",
		`arn:aws:iam::\d+:role/(` + names(250) + ")",
		".*/(" + names(40) + ")",
		rolePrefix + strings.Join(strings.Split(names(75), "|"), "|"+rolePrefix),
		"arn:aws:iam::(123456789012|210987654321):role/[a-z]{1,64}(/[a-z]{1,64}){0,8}",
		"(?i).*(cart|shop|admin|reader|writer).*",
		"(?:[^:]*:){5}role/(.+/)?(cart|shop)-[a-z0-9]+",
	} {
		for _, path := range []string{"a", "a/", "cart/", "a-service-000/"} {
			n, err := countVisits(expression, longest(path))
			if err != nil {
				t.Fatal(err)
			}
			if n > maxVisits/10 {
				t.Errorf("%.60s: %d visits for a role of path %q, more than a tenth of %d", expression, n, path, maxVisits)
			}
		}
	}
	for _, expression := range []string{"(?i).*(" + names(100) + ").*", ".*/(" + names(250) + ")"} {
		for _, path := range []string{"a", "a/"} {
			if n, err := countVisits(expression, longest(path)); err != nil || n > maxVisits {
				t.Errorf("%.60s: %d visits, %v, for a role of path %q: the limit refuses it", expression, n, err, path)
			}
		}
	}
}

// visits counts as the engines do: each instruction once at each position that reaches it.
func TestVisits(t *testing.T) {
	for _, tt := range []struct {
		expression, text string
		want             int
	}{
		{"abc", "abc", 4},                  // three characters and the match
		{"abc", "abd", 3},                  // ends when no instruction is left
		{"abc", "ab", 3},                   // likewise
		{"", "a", 2},                       // nothing, and the match
		{"a|b", "a", 2},                    // a class
		{"ab|cd", "ab", 5},                 // alternative, a and c; b; match
		{"a*", "aaa", 4 * 3},               // alternative, a and match, at each of four positions
		{"(a)", "a", 4},                    // both ends of the group count
		{"^a$", "a", 4},                    // so do assertions
		{`\bb`, "a", 2},                    // whether they match is not checked
		{"(?:a?){3}", "aa", 7 + 5 + 3},     // one part less at each position
		{"(?:a*)*b", "a", 2 * 3},           // loops in loops end
		{`[a-z]\pL(?s:.).`, "abc:", 4 + 1}, // each way to accept a character
		{`[a-z]`, "A", 1},
		{".", "\n", 1},
	} {
		if n, err := countVisits(tt.expression, tt.text); err != nil || n != tt.want {
			t.Errorf("%q with %q: %d visits, %v, want %d", tt.expression, tt.text, n, err, tt.want)
		}
	}
	// It stops beyond the limit.
	if n, err := countVisits("(.*){1000}", strings.Repeat("a", 1000)); err != nil || n != maxVisits+1 {
		t.Errorf("%d visits, %v: the count goes beyond %d", n, err, maxVisits)
	}
}

// BenchmarkVisits is the time per visit of the most expensive valid expressions, for each engine of package regexp.
func BenchmarkVisits(b *testing.B) {
	role := longest("a")
	for _, bench := range []struct{ name, expression string }{
		{"onepass", "[a-z0-9:/]*B"},
		{"backtracker", "(?:.*){190}Z"}, // at most 500 instructions
		{"backtracker,groups", strings.Repeat("((((.*))))", 38) + "Z"},
		{"nfa", "(?:.*){192}Z"},
		{"nfa,classes", strings.Repeat(`[^B]*`, 192) + "Z"},
		{"nfa,names", "(?i).*(" + names(170) + ").*"},
		{"nfa,optional", "(?:.?){400}Z"},
	} {
		b.Run(bench.name, func(b *testing.B) {
			visits, err := countVisits(bench.expression, role)
			if err != nil || visits > maxVisits {
				b.Fatal(visits, err)
			}
			re := regexp.MustCompile("^(?:" + bench.expression + ")$")
			for b.Loop() {
				re.MatchString(role)
			}
			b.ReportMetric(float64(visits), "visits/op")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(visits), "ns/visit")
		})
	}
}

// BenchmarkCompile is the time to compile the valid texts that take longest.
func BenchmarkCompile(b *testing.B) {
	fill := func(part string) string { return strings.Repeat(part, 4000/len(part)) }
	for _, bench := range []struct{ name, expression string }{
		{"groups", fill("(a)")},
		{"optional", fill("a?b?|")},
		{"stars", fill("(a?)*")},
		{"repeats", fill("(?:.?){4}")},
		{"folded", "(?i)[" + fill("!-~") + "]"},
		{"alternatives", "(?i)" + names(250)},
	} {
		b.Run(bench.name, func(b *testing.B) {
			for b.Loop() {
				if _, _, err := Compile(bench.expression); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
