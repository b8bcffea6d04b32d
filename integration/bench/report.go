//go:build unix

package main

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

// report is the result of one run of the benchmark. A metric that was not run has a reason and no value, and every run
// is listed beside the median. A later version may have new fields, but no field changes its meaning.
type report struct {
	Schema int `json:"schema"`
	// Commit is the checkout's commit, or "unknown".
	Commit string `json:"commit"`
	// Dirty says that the measured code may differ from Commit.
	Dirty bool   `json:"dirty"`
	Go    string `json:"go"`
	// CPUs is the number of CPUs that the benchmark could use, its load generators included.
	CPUs    int       `json:"cpus"`
	Started time.Time `json:"started"`
	Metrics []result  `json:"metrics"`
}

// result is the result of one metric.
type result struct {
	Name string `json:"name"`
	// Value is the median of the runs; nil if the metric was not run.
	Value *float64 `json:"value"`
	Unit  string   `json:"unit"`
	// Baseline is the median of the baseline's runs, in the same unit; nil without a baseline.
	Baseline *float64 `json:"baseline"`
	// Ratio is the median of the runs' ratios to their baselines. It may differ from the ratio of the two medians: a
	// machine that slows down for one run slows down both sides of it.
	Ratio *float64 `json:"ratio"`
	Goal  *goal    `json:"goal"`
	// Met is nil without a goal or a value.
	Met  *bool         `json:"met"`
	Runs []measurement `json:"runs"`
	// Reason says why there is no value; empty if there is one.
	Reason string `json:"reason,omitempty"`
	// NoGoal says why there is no goal; empty if there is one.
	NoGoal string `json:"no_goal,omitempty"`
}

// measurement is one run, and that of the baseline beside it; nil without a baseline.
type measurement struct {
	Value    float64  `json:"value"`
	Baseline *float64 `json:"baseline,omitempty"`
}

func beside(value, baseline float64) measurement {
	return measurement{Value: value, Baseline: &baseline}
}

// goal bounds the value or the ratio of a metric, or says why there is no bound. The zero value is never met.
type goal struct {
	Of    string  `json:"of"` // "value" or "ratio"
	Op    string  `json:"op"` // "<=" or ">="
	Value float64 `json:"value"`
	none  string  // why there is no goal; empty if there is one
}

func atMost(x float64) goal       { return goal{Of: "value", Op: "<=", Value: x} }
func atLeast(x float64) goal      { return goal{Of: "value", Op: ">=", Value: x} }
func ratioAtMost(x float64) goal  { return goal{Of: "ratio", Op: "<=", Value: x} }
func ratioAtLeast(x float64) goal { return goal{Of: "ratio", Op: ">=", Value: x} }
func noGoal(why string) goal      { return goal{none: why} }

func (g goal) met(x float64) bool {
	return g.Op == "<=" && x <= g.Value || g.Op == ">=" && x >= g.Value
}

// figures returns the values of all runs, those of the baselines, and their ratios.
func figures(runs []measurement) (values, baselines, ratios []float64) {
	for _, r := range runs {
		values = append(values, r.Value)
		if r.Baseline != nil {
			baselines, ratios = append(baselines, *r.Baseline), append(ratios, r.Value / *r.Baseline)
		}
	}
	return values, baselines, ratios
}

// notRun returns the result of m without a value.
func (m metric) notRun(reason string) result {
	r := result{Name: m.name, Unit: m.unit, NoGoal: m.goal.none, Runs: []measurement{}, Reason: reason}
	if m.goal.none == "" {
		r.Goal = &m.goal
	}
	return r
}

// result compares the medians of runs with m's goal. The error says why the runs are unusable.
func (m metric) result(runs []measurement) (result, error) {
	r := m.notRun("")
	values, baselines, ratios := figures(runs)
	if len(runs) == 0 || len(ratios) != 0 && len(ratios) != len(runs) {
		return r, fmt.Errorf("%d of %d runs have a baseline; all or none must have one", len(ratios), len(runs))
	}
	if m.goal.Of == "ratio" && len(ratios) == 0 {
		return r, errors.New("the goal is a ratio, but the runs have no baseline")
	}
	for _, x := range slices.Concat(values, ratios) {
		if math.IsNaN(x) || math.IsInf(x, 0) {
			return r, errors.New("a run's value or ratio is not a number")
		}
	}
	r.Value, r.Runs = new(median(values)), runs
	if len(ratios) > 0 {
		r.Baseline, r.Ratio = new(median(baselines)), new(median(ratios))
	}
	if r.Goal != nil {
		bounded := *r.Value
		if m.goal.Of == "ratio" {
			bounded = *r.Ratio
		}
		r.Met = new(m.goal.met(bounded))
	}
	return r, nil
}

// missed reports whether the value is outside the goal.
func (r result) missed() bool { return r.Met != nil && !*r.Met }

// median returns the middle of xs, or the mean of the middle two; NaN if there are none.
func median(xs []float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(xs))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func (r report) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false) // people read it too, and goals have "<"
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// writeTable writes the report for people. The range is that of the runs, of the figure that the goal bounds.
func (r report) writeTable(w io.Writer) error {
	dirty := ""
	if r.Dirty {
		dirty = ", with changes"
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(t, "commit %s%s; %s; %d CPUs; %s\n\n", r.Commit, dirty, r.Go, r.CPUs, r.Started.Format(time.RFC3339))
	_, _ = fmt.Fprintln(t, "METRIC\tVALUE\tUNIT\tBASELINE\tRATIO\tRANGE\tGOAL\tRESULT")
	for _, m := range r.Metrics {
		goal, outcome := "none", "no goal: "+m.NoGoal
		xs, _, ratios := figures(m.Runs)
		if g := m.Goal; g != nil {
			goal, outcome = g.Op+" "+number(&g.Value), "met"
			if g.Of == "ratio" {
				goal, xs = "ratio "+goal, ratios
			}
		}
		if m.missed() {
			outcome = "MISSED"
		}
		if m.Value == nil {
			reason, _, _ := strings.Cut(m.Reason, "\n")
			outcome = "not run: " + reason
		}
		spread := "-"
		if len(xs) > 1 {
			spread = number(new(slices.Min(xs))) + "…" + number(new(slices.Max(xs)))
		}
		_, _ = fmt.Fprintln(t, strings.Join([]string{
			m.Name, number(m.Value), m.Unit, number(m.Baseline), number(m.Ratio), spread, goal, outcome,
		}, "\t"))
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
