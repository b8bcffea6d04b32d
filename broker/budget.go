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
	// tight is the part of its rate that a broker's renewals may take before somebody is told. What is left serves new
	// pods, the loss of another broker, and what STS has to be asked again.
	tight = 0.8
	// budgetLook is how often the budget is looked at, and budgetLooks how many looks in a row must find it tight: a
	// rolling update is no news.
	budgetLook, budgetLooks = 30 * time.Second, 4
	// budgetAgain is how often it is said while nothing changes: an API server keeps an Event for an hour, and for as
	// long the same one is not written again.
	budgetAgain = time.Hour + budgetLook
)

// BudgetConfig configures [NewBudget].
type BudgetConfig struct {
	// Stats says what the cache needs and may. Required.
	Stats func() cache.Stats
	// Tell is told, in a sentence, when the rate of STS calls is about to be too low. It must not block. Required.
	Tell func(note string)
	// Logger is told that too, and when it is over. Required.
	Logger *slog.Logger
}

// Budget says early that there will be more to renew than may be asked of STS. While that is not mended, sessions
// are renewed late; those that expire first come first.
type Budget struct{ cfg BudgetConfig }

// NewBudget checks cfg.
func NewBudget(cfg BudgetConfig) (*Budget, error) {
	if cfg.Stats == nil || cfg.Tell == nil || cfg.Logger == nil {
		return nil, errors.New("a budget needs Stats, Tell and a Logger")
	}
	return &Budget{cfg}, nil
}

// Run looks until ctx ends.
func (b *Budget) Run(ctx context.Context) error {
	ticker := time.NewTicker(budgetLook)
	defer ticker.Stop()
	var told time.Time
	for found := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		s := b.cfg.Stats()
		was := found >= budgetLooks
		if s.Demand > tight*s.Share {
			found++
		} else {
			found = 0
		}
		switch is := found >= budgetLooks; {
		case is && (!was || time.Since(told) >= budgetAgain):
			told = time.Now()
			b.cfg.Logger.WarnContext(ctx, "The rate of STS calls is hardly enough to renew the sessions that this broker keeps",
				"sessions", s.Active, "needed", s.Demand, "allowed", s.Share)
			b.cfg.Tell(fmt.Sprintf("Renewing the %d sessions that this broker keeps takes %.1f calls of STS per second, and it may make %.1f: "+
				"raise --sts-rate if AWS allows more, or let pods share sessions by a wider session-scope", s.Active, s.Demand, s.Share))
		case was && !is:
			b.cfg.Logger.InfoContext(ctx, "The rate of STS calls suffices again", "needed", s.Demand, "allowed", s.Share)
		}
	}
}
