//go:build unix

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// asExpected is a report in which all went as expected, and of which clients some were not there, with the reason.
func asExpected(absent map[string]string) *Report {
	r := &Report{Life: 90, STSCalls: 3, MostSTSCalls: 7, Pods: []Pod{{Pod: "refused-imds-v2", Role: refusedRole, BrokerCalls: 3, MostCalls: 5, STSCalls: 2}}}
	for _, c := range clients {
		for _, path := range c.paths {
			row := Row{Client: c.name, Path: path, Version: "1.2.3", BrokerCalls: 3, MostCalls: 5}
			if reason := absent[c.name]; reason != "" {
				row = Row{Client: c.name, Path: path, NotRun: reason}
			}
			for _, s := range scenarios {
				if c.tries(path, s) && row.run() {
					cell := Cell{Scenario: s.name, Expected: c.expected(path, s)}
					cell.Outcome = cell.Expected[0]
					if cell.Outcome == Reason || cell.Outcome == Hidden {
						cell.Error, cell.Code = "no: http://127.0.0.1:41234/v1/credentials", "DENIED"
					}
					if cell.Outcome == Hangs {
						cell.Error = "waiting: nothing came"
					}
					row.Cells = append(row.Cells, cell)
				}
			}
			r.Rows = append(r.Rows, row)
		}
	}
	return r
}

func TestPageSaysWhatWasFound(t *testing.T) {
	t.Parallel()
	r := asExpected(map[string]string{"ruby": "no ruby here"})
	if unmet := r.unmet(); len(unmet) > 0 {
		t.Fatalf("not as expected: %q", unmet)
	}
	text := string(page(r))
	for _, want := range []string{
		"| go-v2 | AWS SDK for Go v2 | 1.2.3 |",
		"| not run: no ruby here |",
		"ruby (not run: no ruby here)",
		"- role refused, container, imds-v2: `no: http://127.0.0.1:PORT/v1/credentials`, code `DENIED`",
		"Sessions lasted 1m30s",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not have %q", want)
		}
	}
	if strings.Contains(text, "nothing came") {
		t.Error("the page quotes as an error of a client what this program says of one that hangs")
	}
	if strings.Contains(text, "not as expected") {
		t.Error("the page says that something is not as expected")
	}
	checkTable(t, text)
}

// The page must be the same after another run, whichever of what is expected came out.
func TestPageDoesNotChangeByItself(t *testing.T) {
	t.Parallel()
	before, after := asExpected(nil), asExpected(nil)
	after.STSCalls, after.MostSTSCalls, after.Pods = 7, 9, nil
	for i := range after.Rows {
		row := &after.Rows[i]
		row.BrokerCalls, row.MostCalls = 5, 6
		for j := range row.Cells {
			c := &row.Cells[j]
			c.Calls, c.Took, c.Slowest, c.BrokerCalls = 9, 12.5, 3.25, 2
			c.Outcome = c.Expected[len(c.Expected)-1]
			c.Error = strings.ReplaceAll(c.Error, "41234", "51234")
		}
	}
	if diff := cmp.Diff(string(page(before)), string(page(after))); diff != "" {
		t.Errorf("two runs give different pages:\n%s", diff)
	}
}

func TestWhatIsNotAsExpectedIsSaid(t *testing.T) {
	t.Parallel()
	r := asExpected(nil)
	r.Rows[0].Cells[0].Outcome, r.Rows[0].Cells[0].Error = Fails, "broken"
	r.Rows[1].Cells = r.Rows[1].Cells[1:]
	r.Rows[2].BrokerCalls, r.Rows[2].MostCalls = 9, 5
	want := []string{
		fmt.Sprintf(`%s, %s: first: fails, expected works: broken`, r.Rows[0].Client, r.Rows[0].Path),
		fmt.Sprintf(`%s, %s: first was not tried`, r.Rows[1].Client, r.Rows[1].Path),
		fmt.Sprintf(`%s, %s: the sidecar asked the broker 9 times, more than 5`, r.Rows[2].Client, r.Rows[2].Path),
	}
	if diff := cmp.Diff(want, r.unmet()); diff != "" {
		t.Errorf("unmet (-want +got):\n%s", diff)
	}
	if text := string(page(r)); !strings.Contains(text, "| go-v2 | container | **no** (not as expected) |") {
		t.Error("the page does not say so")
	}
}

func TestFixedPartOfErrors(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"Get \"http://127.0.0.1:41234/v1\": refused":              "Get \"http://127.0.0.1:PORT/v1\": refused",
		"HTTPConnectionPool(host='127.0.0.1', port=8080): x":      "HTTPConnectionPool(host='127.0.0.1', port=PORT): x",
		"request id: 0f8fad5b-d9cb-469f-a165-70867728950e, a\n b": "request id: ID, a b",
		"at 2026-11-28T02:03:04Z, and `this`":                     "at TIME, and 'this'",
		"status code: 403, attempt 3 of 3":                        "status code: 403, attempt 3 of 3",
		strings.Repeat("x", longest) + "y":                        strings.Repeat("x", longest) + "…",
	} {
		if got := fixed(text); got != want {
			t.Errorf("fixed(%q) is %q, want %q", text, got, want)
		}
	}
}

// What the code expects and says is what the page has, but for versions, and for errors as clients gave them: a change of
// either is committed with the other. A client that was not installed where the page was written is not run in any cell,
// and another in none.
func TestCommittedPage(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile(filepath.Join("..", "..", pagePath))
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	checkTable(t, text)
	if n := strings.Count(text, " | not run: "); n > 3 {
		t.Errorf("%s is of a machine where %d clients were not run", pagePath, n)
	}
	for _, fault := range pageFaults(text) {
		t.Errorf("%s: %s: run make sdks", pagePath, fault)
	}
}

// pageFaults says where a page differs from that of a run in which all is as expected, and the same clients are there.
func pageFaults(text string) (faults []string) {
	absent, versions := make(map[string]string), make(map[string]string)
	for _, c := range clients {
		_, rest, found := strings.Cut(text, "\n| "+c.name+" | "+c.about+" | ")
		version, _, _ := strings.Cut(rest, " |\n")
		if reason, missing := strings.CutPrefix(version, "not run: "); missing {
			absent[c.name] = reason
		} else if _, ok := parseVersion(version); !ok {
			faults = append(faults, fmt.Sprintf("it does not say which version of %s, %s, was run (%t, %q)", c.name, c.about, found, version))
		}
		versions[c.name] = version
	}
	r := asExpected(absent)
	for i := range r.Rows {
		if row := &r.Rows[i]; row.run() {
			row.Version = versions[row.Client]
		}
	}
	if diff := cmp.Diff(withoutErrors(string(page(r))), withoutErrors(text)); diff != "" {
		faults = append(faults, "it is not as expected (-want +got):\n"+diff)
	}
	return faults
}

// withoutErrors is a page without the errors that clients gave.
func withoutErrors(text string) string {
	before, _, _ := strings.Cut(text, "\n### ")
	_, after, _ := strings.Cut(text, "\n## What is compressed\n")
	return before + "\n" + after
}

func TestFaultsOfPagesAreFound(t *testing.T) {
	t.Parallel()
	all, some := string(page(asExpected(nil))), string(page(asExpected(map[string]string{"ruby": "no ruby here"})))
	if faults := append(pageFaults(all), pageFaults(some)...); faults != nil {
		t.Errorf("pages as expected have faults: %q", faults)
	}
	for name, replace := range map[string][2]string{
		"another result":       {"| ruby | container | cannot |", "| ruby | container | yes |"},
		"one cell of a client": {"| go-v2 | container | yes | yes |", "| go-v2 | container | yes | not run |"},
		"no such version":      {"| AWS SDK for Go v2 | 1.2.3 |", "| AWS SDK for Go v2 | unknown |"},
		"a client that could not be run": {
			"| AWS SDK for Go v2 | 1.2.3 |", "| AWS SDK for Go v2 | could not be run: it does not build |",
		},
		"another word": {"\n- next call: ", "\n- next time: "},
	} {
		if !strings.Contains(all, replace[0]) {
			t.Fatalf("%s: there is no %q", name, replace[0])
		}
		if pageFaults(strings.Replace(all, replace[0], replace[1], 1)) == nil {
			t.Errorf("%s is not found", name)
		}
	}
	if pageFaults(strings.Replace(some, "| ruby | container | not run |", "| ruby | container | cannot |", 1)) == nil {
		t.Error("a result of a client that was not run is not found")
	}
}

// The page boasts of how seldom brokers are asked only where it was so.
func TestPageOfAStorm(t *testing.T) {
	t.Parallel()
	const boast = "made its sidecar ask the broker more often"
	if !strings.Contains(string(page(asExpected(nil))), boast) {
		t.Errorf("the page does not have %q", boast)
	}
	for name, spoil := range map[string]func(*Report){
		"of a sidecar":       func(r *Report) { r.Rows[3].BrokerCalls = r.Rows[3].MostCalls + 1 },
		"of a refused role":  func(r *Report) { r.Pods[0].BrokerCalls = r.Pods[0].MostCalls + 1 },
		"at STS":             func(r *Report) { r.STSCalls = r.MostSTSCalls + 1 },
		"at STS, of refused": func(r *Report) { r.Pods[0].STSCalls = r.Pods[0].BrokerCalls + 1 },
		"that nobody counts": func(r *Report) { r.Pods[0].STSCalls = 0 },
	} {
		r := asExpected(nil)
		spoil(r)
		if len(r.unmet()) != 1 || strings.Contains(string(page(r)), boast) {
			t.Errorf("a storm %s: not as expected is %q, and the page has the boast: %t", name, r.unmet(), strings.Contains(string(page(r)), boast))
		}
	}
}

func TestPageOfAClientThatCouldNotBeRun(t *testing.T) {
	t.Parallel()
	r := asExpected(nil)
	r.Rows[0].Failed, r.Rows[0].Cells = "no `go` at http://127.0.0.1:41234", nil
	text := string(page(r))
	for _, want := range []string{
		"| AWS SDK for Go v2 | could not be run: no 'go' at http://127.0.0.1:PORT |",
		"| go-v2 | container | not run | not run |",
		"go-v2 (could not be run: no",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not have %q", want)
		}
	}
	checkTable(t, text)
}

func TestFinishWritesAndSays(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		options
		spoilt bool
		page   bool
		text   string
	}{
		"all":           {options{life: defaultLife}, false, true, "All is as expected: "},
		"spoilt":        {options{life: defaultLife}, true, true, "NOT AS EXPECTED: go-v2, container: first: fails"},
		"some":          {options{life: defaultLife, only: []string{"curl"}}, false, false, "is as it was: with -only"},
		"for long":      {options{life: time.Hour}, false, false, "is as it was: with another -life than 1m30s"},
		"some, spoilt":  {options{life: defaultLife, only: []string{"curl"}}, true, false, "NOT AS EXPECTED: "},
		"all, it tells": {options{life: defaultLife}, false, true, "The page is written to "},
	} {
		root, r := t.TempDir(), asExpected(nil)
		if err := os.Mkdir(filepath.Join(root, "docs"), 0o700); err != nil {
			t.Fatal(err)
		}
		if test.spoilt {
			r.Rows[0].Cells[0].Outcome = Fails
		}
		var progress strings.Builder
		if err := finish(r, test.options, root, &progress); (err != nil) != test.spoilt {
			t.Errorf("%s: it comes to %v", name, err)
		}
		if !strings.Contains(progress.String(), test.text) {
			t.Errorf("%s: it says\n%s, want %q", name, &progress, test.text)
		}
		_, err := os.Stat(filepath.Join(root, pagePath))
		if (err == nil) != test.page {
			t.Errorf("%s: the page: %v", name, err)
		}
		if _, err := os.Stat(filepath.Join(root, ".build", "sdks", "sdks.json")); err != nil {
			t.Errorf("%s: the figures: %v", name, err)
		}
	}
}

// checkTable checks that a page has a row for each client on each path, with a column for each scenario.
func checkTable(t *testing.T, text string) {
	t.Helper()
	header := "| client | path |"
	for _, s := range scenarios {
		header += " " + s.title + " |"
	}
	if !strings.Contains(text, "\n"+header+"\n") {
		t.Errorf("the page has no table with the columns %s", header)
	}
	for _, c := range clients {
		for _, path := range c.paths {
			_, rest, found := strings.Cut(text, fmt.Sprintf("\n| %s | %s |", c.name, path))
			row, _, _ := strings.Cut(rest, "\n")
			if !found || strings.Count(row, "|") != len(scenarios) {
				t.Errorf("the page has no row for %s on %s with %d columns", c.name, path, len(scenarios))
			}
		}
	}
}
