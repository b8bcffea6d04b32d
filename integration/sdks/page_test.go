//go:build unix

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// asExpected is a report in which all went as expected, and one client was not there.
func asExpected() *Report {
	r := &Report{Life: 90}
	for _, c := range clients {
		for _, path := range c.paths {
			row := Row{Client: c.name, Path: path, Version: "1.2.3", BrokerCalls: 3, MostCalls: 5}
			if c.name == "ruby" {
				row = Row{Client: c.name, Path: path, NotRun: "no ruby here"}
			}
			for _, s := range scenarios {
				if s.on(path) && row.NotRun == "" {
					cell := Cell{Scenario: s.name, Expected: c.expected(path, s)}
					cell.Outcome = cell.Expected[0]
					if cell.Outcome == Reason || cell.Outcome == Hidden {
						cell.Error, cell.Code = "no: http://127.0.0.1:41234/v1/credentials", "DENIED"
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
	r := asExpected()
	if unmet := r.unmet(); len(unmet) > 0 {
		t.Fatalf("not as expected: %q", unmet)
	}
	text := string(page(r))
	for _, want := range []string{
		"| go-v2 | AWS SDK for Go v2 | 1.2.3 |",
		"| not run: no ruby here |",
		"ruby (no ruby here)",
		"- role refused, container, imds-v2: `no: http://127.0.0.1:PORT/v1/credentials`, code `DENIED`",
		"Sessions lasted 1m30s",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not have %q", want)
		}
	}
	if strings.Contains(text, "not as expected") {
		t.Error("the page says that something is not as expected")
	}
	checkTable(t, text)
}

// The page must be the same after another run, whichever of what is expected came out.
func TestPageDoesNotChangeByItself(t *testing.T) {
	t.Parallel()
	before, after := asExpected(), asExpected()
	after.STSCalls = 7
	for i := range after.Rows {
		row := &after.Rows[i]
		row.BrokerCalls, row.MostCalls = 3, 5
		for j := range row.Cells {
			c := &row.Cells[j]
			c.Calls, c.Took, c.Slowest = 9, 12.5, 3.25
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
	r := asExpected()
	r.Rows[0].Cells[0].Outcome, r.Rows[0].Cells[0].Error = Fails, "broken"
	r.Rows[1].Cells = r.Rows[1].Cells[1:]
	r.Rows[2].BrokerCalls, r.Rows[2].MostCalls = 9, 5
	want := []string{
		fmt.Sprintf(`%s, %s: first: fails, expected ["works"]:  broken`, r.Rows[0].Client, r.Rows[0].Path),
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

// A client or a scenario that was added to the code must have been run before it is committed.
func TestCommittedPageHasTheWholeMatrix(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile(filepath.Join("..", "..", pagePath))
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	checkTable(t, text)
	for _, c := range clients {
		if !strings.Contains(text, "| "+c.name+" | "+c.about+" | ") {
			t.Errorf("%s does not say what %s is: run make sdks", pagePath, c.name)
		}
	}
	// What the code expects is what is on the page, cell by cell, but for what was not installed.
	wanted := rows(string(page(asExpected())))
	for key, row := range rows(text) {
		want := wanted[key]
		if row != want && !strings.Contains(row, "not run") && !strings.Contains(want, "not run") {
			t.Errorf("%s has for %s\n%s, and expected is\n%s", pagePath, key, row, want)
		}
	}
	if n := strings.Count(text, "| not run: "); n > 3 {
		t.Errorf("%s is of a machine where %d rows were not run", pagePath, n)
	}
	if strings.Contains(text, "not as expected") {
		t.Errorf("%s was written by a run that was not as expected", pagePath)
	}
}

// rows are the lines of the matrix, by client and path.
func rows(text string) map[string]string {
	all := make(map[string]string)
	for _, c := range clients {
		for _, path := range c.paths {
			key := fmt.Sprintf("| %s | %s |", c.name, path)
			if _, rest, found := strings.Cut(text, "\n"+key); found {
				all[key], _, _ = strings.Cut(rest, "\n")
			}
		}
	}
	return all
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
