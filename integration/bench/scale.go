//go:build unix

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"

	"github.com/credence-iam/credence/integration/bench/report"
)

// scaleMetrics are what several brokers make of one STS, and of the loss of one of them. The first three are figures of
// the simulator, integration/scale, in virtual time: the same code, but for sockets and Kubernetes.
var scaleMetrics = []metric{{
	Metric: report.Metric{
		Name: "scale_sts_calls_per_hour_3_brokers", Unit: "calls/h",
		// Two owners of each role, which renew when between 0.5 and 0.6 of an hour are left.
		Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 22_500},
	},
	about:   "Calls of STS per hour for 5,000 roles with sessions of an hour, asked for by 100,000 pods on 1,000 nodes of 3 brokers that have\n\tsettled.",
	measure: simulated("scale_sts_calls_per_hour_3_brokers"),
}, {
	Metric: report.Metric{
		Name: "scale_sts_calls_per_hour_10_brokers", Unit: "calls/h",
		Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 22_500},
	},
	about:   "The same with 10 brokers.",
	measure: simulated("scale_sts_calls_per_hour_10_brokers"),
}, {
	Metric: report.Metric{
		Name: "scale_min_remaining_fraction", Unit: "of life",
		Goal: &report.Goal{Of: report.Value, Op: ">=", Value: 0.45},
	},
	about: "The least part of a session's life that was left in any answer of all scenarios: rolling updates, more brokers and\n" +
		"\tfewer, the loss of one and of a third of them, and pods that are replaced.",
	measure: simulated("scale_min_remaining_fraction"),
}, {
	Metric: report.Metric{
		Name: "scale_failover_failed_calls", Unit: "calls",
		Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 0},
	},
	about: "Calls of " + strconv.Itoa(failoverClients) + " sidecars' clients that failed while one of three brokers, all programs of their own, was lost under them:\n" +
		"\tkilled in one run and stopped in the next (SIGSTOP: it takes connections and says nothing), for " + noticing.String() + " until DNS and\n" +
		"\tthe other brokers are told. Each client makes one call in that time, as a rule, within its budget of hedges.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
		return b.failovers(ctx, func(f failover) float64 { return float64(f.failed) })
	},
}, {
	Metric: report.Metric{
		Name: "scale_failover_p99_ms", Unit: "ms",
		Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 1000},
	},
	about: "The latency that one in a hundred of these calls exceeded, of those begun in that time. Each run is the larger one of a broker\n" +
		"\tthat is killed and one that is stopped.",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
		return b.failovers(ctx, func(f failover) float64 { return f.p99.Seconds() * 1000 })
	},
}}

// simulation is what the simulator said, once it has run.
var simulation []byte

// simulated is a figure of the simulator, which runs once for all of them.
func simulated(name string) func(context.Context, *bench) ([]report.Run, error) {
	return func(ctx context.Context, b *bench) ([]report.Run, error) {
		if simulation == nil {
			test := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-timeout=40m", "./integration/scale")
			test.Dir, test.Stderr = b.root, os.Stderr
			test.Env = append(os.Environ(), "CREDENCE_SCALE=full")
			out, err := test.Output()
			if err != nil {
				return nil, fmt.Errorf("running the simulator: %w\n%s", err, out)
			}
			simulation = out
		}
		value, err := said(simulation, name)
		if err != nil {
			return nil, err
		}
		return []report.Run{{Value: value}}, nil
	}
}
