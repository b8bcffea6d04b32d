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

	"github.com/credence-iam/credence/integration/bench/report"
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

// A metric without a goal, or with a goal of an unknown form, would pass unnoticed.
func TestMetricsAreDescribed(t *testing.T) {
	r := newWorld(t).describe(t.Context())
	for _, m := range metrics {
		if m.about == "" {
			t.Errorf("%s has no description", m.Name)
		}
		r.Metrics = append(r.Metrics, m.NotRun("not in a test"))
	}
	if err := r.Check(); err != nil {
		t.Error(err)
	}
}

// A failure must be in the report and in the error.
func TestOutcomes(t *testing.T) {
	runs := func(value float64) func(*world) []report.Run {
		return func(*world) []report.Run { return []report.Run{{Value: value}} }
	}
	fails := func(err error) func(*world) []report.Run {
		return func(*world) []report.Run { check(err); return nil }
	}
	broken := errors.New("broken")
	var all []metric
	for name, measure := range map[string]func(*world) []report.Run{
		"met": runs(1), "missed": runs(2), "elsewhere": fails(notRun("no such system")), "failed": fails(broken),
		"useless": fails(nil), "unselected": fails(broken),
	} {
		all = append(all, metric{Metric: report.Metric{Name: name, Unit: "u", Goal: atMost(1)}, measure: measure})
	}
	r, err := newWorld(t).measure(t.Context(), all, func(name string) bool { return name != "unselected" }, io.Discard)
	if !errors.Is(err, broken) {
		t.Errorf("the error does not contain the failure: %v", err)
	}
	if err := r.WriteJSON(io.Discard); err != nil {
		t.Errorf("the report is invalid after a failure: %v", err)
	}
	got := make(map[string]string)
	for _, m := range r.Metrics {
		got[m.Name] = m.Reason
		if m.Met != nil {
			got[m.Name] = map[bool]string{true: "met", false: "missed"}[*m.Met]
		}
	}
	want := map[string]string{
		"met": "met", "missed": "missed", "elsewhere": "no such system", "failed": "failed: broken",
		"useless":    "failed: metric useless: 0 of 0 runs have a baseline; all or none must have one",
		"unselected": "left out by --only",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("outcomes (-want +got):\n%s", diff)
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
	if diff := cmp.Diff([]report.Run{beside(2, 20), beside(5, 50)}, got); diff != "" {
		t.Errorf("runs (-want +got):\n%s", diff)
	}
	if want := "abbaabba" + "baabbaab"; order.String() != want {
		t.Errorf("the order is %s, want %s", order.String(), want)
	}
}

func TestPairedEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	stops := func(time.Duration) []float64 { cancel(); return []float64{1} }
	_, err := inWorld(ctx, &bench{runs: 1000, duration: time.Hour}, func(w *world) []report.Run { return w.paired(stops, stops) })
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

// The parts of a start are complete and in order, and each is shorter than the whole.
func TestStartParts(t *testing.T) {
	w := newWorld(t)
	for _, run := range measured(t, w, func(w *world) []report.Run { return w.startTime(0) }) {
		if len(run.Parts) != len(startParts) {
			t.Fatalf("the parts are %+v", run.Parts)
		}
		for n, part := range run.Parts {
			if part.Name != startParts[n] || part.Value < 0 || part.Value > run.Value {
				t.Errorf("of %g ms, part %d is %+v", run.Value, n, part)
			}
		}
	}
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
		return !slices.Contains([]string{"broker_get_rps", "broker_fresh_connection_rps", "broker_verify_ns"}, m.Name)
	})
	r, err := newWorld(t).measure(t.Context(), brokers, func(string) bool { return true }, io.Discard)
	if err != nil {
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
	measured(t, newWorld(t), func(w *world) any {
		api, _ := w.serveAPI(w.newTrust(), 0, true)
		_, tokens := makePods(api)
		first, second := strings.Split(tokens[0], "."), strings.Split(tokens[1], ".")
		for token, genuine := range map[string]bool{tokens[0]: true, first[0] + "." + second[1] + "." + first[2]: false} {
			ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+token))
			if _, err := verifying(api.key.Public(), nil).respond(ctx); (err == nil) != genuine {
				t.Errorf("genuine is %v, and the error is %v", genuine, err)
			}
		}
		return nil
	})
}
