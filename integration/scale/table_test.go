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
	page  = "../../docs/scale.md"
	begin = "<!-- results: CREDENCE_SCALE=full go test ./integration/scale -update -->\n"
	end   = "<!-- end of results -->\n"
)

// row is a line of the page's table.
type row struct {
	scenario, fleet, calls string
	figures
}

// row sums up what happened.
func (f *fleet) row(calls string, parts ...summary) row {
	r := row{calls: calls, fleet: f.String(), figures: figures{least: 1}}
	for _, s := range parts {
		r.asks += s.asks
		r.failed += s.failed
		r.least, r.longest = min(r.least, s.least), max(r.longest, s.longest)
	}
	return r
}

// String says what the fleet is made of.
func (s shape) String() string {
	text := fmt.Sprintf("%s roles, %s pods, %s nodes", number(float64(s.roles)), number(float64(s.pods)), number(float64(s.nodes)))
	if s.scope != "" && s.scope != policy.ScopeRole {
		text = fmt.Sprintf("%d brokers, %s sessions, %s pods, %s nodes", s.brokers, number(float64(s.grants())), number(float64(s.pods)), number(float64(s.nodes)))
	}
	return text
}

// number writes a whole number with commas.
func number(x float64) string {
	text := fmt.Sprintf("%.0f", x)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

func (r row) String() string {
	wait := "none"
	if r.longest > 0 {
		wait = r.longest.Round(10 * time.Millisecond).String()
	}
	return fmt.Sprintf("| %s | %s | %s | %.2f | %s | %d of %s |", r.scenario, r.fleet, r.calls, r.least, wait, r.failed, number(float64(r.asks)))
}

const heading = "| scenario | cluster | calls of STS | least part of its life that a session had left when it was handed out | longest wait | " +
	"calls of sidecars that failed |\n|---|---|---|---|---|---|\n"

// writeTable writes the results into the page, and leaves those of scenarios that did not run.
func writeTable(t *testing.T, rows []row) {
	t.Helper()
	before, results, after := table(t)
	lines := make(map[string]string) // :: scenario → its line
	for line := range strings.SplitSeq(strings.TrimSpace(results), "\n") {
		lines[scenarioOf(line)] = line
	}
	for _, r := range rows {
		lines[r.scenario] = r.String()
	}
	var b strings.Builder
	b.WriteString(heading)
	for _, s := range scenarios {
		fmt.Fprintln(&b, lines[s.name])
	}
	fatal(t, os.WriteFile(page, []byte(before+begin+b.String()+end+after), 0o600))
}

// scenarioOf is the first cell of a line.
func scenarioOf(line string) string {
	if cells := strings.Split(line, "|"); len(cells) > 1 {
		return strings.TrimSpace(cells[1])
	}
	return ""
}

// table cuts the page.
func table(t *testing.T) (before, results, after string) {
	t.Helper()
	text, err := os.ReadFile(page)
	fatal(t, err)
	before, rest, ok := strings.Cut(string(text), begin)
	results, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no place for results, between %q and %q", page, begin, end)
	}
	return before, results, after
}

// TestPage: the page has the results of these scenarios. The figures are not compared, since chance has a part in them.
func TestPage(t *testing.T) {
	var want, got []string
	for _, s := range scenarios {
		want = append(want, s.name)
	}
	_, results, _ := table(t)
	for i, line := range strings.Split(strings.TrimSpace(results), "\n") {
		if i >= 2 {
			got = append(got, scenarioOf(line))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("the page has results of\n%q, and these scenarios are\n%q", got, want)
	}
}
