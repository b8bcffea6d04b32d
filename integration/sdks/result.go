//go:build unix

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Outcome is what a client did in a scenario, as its user sees it.
type Outcome string

// The outcomes.
const (
	// Works: every call succeeded with the pod's role. For the region, the right one was found.
	Works Outcome = "works"
	// NextCall: the first call failed, and one of the next succeeded.
	NextCall Outcome = "next call"
	// NewSession: a client that is kept goes on failing, and a new one succeeds.
	NewSession Outcome = "new session"
	// Reason: the call failed, and the error has the sidecar's code or message.
	Reason Outcome = "reason"
	// Hidden: the call failed, and the error has neither.
	Hidden Outcome = "hidden"
	// Expired: the client went on with expired credentials, which STS refused.
	Expired Outcome = "expired"
	// Metadata: refused by the container-credentials endpoint, the client took credentials from instance metadata.
	Metadata Outcome = "metadata"
	// Hangs: a call did not come back within answerTimeout, or one before it.
	Hangs Outcome = "hangs"
	// NotFound: the client's look-up found no region.
	NotFound Outcome = "not found"
	// Unusable: the client cannot use the path at all, and nothing else is tried on it.
	Unusable Outcome = "unusable"
	// Unsupported: the client has nothing of the kind.
	Unsupported Outcome = "unsupported"
	// Fails: anything else.
	Fails Outcome = "fails"
)

// Schema is the version of the form of a report. Fields may be added to a version; none changes its meaning.
const Schema = 1

// Report is what one run found.
type Report struct {
	Schema  int       `json:"schema"`
	Started time.Time `json:"started"`
	// Life is how long sessions lasted, in seconds.
	Life float64 `json:"life_seconds"`
	// STSCalls is how many sessions the broker asked STS for, for all pods of the life scenarios together: they
	// have one role. MostSTSCalls is how many there may have been.
	STSCalls     int   `json:"sts_calls"`
	MostSTSCalls int   `json:"most_sts_calls"`
	Rows         []Row `json:"rows"`
	// Pods are those that were made for one scenario.
	Pods []Pod `json:"pods"`
}

// Pod is a pod that was made for one scenario. Those whose names begin with "refused" are shared by all clients.
type Pod struct {
	Pod  string `json:"pod"`
	Role string `json:"role"`
	// BrokerCalls is how often its sidecar asked the broker, and MostCalls how often it may have.
	BrokerCalls int `json:"broker_calls"`
	MostCalls   int `json:"most_broker_calls"`
	// STSCalls is how often the broker asked STS for a session of the role, for all pods that have it.
	STSCalls int `json:"sts_calls"`
}

// Row is one client on one path.
type Row struct {
	Client string `json:"client"`
	Path   Path   `json:"path"`
	// Version is empty if the client was not run.
	Version string `json:"version,omitempty"`
	// NotRun says why it was not; empty if it was.
	NotRun string `json:"not_run,omitempty"`
	// Failed says why its driver could not be built or started; empty if it could.
	Failed string `json:"failed,omitempty"`
	Cells  []Cell `json:"cells,omitempty"`
	// BrokerCalls is how often the pod's sidecar asked the broker during the life scenarios, and MostCalls how
	// often it may have: see callEvery.
	BrokerCalls int `json:"broker_calls"`
	MostCalls   int `json:"most_broker_calls"`
}

// run says whether the row was run, from beginning to end.
func (r Row) run() bool { return r.NotRun == "" && r.Failed == "" }

// Cell is what one row found in one scenario.
type Cell struct {
	Scenario string    `json:"scenario"`
	Outcome  Outcome   `json:"outcome"`
	Expected []Outcome `json:"expected"`
	// Error and Code are what the client showed.
	Error string `json:"error,omitempty"`
	Code  string `json:"code,omitempty"`
	// Calls is how many there were; Slowest and Took are the longest and all of them, in milliseconds.
	Calls   int     `json:"calls"`
	Slowest float64 `json:"slowest_ms"`
	Took    float64 `json:"took_ms"`
	// BrokerCalls is, in a life scenario, how often the sidecar of the client's own pod asked the broker since the one before
	// it ended.
	BrokerCalls int `json:"broker_calls"`
}

// Met says whether it is as expected.
func (c Cell) Met() bool { return slices.Contains(c.Expected, c.Outcome) }

// cell returns what a row has for a scenario; false if that is nothing.
func (r Row) cell(scenario string) (Cell, bool) {
	i := slices.IndexFunc(r.Cells, func(c Cell) bool { return c.Scenario == scenario })
	if i < 0 {
		return Cell{}, false
	}
	return r.Cells[i], true
}

// unmet says what was not as expected, a line for each.
func (r *Report) unmet() (lines []string) {
	for _, row := range r.Rows {
		if row.Failed != "" {
			lines = append(lines, fmt.Sprintf("%s, %s: could not be run: %s", row.Client, row.Path, row.Failed))
		}
		if !row.run() {
			continue
		}
		for _, s := range scenarios {
			c, ok := row.cell(s.name)
			switch {
			case !ok && clientOf(row.Client).tries(row.Path, s):
				lines = append(lines, fmt.Sprintf("%s, %s: %s was not tried", row.Client, row.Path, s.name))
			case ok && !c.Met():
				lines = append(lines, fmt.Sprintf("%s, %s: %s: %s, expected %s: %s", row.Client, row.Path, s.name, c.Outcome, list(c.Expected), strings.TrimSpace(c.Code+" "+c.Error)))
			}
		}
		if _, unusable := clientOf(row.Client).unusable[row.Path]; row.BrokerCalls < 2 && !unusable {
			lines = append(lines, fmt.Sprintf("%s, %s: the sidecar asked the broker %d times, though it has to renew: they are not counted", row.Client, row.Path, row.BrokerCalls))
		}
	}
	return append(lines, r.storms()...)
}

// list is one outcome or another, for a reader.
func list(outcomes []Outcome) string {
	var texts []string
	for _, o := range outcomes {
		texts = append(texts, string(o))
	}
	return strings.Join(texts, " or ")
}

// storms says who asked too often, a line for each.
func (r *Report) storms() (lines []string) {
	for _, row := range r.Rows {
		if row.run() && row.BrokerCalls > row.MostCalls {
			lines = append(lines, fmt.Sprintf("%s, %s: the sidecar asked the broker %d times, more than %d", row.Client, row.Path, row.BrokerCalls, row.MostCalls))
		}
	}
	if r.STSCalls > r.MostSTSCalls {
		lines = append(lines, fmt.Sprintf("the broker asked STS %d times for the session of all clients, more than %d", r.STSCalls, r.MostSTSCalls))
	}
	asked := make(map[string]int) // the broker, by role
	for _, p := range r.Pods {
		asked[p.Role] += p.BrokerCalls
	}
	for _, p := range r.Pods {
		switch {
		case p.BrokerCalls > p.MostCalls:
			lines = append(lines, fmt.Sprintf("pod %s: the sidecar asked the broker %d times, more than %d", p.Pod, p.BrokerCalls, p.MostCalls))
		case p.BrokerCalls == 0 || p.STSCalls == 0:
			lines = append(lines, fmt.Sprintf("pod %s: the sidecar asked the broker %d times, and that STS %d times: they are not counted", p.Pod, p.BrokerCalls, p.STSCalls))
		case p.STSCalls > asked[p.Role]:
			lines = append(lines, fmt.Sprintf("pod %s: the broker asked STS %d times for %s, and was itself asked only %d times", p.Pod, p.STSCalls, p.Role, asked[p.Role]))
		}
	}
	return lines
}

// write writes the report as JSON.
func (r *Report) write(file string) error {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the report: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	if err := os.WriteFile(file, append(content, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}
