//go:build unix

package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/credence-iam/credence/integration/bench/report"
)

// startMetrics are how long a pod waits for its sidecar's first credentials.
var startMetrics = []metric{
	startMetric("sidecar_start_to_first_200_ms", 0, "watched only: a pod's start takes seconds",
		"From the start of the program to the first 200 with credentials, by a broker that answers at once over TLS; beside it,\n"+
			"\tthe start of a bare net/http server. Starting a process and finding that it listens are in both. Its parts are what the\n"+
			"\tsidecar does until the broker has its connection, the handshake, the call with the token's file, the broker, and\n"+
			"\twhat it does from the broker's answer until the first 200; as the broker and the client see them."),
	startMetric("sidecar_start_to_first_200_50m_ms", 50, "watched only: it is CPU time beyond 5 ms, in periods of 100",
		"The same with a CPU limit of 50m, which the sidecar of a Guaranteed pod has: a cgroup with the quota that a kubelet gives\n"+
			"\tit. Each start has a cgroup of its own, in which a shell puts itself before it becomes the program."),
	startMetric("sidecar_start_to_first_200_100m_ms", 100, "watched only: it is CPU time beyond 10 ms, in periods of 100",
		"The same with a CPU limit of 100m, which other sidecars have."),
}

func startMetric(name string, milliCPUs int, noGoal, about string) metric {
	return metric{
		Metric:  report.Metric{Name: name, Unit: "ms", NoGoal: noGoal},
		about:   about,
		measure: func(ctx context.Context, b *bench) ([]report.Run, error) { return b.startTime(ctx, milliCPUs) },
	}
}

// startParts name the parts of a start. Each but the last ends with the moment of its place.
var startParts = [moments + 1]string{"until the broker accepts", "handshake", "request", "broker", "until the first 200"}

// startTime measures starts, under a CPU limit unless that is 0.
func (b *bench) startTime(ctx context.Context, milliCPUs int) ([]report.Run, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := b.newPod(ctx)
	if err != nil {
		return nil, err
	}
	var runs []report.Run
	for i := range b.runs {
		s := starts{b: b, pod: p, milliCPUs: milliCPUs}
		run, err := b.pair(ctx, i, s.side(p.startSidecar, true), s.side(p.startBare, false))
		if err != nil {
			return nil, err
		}
		for n, name := range startParts {
			run.Parts = append(run.Parts, report.Part{Name: name, Value: report.Median(s.parts[n])})
		}
		runs = append(runs, run)
	}
	return runs, nil
}

// starts are those of one run.
type starts struct {
	b         *bench
	pod       *pod
	milliCPUs int
	turns     int // of the sidecar
	parts     [moments + 1][]float64
}

func (s *starts) side(start func(context.Context) (*server, error), ours bool) side {
	one := timed(func(ctx context.Context) (time.Duration, error) {
		if err := s.limit(); err != nil {
			return 0, err
		}
		server, err := start(ctx)
		if err != nil {
			return 0, err
		}
		server.stop()
		if ours && s.turns > 1 { // as in pair, the first turn does not count
			s.note(server)
		}
		return server.took, nil
	}, time.Millisecond)
	return func(ctx context.Context, length time.Duration) ([]float64, error) {
		if ours {
			s.turns++
		}
		return one(ctx, length)
	}
}

// note adds the parts of one start.
func (s *starts) note(server *server) {
	s.pod.mu.Lock()
	defer s.pod.mu.Unlock()
	last := server.began
	for n, at := range append(s.pod.reached[:], server.began.Add(server.took)) {
		s.parts[n] = append(s.parts[n], float64(at.Sub(last))/float64(time.Millisecond))
		last = at
	}
}

// limit makes the next start one under the limit. The cgroups are removed with all that this program started.
func (s *starts) limit() error {
	if s.milliCPUs == 0 {
		return nil
	}
	procs, err := s.b.programs.CPULimit("start-"+strconv.Itoa(s.milliCPUs)+"-"+strconv.Itoa(s.pod.started), s.milliCPUs)
	if err != nil {
		return notRun(fmt.Sprintf("a CPU limit cannot be set here: %v", err))
	}
	s.pod.wrap = []string{"/bin/sh", "-c", `echo $$ >"$0" && exec "$@"`, procs}
	return nil
}
