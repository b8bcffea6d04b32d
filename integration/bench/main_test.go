//go:build unix

package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
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

// newBench returns a bench that measures as little as it can.
func newBench(t *testing.T) *bench {
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
	return &bench{root: "../..", bin: t.TempDir(), programs: programs, runs: 2, duration: slice}
}

func everything(string) bool { return true }

// Whatever is measured must be describable before it is.
func TestMetricsAreDescribed(t *testing.T) {
	r := newBench(t).describe(t.Context())
	for _, m := range metrics() {
		if m.about == "" {
			t.Errorf("%s does not say what it measures", m.Name)
		}
		r.Metrics = append(r.Metrics, m.NotRun("not in a test"))
	}
	if err := r.Check(); err != nil {
		t.Error(err)
	}
}

func TestOutcomes(t *testing.T) {
	runs := func(value float64) func(context.Context, *bench) ([]report.Run, error) {
		return func(context.Context, *bench) ([]report.Run, error) { return []report.Run{{Value: value}}, nil }
	}
	fails := func(err error) func(context.Context, *bench) ([]report.Run, error) {
		return func(context.Context, *bench) ([]report.Run, error) { return nil, err }
	}
	goal := &report.Goal{Of: report.Value, Op: "<=", Value: 1}
	broken := errors.New("broken")
	all := []metric{
		{Metric: report.Metric{Name: "met", Unit: "u", Goal: goal}, measure: runs(1)},
		{Metric: report.Metric{Name: "missed", Unit: "u", Goal: goal}, measure: runs(2)},
		{Metric: report.Metric{Name: "elsewhere", Unit: "u", Goal: goal}, measure: fails(notRun("no such system"))},
		{Metric: report.Metric{Name: "failed", Unit: "u", Goal: goal}, measure: fails(broken)},
		{Metric: report.Metric{Name: "useless", Unit: "u", Goal: goal}, measure: fails(nil)},
		{Metric: report.Metric{Name: "unselected", Unit: "u", Goal: goal}, measure: fails(broken)},
	}
	r, err := newBench(t).measure(t.Context(), all, func(name string) bool { return name != "unselected" }, io.Discard)
	if !errors.Is(err, broken) {
		t.Errorf("the failure is not in %v", err)
	}
	if err := r.WriteJSON(io.Discard); err != nil {
		t.Errorf("a failure spoils the report: %v", err)
	}
	type outcome struct {
		Met    string
		Reason string
	}
	got := make(map[string]outcome)
	for _, m := range r.Metrics {
		o := outcome{Reason: m.Reason}
		if m.Met != nil {
			o.Met = map[bool]string{true: "yes", false: "no"}[*m.Met]
		}
		got[m.Name] = o
	}
	want := map[string]outcome{
		"met":        {Met: "yes"},
		"missed":     {Met: "no"},
		"elsewhere":  {Reason: "no such system"},
		"failed":     {Reason: "failed: broken"},
		"useless":    {Reason: "failed: judging useless: of 0 runs, 0 have a baseline; all or none must have one"},
		"unselected": {Reason: "left out by --only"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("outcomes (-want +got):\n%s", diff)
	}
}

func TestChoose(t *testing.T) {
	selected, err := choose("broker_get_rps,sidecar_get_c1_p50")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"broker_get_rps": true, "sidecar_get_c1_p50": true, "sidecar_rss_anon_bytes": false} {
		if selected(name) != want {
			t.Errorf("%s: selected is %v", name, !want)
		}
	}
	if _, err := choose("broker_get_rsp"); err == nil {
		t.Error("a metric that does not exist was chosen")
	}
}

// The two sides take turns, the one that begins changes, and the first turn does not count.
func TestPaired(t *testing.T) {
	var order strings.Builder
	record := func(name byte, values ...float64) side {
		return func(context.Context, time.Duration) ([]float64, error) {
			order.WriteByte(name)
			value := values[0]
			values = values[1:]
			return []float64{value}, nil
		}
	}
	b := &bench{runs: 2, duration: 3 * slice}
	got, err := b.paired(t.Context(), record('a', 1000, 1, 2, 3, 1000, 4, 5, 6), record('b', 1000, 10, 20, 30, 1000, 40, 50, 60))
	if err != nil {
		t.Fatal(err)
	}
	want := []report.Run{{Value: 2, Baseline: new(20.0)}, {Value: 5, Baseline: new(50.0)}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("runs (-want +got):\n%s", diff)
	}
	if want := "abbaabba" + "baabbaab"; order.String() != want {
		t.Errorf("the order is %s, want %s", order.String(), want)
	}
}

func TestPairedEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	stops := func(context.Context, time.Duration) ([]float64, error) { cancel(); return []float64{1}, nil }
	if _, err := (&bench{runs: 1000, duration: time.Hour}).paired(ctx, stops, stops); !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
}

// What is measured is what is released.
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

func TestRSSAnon(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no /proc")
	}
	small, err := rssAnon(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	const size = 64 << 20
	held := make([]byte, size)
	for i := range held {
		held[i] = 1
	}
	large, err := rssAnon(os.Getpid())
	runtime.KeepAlive(held)
	if err != nil || large-small < size/2 {
		t.Errorf("holding %d bytes more, RssAnon grew from %.0f to %.0f (%v)", size, small, large, err)
	}
}

// The threads of a process that sleeps and wakes are all counted.
func TestSwitches(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no /proc")
	}
	before, err := switches(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	const naps = 50
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
	if after, err := switches(os.Getpid()); err != nil || after-before < naps {
		t.Errorf("after %d naps, %.0f switches became %.0f (%v)", naps, before, after, err)
	}
	if _, err := switches(1 << 30); err == nil {
		t.Error("a process that does not exist has switches")
	}
}

// The parts of a start are all there, in order, and are less than the whole together.
func TestStartParts(t *testing.T) {
	runs, err := newBench(t).startTime(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, run := range runs {
		if len(run.Parts) != len(startParts) {
			t.Fatalf("parts are %+v", run.Parts)
		}
		for n, part := range run.Parts {
			if part.Name != startParts[n] || part.Value < 0 || part.Value > run.Value {
				t.Errorf("of %g ms in all, part %d is %+v", run.Value, n, part)
			}
		}
	}
}

// A CPU limit holds for what puts itself into its cgroup, and goes away with the run.
func TestStartUnderALimit(t *testing.T) {
	programs, err := process.Open(t.Context(), process.Config{Parent: t.TempDir(), Name: "bench"})
	if err != nil {
		t.Fatal(err)
	}
	procs, err := programs.CPULimit("start-50-0", 50)
	if err != nil {
		t.Logf("no CPU limit is to be had here: %v", err)
	} else {
		quota, err := os.ReadFile(filepath.Join(filepath.Dir(procs), "cpu.cfs_quota_us"))
		if err != nil {
			quota, err = os.ReadFile(filepath.Join(filepath.Dir(procs), "cpu.max"))
		}
		if err != nil || !slices.Equal(strings.Fields(string(quota))[:1], []string{"5000"}) {
			t.Errorf("the quota is %q, %v", quota, err)
		}
	}
	if err := programs.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(procs); procs != "" && !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cgroup of %s is left behind: %v", procs, err)
	}
}

// Both sides of the pair answer; how fast does not matter here.
func TestBrokerThroughput(t *testing.T) {
	r, err := newBench(t).measure(t.Context(), brokerMetrics, everything, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	for _, run := range r.Metrics[0].Runs {
		if run.Value <= 0 || *run.Baseline <= 0 {
			t.Errorf("a side answered no call: %+v", run)
		}
	}
}

// A baseline that let every token pass would be too fast, and the broker look slow beside it.
func TestBaselineVerifies(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, tokens, err := makePods(key)
	if err != nil {
		t.Fatal(err)
	}
	header, rest, _ := strings.Cut(tokens[0], ".")
	_, signature, _ := strings.Cut(rest, ".")
	_, rest, _ = strings.Cut(tokens[1], ".")
	claims, _, _ := strings.Cut(rest, ".")
	for token, want := range map[string]bool{tokens[0]: true, header + "." + claims + "." + signature: false} {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+token))
		if _, err := verifying(key.Public(), nil).answer(ctx); (err == nil) != want {
			t.Errorf("genuine is %v, and the error is %v", want, err)
		}
	}
}
