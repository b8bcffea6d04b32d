// Package report is the form of benchmark results: what was measured, beside which baseline, against which goal, and
// on which commit.
//
// It guarantees that a report shows what is unknown. A metric that was not run has a reason and no value. A metric
// without a goal has the reason. Every run is listed beside the median. It measures nothing.
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Schema is the version of the form. A version may get new fields; no field changes its meaning.
const Schema = 1

// Report is the result of one run of the benchmark.
type Report struct {
	Schema int `json:"schema"`
	// Commit is the checkout's commit, or "unknown".
	Commit string `json:"commit"`
	// Dirty says that the measured code may differ from Commit.
	Dirty bool `json:"dirty"`
	// Go is the version of the toolchain.
	Go string `json:"go"`
	// CPUs is the number of CPUs that the benchmark could use, its load generators included.
	CPUs    int       `json:"cpus"`
	Started time.Time `json:"started"`
	Metrics []Metric  `json:"metrics"`
}

// Metric is one measured quantity. Before [Metric.Measured] or [Metric.NotRun] it has Name, Unit, and Goal or NoGoal.
type Metric struct {
	Name string `json:"name"`
	// Value is the median of the runs; nil if the metric was not run.
	Value *float64 `json:"value"`
	Unit  string   `json:"unit"`
	// Baseline is the median of the baseline's runs, in the same unit; nil without a baseline.
	Baseline *float64 `json:"baseline"`
	// Ratio is the median of the runs' ratios to their baselines. It may differ from the ratio of the two medians: a
	// machine that slows down for one run slows down both sides of it.
	Ratio *float64 `json:"ratio"`
	Goal  *Goal    `json:"goal"`
	// Met is nil without a goal or a value.
	Met  *bool `json:"met"`
	Runs []Run `json:"runs"`
	// Parts are the parts of the value in order, each the median of the runs; empty if they are not measured. Medians
	// do not add up exactly.
	Parts []Part `json:"parts,omitempty"`
	// Reason says why there is no value; empty if there is one.
	Reason string `json:"reason,omitempty"`
	// NoGoal says why there is no goal; empty if there is one.
	NoGoal string `json:"no_goal,omitempty"`
}

// Run is one measurement, and that of the baseline beside it; nil without a baseline.
type Run struct {
	Value    float64  `json:"value"`
	Baseline *float64 `json:"baseline,omitempty"`
	Parts    []Part   `json:"parts,omitempty"`
}

// Part is a part of a value, in the value's unit.
type Part struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
}

// Goal bounds a metric.
type Goal struct {
	// Of names the bounded figure.
	Of Figure `json:"of"`
	// Op is "<=" or ">=".
	Op    string  `json:"op"`
	Value float64 `json:"value"`
}

// Figure is the part of a metric that a goal bounds.
type Figure string

// The figures.
const (
	Value Figure = "value"
	Ratio Figure = "ratio"
)

// met reports whether x is within the goal. An unknown operator is never met.
func (g Goal) met(x float64) bool {
	return g.Op == "<=" && x <= g.Value || g.Op == ">=" && x >= g.Value
}

// figures returns one figure of all runs; those without a baseline have no ratio.
func figures(runs []Run, of Figure) (xs []float64) {
	for _, r := range runs {
		if of == Value {
			xs = append(xs, r.Value)
		} else if r.Baseline != nil {
			xs = append(xs, r.Value / *r.Baseline)
		}
	}
	return xs
}

// Measured returns m with the medians of runs, compared with the goal. The error says why the runs are unusable.
func (m Metric) Measured(runs []Run) (Metric, error) {
	values, ratios := figures(runs, Value), figures(runs, Ratio)
	if len(runs) == 0 || len(ratios) != 0 && len(ratios) != len(runs) {
		return m, fmt.Errorf("metric %s: %d of %d runs have a baseline; all or none must have one", m.Name, len(ratios), len(runs))
	}
	if m.Goal != nil && m.Goal.Of == Ratio && len(ratios) == 0 {
		return m, fmt.Errorf("metric %s: the goal is a ratio, but the runs have no baseline", m.Name)
	}
	for _, x := range slices.Concat(values, ratios) {
		if math.IsNaN(x) || math.IsInf(x, 0) {
			return m, fmt.Errorf("metric %s: a run's value or ratio is not a number", m.Name)
		}
	}
	m.Value, m.Parts, m.Runs = new(Median(values)), medianParts(runs), runs
	bounded := *m.Value
	if len(ratios) > 0 {
		var baselines []float64
		for _, r := range runs {
			baselines = append(baselines, *r.Baseline)
		}
		m.Baseline, m.Ratio = new(Median(baselines)), new(Median(ratios))
		if m.Goal != nil && m.Goal.Of == Ratio {
			bounded = *m.Ratio
		}
	}
	if m.Goal != nil {
		m.Met = new(m.Goal.met(bounded))
	}
	return m, nil
}

// medianParts returns the medians of the parts, which all runs have or none.
func medianParts(runs []Run) (parts []Part) {
	for i, part := range runs[0].Parts {
		var xs []float64
		for _, r := range runs {
			xs = append(xs, r.Parts[i].Value)
		}
		parts = append(parts, Part{part.Name, Median(xs)})
	}
	return parts
}

// NotRun returns m without a value, for the given reason.
func (m Metric) NotRun(reason string) Metric {
	m.Reason, m.Runs = reason, []Run{}
	return m
}

// Missed reports whether the value is outside the goal.
func (m Metric) Missed() bool { return m.Met != nil && !*m.Met }

// Median returns the middle of xs, or the mean of the middle two; NaN if there are none.
func Median(xs []float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(xs))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// Check returns an error if a metric is incomplete: a reader could not rely on the report.
func (r Report) Check() error {
	if len(r.Metrics) == 0 {
		return errors.New("the report has no metric")
	}
	names := make(map[string]bool)
	for _, m := range r.Metrics {
		switch g := m.Goal; {
		case m.Name == "" || m.Unit == "" || names[m.Name]:
			return fmt.Errorf("metric %q has no name, no unit, or the name of another", m.Name)
		case (g == nil) == (m.NoGoal == ""):
			return fmt.Errorf("metric %q needs either a goal or a reason for none", m.Name)
		case g != nil && (g.Of != Value && g.Of != Ratio || g.Op != "<=" && g.Op != ">="):
			return fmt.Errorf("metric %q has an unknown goal", m.Name)
		case (m.Value == nil) == (m.Reason == "") || m.Value != nil && len(m.Runs) == 0:
			return fmt.Errorf("metric %q needs either a value with runs or a reason for none", m.Name)
		case (m.Met != nil) != (g != nil && m.Value != nil):
			return fmt.Errorf("metric %q has a goal and a value that are not compared", m.Name)
		}
		names[m.Name] = true
	}
	return nil
}

// WriteJSON writes the report if it passes Check.
func (r Report) WriteJSON(w io.Writer) error {
	if err := r.Check(); err != nil {
		return fmt.Errorf("checking the report: %w", err)
	}
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false) // people read it too, and goals have "<"
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteTable writes the report for people. The range is that of the runs, of the figure that the goal bounds.
func (r Report) WriteTable(w io.Writer) error {
	dirty := ""
	if r.Dirty {
		dirty = ", with changes"
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "commit %s%s; %s; %d CPUs; %s\n\n", r.Commit, dirty, r.Go, r.CPUs, r.Started.UTC().Format(time.RFC3339))
	_, _ = fmt.Fprintln(t, "METRIC\tVALUE\tUNIT\tBASELINE\tRATIO\tRANGE\tGOAL\tRESULT")
	for _, m := range r.Metrics {
		goal, of, result := "none", Value, "no goal: "+m.NoGoal
		if m.Goal != nil {
			goal, of, result = m.Goal.Op+" "+number(&m.Goal.Value), m.Goal.Of, "met"
			if of == Ratio {
				goal = "ratio " + goal
			}
		}
		if m.Missed() {
			result = "MISSED"
		}
		if m.Value == nil {
			reason, _, _ := strings.Cut(m.Reason, "\n")
			result = "not run: " + reason
		}
		spread := "-"
		if xs := figures(m.Runs, of); len(xs) > 1 {
			spread = number(new(slices.Min(xs))) + "…" + number(new(slices.Max(xs)))
		}
		_, _ = fmt.Fprintln(t, strings.Join([]string{
			m.Name, number(m.Value), m.Unit, number(m.Baseline), number(m.Ratio), spread, goal, result,
		}, "\t"))
		for _, part := range m.Parts {
			_, _ = fmt.Fprintf(t, "  %s\t%s\t%s\t\t\t\t\t\n", part.Name, number(&part.Value), m.Unit)
		}
	}
	return t.Flush()
}

// number shows three significant digits of a small number, and groups the digits of a large one.
func number(x *float64) string {
	if x == nil {
		return "-"
	}
	if math.Abs(*x) < 100 {
		return strconv.FormatFloat(*x, 'g', 3, 64)
	}
	digits := strconv.FormatFloat(*x, 'f', 0, 64)
	for i := len(digits) - 3; i > 0 && digits[i-1] != '-'; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}
