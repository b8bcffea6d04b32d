package scale

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/policy"
)

const (
	page    = "../../docs/scale.md"
	begin   = "<!-- results: CREDENCE_SCALE=full go test ./integration/scale -update -->\n"
	end     = "<!-- end of results -->\n"
	heading = "| scenario | cluster | calls of STS | least part of its life that a session had left when it was handed out | longest wait | " +
		"calls of sidecars that failed |\n|---|---|---|---|---|---|\n"
)

// row returns the cells of the page's table without the scenario: what STS was called for, and the results of pods' calls.
func (f *fleet) row(calls string, s summary) string {
	size := fmt.Sprintf("%s roles, %s pods, %s nodes", number(f.roles), number(f.pods), number(f.nodes))
	if f.scope != "" && f.scope != policy.ScopeRole {
		size = fmt.Sprintf("%d brokers, %s sessions, %s pods, %s nodes", f.brokers, number(f.grants()), number(f.pods), number(f.nodes))
	}
	wait := "none"
	if s.longest > 0 {
		wait = s.longest.Round(10 * time.Millisecond).String()
	}
	return fmt.Sprintf(" %s | %s | %.2f | %s | %d of %s |", size, calls, s.least, wait, s.failed, number(s.calls))
}

// number writes a whole number with commas.
func number[T int | float64](x T) string {
	text := fmt.Sprintf("%.0f", float64(x))
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// table splits the page, and returns the lines of its table by scenario.
func table(t *testing.T) (before string, scenarios []string, lines map[string]string, after string) {
	t.Helper()
	text, err := os.ReadFile(page)
	fatal(t, err)
	before, rest, ok := strings.Cut(string(text), begin)
	results, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no place for results, between %q and %q", page, begin, end)
	}
	lines = make(map[string]string)
	for i, line := range strings.Split(strings.TrimSpace(results), "\n") {
		if cells := strings.SplitN(line, "|", 3); i >= 2 && len(cells) == 3 {
			name := strings.TrimSpace(cells[1])
			scenarios = append(scenarios, name)
			lines[name] = cells[2]
		}
	}
	return before, scenarios, lines, after
}

// writeTable writes the results into the page, and keeps those of scenarios that did not run.
func writeTable(t *testing.T, rows map[string]string) {
	t.Helper()
	before, _, lines, after := table(t)
	var b strings.Builder
	b.WriteString(heading)
	for _, s := range scenarios {
		if row, ok := rows[s.name]; ok {
			lines[s.name] = row
		}
		fmt.Fprintf(&b, "| %s |%s\n", s.name, lines[s.name])
	}
	fatal(t, os.WriteFile(page, []byte(before+begin+b.String()+end+after), 0o600))
}

// TestPage checks that the page has the results of these scenarios. It does not compare the figures, which are random.
func TestPage(t *testing.T) {
	var want []string
	for _, s := range scenarios {
		want = append(want, s.name)
	}
	if _, got, _, _ := table(t); !slices.Equal(got, want) {
		t.Errorf("the page has results of\n%q, and the scenarios are\n%q", got, want)
	}
}
