//go:build unix

package main

import (
	"context"
	"time"

	"github.com/credence-iam/credence/integration/bench/report"
)

// side is one of the two that a paired metric compares. It measures as often as it can in the time
// that it is given, and at least once.
type side func(ctx context.Context, length time.Duration) ([]float64, error)

// slice is how long one side measures until it is the other's turn: short, so that whatever else
// this machine does disturbs both alike.
const slice = 100 * time.Millisecond

// paired measures a beside b, in all runs.
func (b *bench) paired(ctx context.Context, ours, bare side) ([]report.Run, error) {
	var runs []report.Run
	for i := range b.runs {
		run, err := b.pair(ctx, i, ours, bare)
		if err != nil {
			return nil, err
		}
		runs = append(runs, run)
	}
	return runs, nil
}

// pair is one run, the i-th. Its figures are the medians of what each side measured in it. Which side
// begins changes, so that neither always profits from what the other has warmed. The first turn of
// both warms up, and does not count.
func (b *bench) pair(ctx context.Context, i int, ours, bare side) (report.Run, error) {
	var measured [2][]float64
	for turn := range 1 + max(1, int(b.duration/slice)) {
		for n := range 2 {
			which := (n + turn + i) % 2
			xs, err := []side{ours, bare}[which](ctx, slice)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return report.Run{}, err
			}
			if turn > 0 {
				measured[which] = append(measured[which], xs...)
			}
		}
	}
	return report.Run{Value: report.Median(measured[0]), Baseline: new(report.Median(measured[1]))}, nil
}

// timed measures what once returns, again and again. It makes a side.
func timed(once func(context.Context) (time.Duration, error), unit time.Duration) side {
	return func(ctx context.Context, length time.Duration) ([]float64, error) {
		var xs []float64
		for end := time.Now().Add(length); len(xs) == 0 || time.Now().Before(end); {
			took, err := once(ctx)
			if err != nil {
				return nil, err
			}
			xs = append(xs, float64(took)/float64(unit))
		}
		return xs, nil
	}
}
