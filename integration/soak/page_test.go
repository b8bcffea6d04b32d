//go:build linux

package soak

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	pagePath    = "../../docs/reliability.md"
	resultsPath = "testdata/results.json"
)

var update = flag.Bool("update", false, "write docs/reliability.md from the recorded results, without a run")

// result is what a run saw of a failure. Waits have seconds.
type result struct {
	Date, Commit, Kubernetes string
	Session                  string              // session duration of the applications that the failure is about
	Seconds                  int                 // how long the failure and the recovery took
	Calls                    int                 // of applications
	Errors                   map[string]int      `json:",omitempty"` // of applications without valid credentials
	Unreachable              int                 `json:",omitempty"` // calls that could not reach the service
	Known, New               []float64           // waits of new pods
	Problems                 []string            `json:",omitempty"` // why the creation of a pod was tried again
	Logged                   map[string][]string `json:",omitempty"` // by part
	Firing, Pending          []string            `json:",omitempty"` // alerts
}

func loadResults() (map[string]result, error) {
	text, err := os.ReadFile(resultsPath)
	if err != nil {
		return nil, err
	}
	results := map[string]result{}
	return results, json.Unmarshal(text, &results)
}

// store replaces the result of one failure, and writes the page.
func store(name string, r result) error {
	results, err := loadResults()
	if errors.Is(err, os.ErrNotExist) {
		results, err = map[string]result{}, nil
	}
	if err != nil {
		return err
	}
	results[name] = r
	var lines []string // one for each failure, so that a difference shows which were run
	for _, name := range slices.Sorted(maps.Keys(results)) {
		line, err := json.Marshal(map[string]result{name: results[name]})
		if err != nil {
			return err
		}
		lines = append(lines, string(line[1:len(line)-1]))
	}
	text := "{\n" + strings.Join(lines, ",\n") + "\n}\n"
	return errors.Join(
		os.WriteFile(resultsPath, []byte(text), 0o600),
		os.WriteFile(pagePath, []byte(page(results)), 0o600),
	)
}

// TestPage shows that docs/reliability.md has the recorded results, and that there is one for each failure.
func TestPage(t *testing.T) {
	results, err := loadResults()
	if err != nil {
		t.Fatal(err)
	}
	want := page(results)
	if *update {
		if err := os.WriteFile(pagePath, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(pagePath)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/reliability.md differs from the results; go test ./integration/soak -update writes it (-want +got):\n%s", diff)
	}
	var names []string
	for _, f := range failures {
		names = append(names, f.name)
		if forbidden := f.forbidden(results[f.name]); len(forbidden) > 0 {
			t.Errorf("%s: a result with errors is recorded: %q", f.name, forbidden)
		}
	}
	slices.Sort(names)
	if diff := cmp.Diff(names, slices.Sorted(maps.Keys(results))); diff != "" {
		t.Errorf("failures (-) and results (+); make soak FAILURE=NAME records one:\n%s", diff)
	}
}

const opening = `# Reliability

What happens to pods when a part fails? A test makes each of these failures happen on a real cluster and writes this page:
` + "`make soak`, or `make soak FAILURE=NAME`" + ` for one of them ([testing](testing.md)). [Architecture](architecture.md#what-happens-when-something-is-away)
says why it is so, and [operations](operations.md#alerts) what to do about each alert.

The cluster has a control plane, two nodes with kubelet and containerd, CoreDNS and cert-manager. Credence is installed by Helm
with the chart's default values: two brokers and two webhooks. Four applications call ` + "`sts:GetCallerIdentity`" + ` all the time:

`

const method = `
Two loops also create pods, one pod at a time each. Each pod makes one call and ends. The pods of one loop have the role of a
running pod. Each pod of the other loop has a role that no pod had before, so its first session must come from STS. A wait is the
time from the first attempt to create a pod until its call has succeeded.

**Sessions of 15 minutes.** To keep a run short, applications have the shortest sessions of AWS. An outage whose effect depends on the
session duration takes the same part of it: 25 minutes of an hour are 6 minutes 15 seconds of 15 minutes. All other settings and
times are the defaults. A section says if sessions of an hour were used instead.

**An error** is a call for which the SDK had no credentials, or had credentials that the service did not accept. No error is
allowed, except where the section says so. A call that cannot reach the service because its own node has no network is none.

**Waits** depend on the machine. Compare them with those without a failure, in the first row. New pods wait without a limit here
(` + "`start-timeout: \"0\"`" + `). With the default, a pod that waits for two minutes starts its application without credentials.

**Alerts** are those of [metrics](metrics.md#alerts), in a Prometheus that runs beside. A pending alert was
true for 30 seconds or more, but not long enough to fire.

`

// page returns docs/reliability.md.
func page(results map[string]result) string {
	var text strings.Builder
	text.WriteString(opening + "| application | what it is |\n|---|---|\n")
	for _, c := range clients {
		fmt.Fprintf(&text, "| `%s` | %s, on %s |\n", c.name, c.about, c.node)
	}
	text.WriteString(method)
	text.WriteString("| failure | errors of running pods | wait of new pods, known role: median, longest | the same, new role | alerts that fire |\n|---|---|---|---|---|\n")
	for _, f := range failures {
		r := results[f.name]
		fmt.Fprintf(&text, "| [%s](#%s) | %d of %d calls | %s | %s | %s |\n",
			f.title, anchor(f.title), count(r.Errors), r.Calls, waits(r.Known), waits(r.New), code(r.Firing, "none"))
	}
	for _, f := range failures {
		text.WriteString("\n" + section(f, results[f.name]))
	}
	return text.String()
}

func section(f failure, r result) string {
	var text strings.Builder
	fmt.Fprintf(&text, "## %s\n\n%s %s\n\n", f.title, f.does, f.means)
	if f.allowed != "" {
		fmt.Fprintf(&text, "`%s` may have errors. %s\n\n", f.allowed, f.why)
	}
	fmt.Fprintf(&text, "- Run: %s, on Kubernetes %s, Credence at %s, sessions of %s; `make soak FAILURE=%s`. It took %d s, recovery included.\n",
		r.Date, r.Kubernetes, r.Commit, strings.TrimSuffix(strings.Replace(r.Session, "h0m", "h", 1), "0s"), f.name, r.Seconds)
	fmt.Fprintf(&text, "- Running pods: %d errors in %d calls.", count(r.Errors), r.Calls)
	for _, problem := range slices.Sorted(maps.Keys(r.Errors)) {
		fmt.Fprintf(&text, " %d × `%s`.", r.Errors[problem], problem)
	}
	if r.Unreachable > 0 {
		fmt.Fprintf(&text, " %d calls had credentials but could not reach the service.", r.Unreachable)
	}
	fmt.Fprintf(&text, "\n- New pods: %d of a known role, %d of a new role, in the end all with credentials.", len(r.Known), len(r.New))
	if len(r.Problems) > 0 {
		text.WriteString(" Some were created again: " + code(r.Problems, "") + ".")
	}
	text.WriteString("\n")
	for _, part := range []string{"sidecar", "broker", "webhook"} {
		if len(r.Logged[part]) > 0 {
			fmt.Fprintf(&text, "- The %s logged: %s.\n", part, code(r.Logged[part], ""))
		}
	}
	fmt.Fprintf(&text, "- Alerts that fired: %s. Pending: %s.\n", code(r.Firing, "none"), code(without(r.Pending, r.Firing), "none"))
	return text.String()
}

func without(list, other []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(name string) bool { return slices.Contains(other, name) })
}

func count(errors map[string]int) (n int) {
	for _, times := range errors {
		n += times
	}
	return n
}

func code(list []string, none string) string {
	if len(list) == 0 {
		return none
	}
	return "`" + strings.Join(list, "`, `") + "`"
}

func waits(list []float64) string {
	if len(list) == 0 {
		return "no pod"
	}
	list = slices.Sorted(slices.Values(list))
	return fmt.Sprintf("%.0f s, %.0f s", list[(len(list)-1)/2], list[len(list)-1])
}

// anchor returns the anchor of a heading on GitHub. integration/rules checks that it exists.
func anchor(title string) string {
	return strings.NewReplacer(" ", "-", "'", "", ",", "", ".", "").Replace(strings.ToLower(title))
}
