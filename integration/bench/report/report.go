// Package report is the form in which benchmark results are kept and shown: what was measured, beside
// what, against which goal, and on which commit.
//
// It promises that a report says what it does not know: a metric that was not run has no value and a
// reason, one without a goal says why, and every run is listed beside its median. It measures
// nothing.
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

// Schema is the version of the form. Fields may be added to a version; none changes its meaning.
const Schema = 1

// Report is what one invocation of the benchmark found.
type Report struct {
	Schema int `json:"schema"`
	// Commit is the checkout's commit, or "unknown".
	Commit string `json:"commit"`
	// Dirty says that what was measured may differ from Commit.
	Dirty bool `json:"dirty"`
	// Go is the version of the toolchain.
	Go string `json:"go"`
	// CPUs is how many the benchmark could use, its load generators included.
	CPUs    int       `json:"cpus"`
	Started time.Time `json:"started"`
	Metrics []Metric  `json:"metrics"`
}

// Metric is one thing that was to be measured. Before [Metric.Measured] or [Metric.NotRun] it is the
// description alone: Name, Unit, and Goal or NoGoal.
type Metric struct {
	Name string `json:"name"`
	// Value is the median of the runs; nil when the metric was not run.
	Value *float64 `json:"value"`
	Unit  string   `json:"unit"`
	// Baseline is the median of what was measured beside it, in the same unit; nil when there is none.
	Baseline *float64 `json:"baseline"`
	// Ratio is the median of the runs' own ratios to their baselines. It may differ from that of the two
	// medians: a machine that slows down for one run slows down both sides of it.
	Ratio *float64 `json:"ratio"`
	Goal  *Goal    `json:"goal"`
	// Met is nil without a goal or a value.
	Met  *bool `json:"met"`
	Runs []Run `json:"runs"`
	// Parts are what the value is made of, each the median of the runs, in the same unit, in their order; empty when
	// nobody measured them. Medians do not add up exactly.
	Parts []Part `json:"parts,omitempty"`
	// Reason says why there is no value; empty when there is one.
	Reason string `json:"reason,omitempty"`
	// NoGoal says why there is no goal; empty when there is one.
	NoGoal string `json:"no_goal,omitempty"`
}

// Run is one measurement, and that of the baseline beside it; nil when there is none.
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

// Goal is a bound on a metric.
type Goal struct {
	// Of names what is bounded.
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

// figure returns the goal's figure of one run; false when the run has none.
func (g Goal) figure(r Run) (float64, bool) {
	if g.Of == Value {
		return r.Value, true
	}
	if r.Baseline == nil {
		return 0, false
	}
	return r.Value / *r.Baseline, true
}

// met reports whether x is within the goal; an unknown operator is never met.
func (g Goal) met(x float64) bool {
	return g.Op == "<=" && x <= g.Value || g.Op == ">=" && x >= g.Value
}

// Measured returns m with the medians of runs, judged. The error names what makes the runs useless.
func (m Metric) Measured(runs []Run) (Metric, error) {
	var values, baselines, ratios []float64
	for i, r := range runs {
		values = append(values, r.Value)
		if r.Baseline != nil {
			baselines, ratios = append(baselines, *r.Baseline), append(ratios, r.Value / *r.Baseline)
		}
		for _, x := range slices.Concat(values[i:], baselines, ratios) {
			if math.IsNaN(x) || math.IsInf(x, 0) {
				return m, fmt.Errorf("judging %s: run %d has a value or a ratio that is no number", m.Name, i+1)
			}
		}
	}
	if len(runs) == 0 || len(baselines) != 0 && len(baselines) != len(runs) {
		return m, fmt.Errorf("judging %s: of %d runs, %d have a baseline; all or none must have one", m.Name, len(runs), len(baselines))
	}
	if m.Goal != nil && m.Goal.Of == Ratio && len(ratios) == 0 {
		return m, fmt.Errorf("judging %s: the goal is a ratio, and the runs have no baseline", m.Name)
	}
	parts, err := medianParts(runs)
	if err != nil {
		return m, fmt.Errorf("judging %s: %w", m.Name, err)
	}
	m.Value, m.Parts, m.Runs = new(Median(values)), parts, runs
	if len(baselines) > 0 {
		m.Baseline, m.Ratio = new(Median(baselines)), new(Median(ratios))
	}
	if g := m.Goal; g != nil {
		judged := *m.Value
		if g.Of == Ratio {
			judged = *m.Ratio
		}
		m.Met = new(g.met(judged))
	}
	return m, nil
}

// medianParts is an error unless all runs have the same parts.
func medianParts(runs []Run) ([]Part, error) {
	var parts []Part
	for n, r := range runs {
		if len(r.Parts) != len(runs[0].Parts) {
			return nil, fmt.Errorf("run %d has %d parts and the first %d", n+1, len(r.Parts), len(runs[0].Parts))
		}
	}
	for i, first := range runs[0].Parts {
		var xs []float64
		for n, r := range runs {
			if r.Parts[i].Name != first.Name || math.IsNaN(r.Parts[i].Value) {
				return nil, fmt.Errorf("run %d has other parts than the first, or one that is no number", n+1)
			}
			xs = append(xs, r.Parts[i].Value)
		}
		parts = append(parts, Part{first.Name, Median(xs)})
	}
	return parts, nil
}

// NotRun returns m without a value, for that reason.
func (m Metric) NotRun(reason string) Metric {
	m.Reason, m.Runs = reason, []Run{}
	return m
}

// Missed reports whether the goal was judged and missed.
func (m Metric) Missed() bool { return m.Met != nil && !*m.Met }

// Median returns the middle of xs, or the mean of the middle two; NaN of none.
func Median(xs []float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(xs))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// Check says what a reader of the report could not rely on.
func (r Report) Check() error {
	var errs []error
	if r.Schema != Schema {
		errs = append(errs, fmt.Errorf("the schema is %d, this program knows %d", r.Schema, Schema))
	}
	if len(r.Metrics) == 0 {
		errs = append(errs, errors.New("there is no metric"))
	}
	seen := make(map[string]bool)
	for _, m := range r.Metrics {
		for _, rule := range []struct {
			broken bool
			text   string
		}{
			{m.Name == "", "no name"},
			{seen[m.Name], "a name that was used before"},
			{m.Unit == "", "no unit"},
			{m.Goal == nil && m.NoGoal == "", "neither a goal nor a reason for none"},
			{m.Goal != nil && m.NoGoal != "", "a goal and a reason for none"},
			{m.Goal != nil && m.Goal.Of != Value && m.Goal.Of != Ratio, "a goal of an unknown figure"},
			{m.Goal != nil && m.Goal.Op != "<=" && m.Goal.Op != ">=", "a goal with an unknown operator"},
			{m.Value == nil && m.Reason == "", "neither a value nor a reason for none"},
			{m.Value != nil && m.Reason != "", "a value and a reason for none"},
			{m.Value != nil && len(m.Runs) == 0, "a value and no runs"},
			{(m.Met != nil) != (m.Goal != nil && m.Value != nil), "a judgement without a goal and a value, or these without one"},
		} {
			if rule.broken {
				errs = append(errs, fmt.Errorf("metric %q has %s", m.Name, rule.text))
			}
		}
		seen[m.Name] = true
	}
	return errors.Join(errs...)
}

// WriteJSON writes the report, if it passes Check.
func (r Report) WriteJSON(w io.Writer) error {
	if err := r.Check(); err != nil {
		return fmt.Errorf("checking the report: %w", err)
	}
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false) // it is read by people too, and goals have "<"
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteTable writes the same for people. The range is that of the runs, of the figure that the goal
// bounds.
func (r Report) WriteTable(w io.Writer) error {
	dirty := ""
	if r.Dirty {
		dirty = ", with changes"
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "commit %s%s; %s; %d CPUs; %s\n\n", r.Commit, dirty, r.Go, r.CPUs, r.Started.UTC().Format(time.RFC3339))
	_, _ = fmt.Fprintln(t, "METRIC\tVALUE\tUNIT\tBASELINE\tRATIO\tRANGE\tGOAL\tRESULT")
	for _, m := range r.Metrics {
		if m.Value == nil {
			_, _ = fmt.Fprintf(t, "%s\t-\t%s\t-\t-\t-\t%s\tnot run: %s\n", m.Name, m.Unit, m.goal(), firstLine(m.Reason))
			continue
		}
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.Name, number(m.Value), m.Unit,
			number(m.Baseline), number(m.Ratio), m.spread(), m.goal(), m.result())
		for _, part := range m.Parts {
			_, _ = fmt.Fprintf(t, "  %s\t%s\t%s\t\t\t\t\t\n", part.Name, number(&part.Value), m.Unit)
		}
	}
	return t.Flush()
}

func (m Metric) goal() string {
	switch {
	case m.Goal == nil:
		return "none"
	case m.Goal.Of == Ratio:
		return "ratio " + m.Goal.Op + " " + number(&m.Goal.Value)
	default:
		return m.Goal.Op + " " + number(&m.Goal.Value)
	}
}

func (m Metric) result() string {
	switch {
	case m.Met == nil:
		return "no goal: " + m.NoGoal
	case *m.Met:
		return "met"
	default:
		return "MISSED"
	}
}

// spread is the smallest and the largest run.
func (m Metric) spread() string {
	goal := Goal{Of: Value}
	if m.Goal != nil {
		goal = *m.Goal
	}
	var xs []float64
	for _, r := range m.Runs {
		if x, ok := goal.figure(r); ok {
			xs = append(xs, x)
		}
	}
	if len(xs) < 2 {
		return "-"
	}
	low, high := slices.Min(xs), slices.Max(xs)
	return number(&low) + "…" + number(&high)
}

// number shows three significant digits of what is small, and groups the digits of what is large.
func number(x *float64) string {
	if x == nil {
		return "-"
	}
	if math.Abs(*x) < 100 {
		return strconv.FormatFloat(*x, 'g', 3, 64)
	}
	digits := strconv.FormatFloat(math.Abs(*x), 'f', 0, 64)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	if *x < 0 {
		digits = "-" + digits
	}
	return digits
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
