//go:build unix

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"

	"github.com/credence-iam/credence/integration/bench/report"
)

// siegeMetrics are what attackers without a token can do to pods that have one.
var siegeMetrics = []metric{{
	Metric: report.Metric{
		Name: "broker_besieged_p99_ms", Unit: "ms",
		Goal: &report.Goal{Of: report.Value, Op: "<=", Value: 1000},
	},
	about: "The latency that one in a hundred calls of a pod exceeds, while attackers hold as many connections to its broker as they can\n" +
		"\tfrom four other addresses: the largest of all attacks of integration/siege, of which each lasts " + siegeLength + ".",
	measure: func(ctx context.Context, b *bench) ([]report.Run, error) {
		test := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-timeout=20m", "-run=^TestConnectionsToTheBroker$", "./integration/siege")
		test.Dir, test.Stderr = b.root, os.Stderr
		test.Env = append(os.Environ(), "CREDENCE_SIEGE="+siegeLength)
		out, err := test.Output()
		if err != nil {
			return nil, fmt.Errorf("running the siege: %w\n%s", err, out)
		}
		value, err := said(out, "broker_besieged_p99_ms")
		if err != nil {
			return nil, err
		}
		return []report.Run{{Value: value}}, nil
	},
}}

const siegeLength = "15s"
