package broker_test

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/cache"
)

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var now cache.Stats   // guarded by mu
		var reported []string // guarded by mu
		var log strings.Builder
		budget, err := broker.NewBudget(broker.BudgetConfig{
			Stats: func() cache.Stats {
				mu.Lock()
				defer mu.Unlock()
				return now
			},
			Report: func(note string) {
				mu.Lock()
				defer mu.Unlock()
				reported = append(reported, note)
			},
			Logger: slog.New(slog.NewTextHandler(&log, nil)),
		})
		fatal(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- budget.Run(ctx) }()
		for i, step := range []struct {
			demand, share float64
			lasts         time.Duration
			reported      int
		}{
			{79, 100, time.Hour, 0},
			{81, 100, time.Minute, 0}, // a rolling update of brokers
			{50, 100, time.Minute, 0},
			{81, 100, 3 * time.Minute, 1},
			{90, 100, 55 * time.Minute, 1}, // reported already
			{90, 100, 6 * time.Minute, 2},  // Kubernetes has dropped the Event
			{50, 100, time.Minute, 2},
			{50, 40, 3 * time.Minute, 3},
		} {
			mu.Lock()
			now = cache.Stats{Active: 7, Demand: step.demand, Share: step.share}
			mu.Unlock()
			time.Sleep(step.lasts)
			synctest.Wait()
			mu.Lock()
			if len(reported) != step.reported {
				t.Errorf("step %d: reported %q, want %d", i, reported, step.reported)
			}
			mu.Unlock()
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if !strings.Contains(reported[0], "7 sessions") || !strings.Contains(reported[0], "81.0 STS calls") || !strings.Contains(reported[0], "may make 100.0") {
			t.Errorf("reported %q", reported[0])
		}
		if n := strings.Count(log.String(), "sufficient again"); n != 1 {
			t.Errorf("the demand fell once, and the log says so %d times:\n%s", n, log.String())
		}
	})
}
