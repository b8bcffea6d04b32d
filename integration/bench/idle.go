//go:build unix

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/bench/report"
)

// idleTime is how long processes are watched that have nothing to do: the runtime collects garbage every two minutes,
// whatever happens.
const idleTime = 2 * time.Minute

var idleMetrics = []metric{{
	Metric: report.Metric{
		Name: "sidecar_wakeups_per_minute", Unit: "1/min",
		// A node has a hundred of them.
		Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 5},
	},
	about: "How often a sidecar wakes that has fetched and served its credentials once and is idle: voluntary context switches of\n" +
		"\tall its threads in " + strconv.Itoa(int(idleTime.Minutes())) + " minutes. Beside it, a bare net/http server that has served once, for information. The runs are\n" +
		"\tprocesses side by side. What it wakes for when it renews, twice in an hour, is not in it.",
	measure: wakeups,
}}

func wakeups(ctx context.Context, b *bench) ([]report.Run, error) {
	if runtime.GOOS != "linux" {
		return nil, notRun("context switches are in /proc, which " + runtime.GOOS + " does not have")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := b.newPod(ctx)
	if err != nil {
		return nil, err
	}
	pids, stop, err := p.startIdle(ctx, b.runs)
	defer stop()
	if err != nil {
		return nil, err
	}
	before, err := switchesOf(pids)
	if err != nil {
		return nil, err
	}
	if err := sleep(ctx, idleTime); err != nil {
		return nil, err
	}
	after, err := switchesOf(pids)
	if err != nil {
		return nil, err
	}
	var runs []report.Run
	for i := 0; i < len(pids); i += 2 {
		perMinute := func(n int) float64 { return (after[n] - before[n]) / idleTime.Minutes() }
		// A bare server that never wakes would make a ratio that is no number, and nobody reads it.
		runs = append(runs, report.Run{Value: perMinute(i), Baseline: new(max(perMinute(i+1), 1/idleTime.Minutes()))})
	}
	return runs, nil
}

// startIdle starts n sidecars and bare servers in turn, each asked once, and waits until they are idle. stop stops
// those that were started, after an error too.
func (p *pod) startIdle(ctx context.Context, n int) (pids []int, stop func(), err error) {
	var all []*server
	stop = func() {
		for _, s := range all {
			s.stop()
		}
	}
	for range n {
		for _, start := range []func(context.Context) (*server, error){p.startSidecar, p.startBare} {
			s, err := start(ctx)
			if err != nil {
				return nil, stop, err
			}
			all = append(all, s)
			_ = s.conn.Close() // an SDK that has what it wanted
			pids = append(pids, s.PID())
		}
	}
	return pids, stop, sleep(ctx, settle)
}

// sleep returns early, with an error, when ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func switchesOf(pids []int) ([]float64, error) {
	var all []float64
	for _, pid := range pids {
		n, err := switches(pid)
		if err != nil {
			return nil, err
		}
		all = append(all, n)
	}
	return all, nil
}

// switches reads how often the threads of a process have gone to sleep by themselves, from proc_pid_status(5).
func switches(pid int) (float64, error) {
	files, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/status")
	if err == nil && len(files) == 0 {
		err = errors.New("it has no threads")
	}
	if err != nil {
		return 0, fmt.Errorf("reading the context switches of process %d: %w", pid, err)
	}
	sum := 0
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return 0, fmt.Errorf("reading the context switches of process %d: %w", pid, err)
		}
		lines := strings.Split(string(content), "\n")
		at := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, "voluntary_ctxt_switches:") })
		if at < 0 {
			return 0, fmt.Errorf("reading the context switches of process %d: %s does not tell them", pid, file)
		}
		_, number, _ := strings.Cut(lines[at], ":")
		n, err := strconv.Atoi(strings.TrimSpace(number))
		if err != nil {
			return 0, fmt.Errorf("reading the context switches of process %d: %w", pid, err)
		}
		sum += n
	}
	return float64(sum), nil
}
