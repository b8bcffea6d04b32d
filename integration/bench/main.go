//go:build unix

// Command bench measures Credence against its goals: what the sidecar costs each pod, and what the broker adds to
// the work that no broker can avoid.
//
//	go run ./integration/bench [flags]
//
// It prints a table and writes the same as JSON to .build/bench/bench.json and to the file that BENCH_OUT names.
// It measures speed and memory beside a baseline, alternately and in the same run, because results from two
// machines, or from one machine at two times, do not compare. Load generators share the processors with the
// programs that they load.
//
// A missed goal is printed as MISSED. It sets exit status 1 only with --strict, because a busy machine can miss a
// ratio by accident. A metric that fails to run always sets exit status 1. Ctrl-C ends all started programs and
// writes nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/credence-iam/credence/integration/process"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case interrupted:
		fmt.Fprintln(os.Stderr, "bench: interrupted; nothing was written")
		os.Exit(130) // as shells report Ctrl-C
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is what all metrics share.
type bench struct {
	root     string // of the checkout
	bin      string // the folder of built programs
	programs *process.Run
	runs     int
	duration time.Duration // of one run, for each of its two sides

	simulated []byte     // the simulator's output; nil: it has not run
	losses    []failover // by run; nil: not measured yet
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	only := flags.String("only", "", "comma `list` of metrics to measure; default all")
	runs := flags.Int("runs", 5, "`number` of runs of each metric; the median counts")
	duration := flags.Duration("duration", 1500*time.Millisecond, "`length` of one run, and of its baseline")
	strict := flags.Bool("strict", false, "exit with status 1 if a goal is missed")
	profile := flags.String("cpuprofile", "", "`file` for a CPU profile of this program, which includes the measured broker")
	flags.Usage = func() {
		_, _ = fmt.Fprintln(stderr, "usage: go run ./integration/bench [flags]\n\nFlags:")
		flags.PrintDefaults()
		_, _ = fmt.Fprintln(stderr, "\nMetrics:")
		for _, m := range metrics {
			_, _ = fmt.Fprintf(stderr, "  %s (%s)\n", m.name, m.unit)
			for line := range strings.Lines(m.about) {
				_, _ = fmt.Fprintln(stderr, "\t"+strings.TrimSpace(line))
			}
		}
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	selected, err := choose(*only)
	switch {
	case err != nil:
		return fmt.Errorf("--only: %w", err)
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q; use flags", flags.Arg(0))
	case *runs < 1 || *duration <= 0:
		return errors.New("--runs and --duration must be positive")
	}
	gomod, err := output(ctx, "go", "env", "GOMOD")
	if err != nil {
		return err
	}
	out := filepath.Join(filepath.Dir(gomod), ".build", "bench")
	programs, err := process.Open(ctx, process.Config{Parent: filepath.Join(out, "runs"), Name: "bench"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, programs.Close()) }()
	if *profile != "" {
		file, err := os.Create(*profile)
		if err != nil {
			return fmt.Errorf("--cpuprofile: %w", err)
		}
		defer file.Close()
		if err := pprof.StartCPUProfile(file); err != nil {
			return fmt.Errorf("--cpuprofile: %w", err)
		}
		defer pprof.StopCPUProfile()
	}

	b := &bench{
		root: filepath.Dir(gomod), bin: filepath.Join(programs.Dir(), "bin"), programs: programs, runs: *runs, duration: *duration,
	}
	r := b.describe(ctx)
	err = b.measure(ctx, &r, metrics, selected, stderr)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	err = errors.Join(err, r.writeTable(stdout))
	for _, file := range []string{filepath.Join(out, "bench.json"), os.Getenv("BENCH_OUT")} {
		if file != "" {
			err = errors.Join(err, write(r, file))
		}
	}
	missed := 0
	for _, m := range r.Metrics {
		if m.missed() {
			missed++
			_, _ = fmt.Fprintln(stderr, "MISSED:", m.Name)
		}
	}
	if *strict && missed > 0 {
		err = errors.Join(err, fmt.Errorf("%d goals were missed", missed))
	}
	return err
}

// measure measures the selected metrics into r. A metric that fails is in the report as not run, and in the error.
func (b *bench) measure(ctx context.Context, r *report, all []metric, selected func(name string) bool, progress io.Writer) (failed error) {
	for _, m := range all {
		if !selected(m.name) {
			r.Metrics = append(r.Metrics, m.notRun("left out by --only"))
			continue
		}
		_, _ = fmt.Fprintln(progress, "measuring", m.name)
		runs, err := inWorld(ctx, b, m.measure)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var measured result
		reason, impossible := errors.AsType[notRun](err)
		if err == nil {
			measured, err = m.result(runs)
		}
		switch {
		case impossible:
			measured = m.notRun(string(reason))
		case err != nil:
			measured = m.notRun("failed: " + err.Error())
			failed = errors.Join(failed, fmt.Errorf("measuring %s: %w", m.name, err))
		}
		r.Metrics = append(r.Metrics, measured)
	}
	return failed
}

// choose returns a function that reports whether a metric is in the comma list. An empty list has all metrics.
func choose(list string) (func(name string) bool, error) {
	if list == "" {
		return func(string) bool { return true }, nil
	}
	names := strings.Split(list, ",")
	for _, name := range names {
		if !slices.ContainsFunc(metrics, func(m metric) bool { return m.name == name }) {
			return nil, fmt.Errorf("there is no metric %q; -h lists them", name)
		}
	}
	return func(name string) bool { return slices.Contains(names, name) }, nil
}

// describe begins a report. If git does not name the commit, the report says that it is unknown.
func (b *bench) describe(ctx context.Context) report {
	r := report{
		Schema: 1, Commit: "unknown", Dirty: true,
		Go: runtime.Version(), CPUs: runtime.GOMAXPROCS(0), Started: time.Now().UTC().Truncate(time.Second),
	}
	if commit, err := output(ctx, "git", "-C", b.root, "rev-parse", "--verify", "--quiet", "HEAD"); err == nil {
		changes, err := output(ctx, "git", "-C", b.root, "status", "--porcelain")
		r.Commit, r.Dirty = commit, err != nil || changes != ""
	}
	return r
}

// output runs a program and returns its standard output, trimmed.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output() //nolint:gosec // The names are constants of this program.
	if err != nil {
		return "", fmt.Errorf("running %s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

func write(r report, file string) error {
	err := os.MkdirAll(filepath.Dir(file), 0o750)
	if err == nil {
		var f *os.File
		if f, err = os.Create(file); err == nil {
			err = errors.Join(r.writeJSON(f), f.Close())
		}
	}
	if err != nil {
		return fmt.Errorf("writing the report %s: %w", file, err)
	}
	return nil
}
