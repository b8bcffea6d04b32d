package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/credence-iam/credence/broker/cache"
)

const (
	// maxDemand is the part of its rate share that a broker's renewals may need without a report. The rest is for new pods, for
	// the loss of another broker, and for retries.
	maxDemand = 0.8
	// budgetInterval is the time between two checks, and budgetChecks how many checks in a row must find the demand too
	// high before it is reported. During a rolling update, a high demand is normal.
	budgetInterval, budgetChecks = 30 * time.Second, 4
	// budgetRepeat is how often a lasting problem is reported again: an API server keeps an Event for an hour, and package
	// kube does not write an equal one during that time.
	budgetRepeat = time.Hour + budgetInterval
)

// BudgetConfig configures [NewBudget].
type BudgetConfig struct {
	// Stats returns the demand of the cache and its rate share. Required.
	Stats func() cache.Stats
	// Report reports, in a sentence, that the rate of STS calls is nearly too low. It must not block. Required.
	Report func(note string)
	// Logger receives the same, and when the rate is sufficient again. Required.
	Logger *slog.Logger
}

// Budget reports early that renewals need more STS calls than the broker may make. Until a cluster admin raises the rate, the
// broker renews sessions late, in the order of their expirations.
type Budget struct{ cfg BudgetConfig }

// NewBudget checks cfg.
func NewBudget(cfg BudgetConfig) (*Budget, error) {
	if cfg.Stats == nil || cfg.Report == nil || cfg.Logger == nil {
		return nil, errors.New("a budget needs Stats, Report and a Logger")
	}
	return &Budget{cfg}, nil
}

// Run checks the demand until ctx ends.
func (b *Budget) Run(ctx context.Context) error {
	ticker := time.NewTicker(budgetInterval)
	defer ticker.Stop()
	var reported time.Time
	for found := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		s := b.cfg.Stats()
		before := found >= budgetChecks
		if s.Demand > maxDemand*s.Share {
			found++
		} else {
			found = 0
		}
		switch now := found >= budgetChecks; {
		case now && (!before || time.Since(reported) >= budgetRepeat):
			reported = time.Now()
			b.cfg.Logger.WarnContext(ctx, "Found the rate of STS calls nearly too low to renew this broker's sessions",
				"sessions", s.Active, "needed", s.Demand, "allowed", s.Share)
			b.cfg.Report(fmt.Sprintf("To renew its %d sessions, this broker needs %.1f STS calls per second, and it may make %.1f. "+
				"Raise --sts-rate if AWS allows more, or let pods share sessions by a wider session-scope", s.Active, s.Demand, s.Share))
		case before && !now:
			b.cfg.Logger.InfoContext(ctx, "Found the rate of STS calls sufficient again", "needed", s.Demand, "allowed", s.Share)
		}
	}
}
