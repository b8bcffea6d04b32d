//go:build unix

package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/integration/process"
)

// newWorld returns a world that measures as little as it can.
func newWorld(t *testing.T) *world {
	t.Helper()
	programs, err := process.Open(t.Context(), process.Config{Parent: t.TempDir(), Name: "bench"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := programs.Close(); err != nil {
			t.Error(err)
		}
	})
	return &world{ctx: t.Context(), bench: &bench{root: "../..", bin: t.TempDir(), programs: programs, runs: 2, duration: slice}}
}

// measured runs measure in a world of w's benchmark.
func measured[T any](t *testing.T, w *world, measure func(*world) T) T {
	t.Helper()
	result, err := inWorld(w.ctx, w.bench, measure)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// A metric that another one hides, or that says nothing about itself, would pass unnoticed.
func TestMetricsAreDescribed(t *testing.T) {
	names := make(map[string]bool)
	for _, m := range metrics {
		if m.name == "" || m.unit == "" || m.about == "" || names[m.name] {
			t.Errorf("metric %q has no name, no unit, no description, or the name of another", m.name)
		}
		if m.goal.none == "" && (m.goal.Of != "value" && m.goal.Of != "ratio" || m.goal.Op != "<=" && m.goal.Op != ">=") {
			t.Errorf("metric %q has neither a goal nor a reason for none", m.name)
		}
		names[m.name] = true
	}
}

// A failure must be in the report and in the error.
func TestOutcomes(t *testing.T) {
	runs := func(values ...measurement) func(*world) []measurement {
		return func(*world) []measurement { return values }
	}
	fails := func(err error) func(*world) []measurement {
		return func(*world) []measurement { check(err); return nil }
	}
	broken := errors.New("broken")
	value := func(x float64) measurement { return measurement{Value: x} }
	tests := map[string]struct {
		goal    goal
		measure func(*world) []measurement
		want    string // in the row of the table
	}{
		"odd":               {atMost(2), runs(value(3), value(1), value(2)), "<= 2  met"},
		"even":              {atLeast(2), runs(value(1), value(2)), ">= 2  MISSED"},
		"equal is below":    {atMost(1), runs(value(1)), "<= 1  met"},
		"equal is above":    {atLeast(1), runs(value(1)), ">= 1  met"},
		"too much":          {atMost(1), runs(value(1.01)), "<= 1  MISSED"},
		"a bound on values": {atMost(1), runs(beside(2, 4)), "<= 1  MISSED"},
		"a bound on ratios": {ratioAtMost(1), runs(beside(2, 4)), "ratio <= 1  met"},
		// The ratio of the medians would be 1.
		"ratios of runs":    {ratioAtMost(1.5), runs(beside(20, 10), beside(10, 20), beside(400, 200)), "0.5…2  ratio <= 1.5  MISSED"},
		"no such goal":      {goal{}, runs(value(1)), "MISSED"},
		"without a goal":    {noGoal("watched"), runs(value(1)), "no goal: watched"},
		"elsewhere":         {atMost(1), fails(notRun("no such system\nand more that a table has no room for")), "not run: no such system"},
		"failed":            {atMost(1), fails(broken), "not run: failed: broken"},
		"no runs":           {atMost(1), runs(), "not run: failed: 0 of 0 runs have a baseline"},
		"half a baseline":   {ratioAtMost(1), runs(beside(1, 2), value(1)), "not run: failed: 1 of 2 runs"},
		"ratio to nothing":  {ratioAtMost(1), runs(value(1)), "not run: failed: the goal is a ratio"},
		"division by zero":  {ratioAtMost(1), runs(beside(1, 0)), "not run: failed: a run's value or ratio is not a number"},
		"zero against zero": {ratioAtMost(1), runs(beside(0, 0)), "not run: failed: a run's value or ratio is not a number"},
		"unselected":        {atMost(1), fails(broken), "not run: left out by --only"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var r report
			all := []metric{{name: name, unit: "u", goal: test.goal, measure: test.measure}}
			err := newWorld(t).measure(t.Context(), &r, all, func(name string) bool { return name != "unselected" }, io.Discard)
			if failed := strings.Contains(test.want, "failed"); (err != nil) != failed {
				t.Errorf("the error is %v", err)
			}
			if m := r.Metrics[0]; m.missed() != strings.Contains(test.want, "MISSED") || (m.Value == nil) != (m.Reason != "") {
				t.Errorf("the result is %+v", m)
			}
			var table strings.Builder
			if err := errors.Join(r.writeTable(&table), r.writeJSON(io.Discard)); err != nil {
				t.Error(err)
			}
			if !strings.Contains(table.String(), test.want) {
				t.Errorf("the table lacks %q:\n%s", test.want, table.String())
			}
		})
	}
}

// The two sides alternate, the side that begins changes, and the first turn does not count.
func TestPaired(t *testing.T) {
	var order strings.Builder
	record := func(name byte, values ...float64) side {
		return func(time.Duration) []float64 {
			order.WriteByte(name)
			value := values[0]
			values = values[1:]
			return []float64{value}
		}
	}
	w := &world{ctx: t.Context(), bench: &bench{runs: 2, duration: 3 * slice}}
	got := w.paired(record('a', 1000, 1, 2, 3, 1000, 4, 5, 6), record('b', 1000, 10, 20, 30, 1000, 40, 50, 60))
	if diff := cmp.Diff([]measurement{beside(2, 20), beside(5, 50)}, got); diff != "" {
		t.Errorf("runs (-want +got):\n%s", diff)
	}
	if want := "abbaabba" + "baabbaab"; order.String() != want {
		t.Errorf("the order is %s, want %s", order.String(), want)
	}
}

func TestPairedEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	stops := func(time.Duration) []float64 { cancel(); return []float64{1} }
	_, err := inWorld(ctx, &bench{runs: 1000, duration: time.Hour}, func(w *world) []measurement { return w.paired(stops, stops) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
}

// The benchmark measures programs that are built as for a release.
func TestBuildsAsTheMakefile(t *testing.T) {
	text, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^BUILD +:= (.*)$`).FindSubmatch(text)
	if found == nil {
		t.Fatal("the Makefile has no BUILD")
	}
	want := strings.Join(slices.Concat(buildEnv, []string{"go", "build"}, buildFlags), " ")
	if got := strings.ReplaceAll(string(found[1]), "'", ""); got != want {
		t.Errorf("the Makefile builds with %q, the benchmark with %q", got, want)
	}
}

func TestProcBytes(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no /proc")
	}
	measured(t, newWorld(t), func(*world) any {
		small := procBytes(os.Getpid(), "RssAnon")
		const size = 64 << 20
		memory := make([]byte, size)
		for i := range memory {
			memory[i] = 1
		}
		large := procBytes(os.Getpid(), "RssAnon")
		runtime.KeepAlive(memory)
		if large-small < size/2 {
			t.Errorf("with %d bytes more, RssAnon grew from %.0f to %.0f", size, small, large)
		}
		return nil
	})
}

// All threads of a process count.
func TestSwitches(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no /proc")
	}
	measured(t, newWorld(t), func(*world) any {
		const naps = 50
		before := switches(os.Getpid())
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for range naps {
				time.Sleep(100 * time.Microsecond)
			}
		}()
		<-done
		if after := switches(os.Getpid()); after-before < naps {
			t.Errorf("after %d naps, %.0f switches became %.0f", naps, before, after)
		}
		return nil
	})
}

// A CPU limit has the quota that the metric's name says, and its cgroup is removed with the programs.
func TestStartUnderALimit(t *testing.T) {
	w := newWorld(t)
	procs, err := w.programs.CPULimit("start-50-0", 50)
	if err != nil {
		t.Skipf("this machine cannot set a CPU limit: %v", err)
	}
	quota, err := os.ReadFile(filepath.Join(filepath.Dir(procs), "cpu.cfs_quota_us"))
	if err != nil {
		quota, err = os.ReadFile(filepath.Join(filepath.Dir(procs), "cpu.max"))
	}
	if err != nil || !slices.Equal(strings.Fields(string(quota))[:1], []string{"5000"}) {
		t.Errorf("the quota is %q, %v", quota, err)
	}
	if err := w.programs.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(procs); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s still exists: %v", procs, err)
	}
}

// The metrics of the broker that have a baseline run, and both sides respond; how fast does not matter here.
func TestBrokerThroughput(t *testing.T) {
	brokers := slices.DeleteFunc(slices.Clone(metrics), func(m metric) bool {
		return !slices.Contains([]string{"broker_get_rps", "broker_fresh_connection_rps", "broker_verify_ns"}, m.name)
	})
	var r report
	if err := newWorld(t).measure(t.Context(), &r, brokers, func(string) bool { return true }, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, m := range r.Metrics {
		for _, run := range m.Runs {
			if run.Value <= 0 || *run.Baseline <= 0 {
				t.Errorf("%s: a side made no call: %+v", m.Name, run)
			}
		}
	}
}

// A baseline that accepted every token would be too fast, and make the broker look slow.
func TestBaselineVerifies(t *testing.T) {
	keys := newSigner()
	_, tokens := makePods(keys)
	first, second := strings.Split(tokens[0], "."), strings.Split(tokens[1], ".")
	for token, genuine := range map[string]bool{tokens[0]: true, first[0] + "." + second[1] + "." + first[2]: false} {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+token))
		if _, err := verifying(keys.Public(), nil).respond(ctx); (err == nil) != genuine {
			t.Errorf("genuine is %v, and the error is %v", genuine, err)
		}
	}
}
