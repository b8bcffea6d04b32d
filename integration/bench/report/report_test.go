package report_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/integration/bench/report"
)

var update = flag.Bool("update", false, "write testdata")

func measured(t *testing.T, m report.Metric, runs ...report.Run) report.Metric {
	t.Helper()
	m, err := m.Measured(runs)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func run(value float64) report.Run              { return report.Run{Value: value} }
func beside(value, baseline float64) report.Run { return report.Run{Value: value, Baseline: &baseline} }

func inParts(r report.Run, first, second float64) report.Run {
	r.Parts = []report.Part{{Name: "beginning", Value: first}, {Name: "the rest", Value: second}}
	return r
}

// example has a metric of every kind.
func example(t *testing.T) report.Report {
	t.Helper()
	return report.Report{
		Schema: report.Schema, Commit: "0123456789abcdef0123456789abcdef01234567", Dirty: true,
		Go: "go1.99", CPUs: 2, Started: time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC),
		Metrics: []report.Metric{
			measured(t, report.Metric{Name: "size", Unit: "bytes", Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 11e6}},
				run(10_400_123)),
			measured(t, report.Metric{Name: "latency", Unit: "us", Goal: &report.Goal{Of: report.Ratio, Op: "<=", Value: 1.15}},
				beside(30, 20), beside(24, 20), beside(62, 31)),
			measured(t, report.Metric{Name: "rate", Unit: "calls/s", Goal: &report.Goal{Of: report.Ratio, Op: ">=", Value: 0.8}},
				beside(900, 1000), beside(850, 1000)),
			measured(t, report.Metric{Name: "start", Unit: "ms", NoGoal: "watched only"},
				inParts(beside(20.04, 5.11), 12, 8.04), inParts(beside(18, 5), 11, 7)),
			report.Metric{Name: "memory", Unit: "bytes", Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 3 << 20}}.
				NotRun("there is no /proc here\nand more that a table has no room for"),
		},
	}
}

// The names of fields in JSON are for other programs.
func TestJSON(t *testing.T) {
	want := example(t)
	var b bytes.Buffer
	if err := want.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	const file = "testdata/report.json"
	if *update {
		if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(golden), b.String()); diff != "" {
		t.Errorf("%s (-want +got; -update accepts):\n%s", file, diff)
	}
	var got report.Report
	d := json.NewDecoder(&b)
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("after a round trip (-want +got):\n%s", diff)
	}
}

// A missed goal and a metric that was not run must be visible.
func TestTable(t *testing.T) {
	var b bytes.Buffer
	if err := example(t).WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ratio <= 1.15  MISSED", "<= 3,145,728   not run: there is no /proc here\n", "1.2…2"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, b.String())
		}
	}
}

func TestMeasured(t *testing.T) {
	tests := map[string]struct {
		goal report.Goal
		runs []report.Run
		met  bool
	}{
		"odd":               {report.Goal{Of: report.Value, Op: "<=", Value: 2}, []report.Run{run(3), run(1), run(2)}, true},
		"even":              {report.Goal{Of: report.Value, Op: ">=", Value: 2}, []report.Run{run(1), run(2)}, false},
		"equal is below":    {report.Goal{Of: report.Value, Op: "<=", Value: 1}, []report.Run{run(1)}, true},
		"equal is above":    {report.Goal{Of: report.Value, Op: ">=", Value: 1}, []report.Run{run(1)}, true},
		"too much":          {report.Goal{Of: report.Value, Op: "<=", Value: 1}, []report.Run{run(1.01)}, false},
		"a bound on values": {report.Goal{Of: report.Value, Op: "<=", Value: 1}, []report.Run{beside(2, 4)}, false},
		"a bound on ratios": {report.Goal{Of: report.Ratio, Op: "<=", Value: 1}, []report.Run{beside(2, 4)}, true},
		// The ratio of the medians would be 1.
		"ratios of runs": {report.Goal{Of: report.Ratio, Op: "<=", Value: 1.5}, []report.Run{beside(20, 10), beside(10, 20), beside(400, 200)}, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got := measured(t, report.Metric{Name: "m", Unit: "u", Goal: &test.goal}, test.runs...)
			if got.Met == nil || *got.Met != test.met || got.Missed() == test.met {
				t.Errorf("met is %v and missed %v, of %+v", *got.Met, got.Missed(), got)
			}
		})
	}
}

func TestMeasuredRefuses(t *testing.T) {
	ratio := report.Metric{Name: "m", Unit: "u", Goal: &report.Goal{Of: report.Ratio, Op: "<=", Value: 1}}
	for name, runs := range map[string][]report.Run{
		"no runs":           nil,
		"half a baseline":   {beside(1, 2), run(1)},
		"ratio to nothing":  {run(1)},
		"division by zero":  {beside(1, 0)},
		"zero against zero": {beside(0, 0)},
	} {
		if m, err := ratio.Measured(runs); err == nil || m.Value != nil {
			t.Errorf("%s: accepted as %+v", name, m)
		}
	}
}

// A report that contradicts itself is not written.
func TestCheck(t *testing.T) {
	for name, spoil := range map[string]func(*report.Report){
		"no metric":                  func(r *report.Report) { r.Metrics = nil },
		"no name":                    func(r *report.Report) { r.Metrics[0].Name = "" },
		"a name twice":               func(r *report.Report) { r.Metrics[0].Name = r.Metrics[1].Name },
		"no unit":                    func(r *report.Report) { r.Metrics[0].Unit = "" },
		"no goal and no reason":      func(r *report.Report) { r.Metrics[3].NoGoal = "" },
		"a goal, and why none":       func(r *report.Report) { r.Metrics[0].NoGoal = "because" },
		"an unknown figure":          func(r *report.Report) { r.Metrics[0].Goal.Of = "median" },
		"an unknown operator":        func(r *report.Report) { r.Metrics[0].Goal.Op = "<" },
		"no value and no reason":     func(r *report.Report) { r.Metrics[4].Reason = "" },
		"a value, and why none":      func(r *report.Report) { r.Metrics[0].Reason = "because" },
		"a value without runs":       func(r *report.Report) { r.Metrics[0].Runs = nil },
		"a goal met without a value": func(r *report.Report) { r.Metrics[4].Met = new(true) },
		"a goal without a result":    func(r *report.Report) { r.Metrics[0].Met = nil },
	} {
		r := example(t)
		spoil(&r)
		var written bytes.Buffer
		if err := r.WriteJSON(&written); err == nil || written.Len() > 0 {
			t.Errorf("%s: %d bytes were written, and the error is %v", name, written.Len(), err)
		}
	}
}
