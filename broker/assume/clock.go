package assume

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// maxSkew is how far our clock may be from AWS's before it is reported: a tenth of the five
	// minutes at which AWS begins to refuse signatures, and three per cent of the shortest session.
	maxSkew = 30 * time.Second
	// goodSkew is how near it must come to count as right again. It is less, so that a clock on the
	// edge, measured to within seconds, is not reported with every answer.
	goodSkew = 20 * time.Second
	// maxExchange is the longest exchange that tells the time. An answer is dated when it begins to be
	// sent, but one that took long may have waited on its way, and the wait would count as skew.
	maxExchange = 5 * time.Second
)

// clock compares our clock with AWS's.
type clock struct {
	log *slog.Logger

	mu    sync.Mutex
	skew  time.Duration // AWS's clock less ours
	known bool
	wrong bool // was reported, and is not right again
}

// saw learns from an answer that AWS dated, to the second, shortly before we had it.
func (c *clock) saw(ctx context.Context, date, began, ended time.Time) {
	if ended.Sub(began) > maxExchange {
		return
	}
	skew := date.Add(time.Second / 2).Sub(ended).Round(time.Second) // Date is cut, not rounded
	c.mu.Lock()
	defer c.mu.Unlock()
	c.skew, c.known = skew, true
	switch off := skew.Abs(); {
	case !c.wrong && off > maxSkew:
		c.wrong = true
		c.log.WarnContext(ctx, "This machine's clock differs from AWS's: set it, with NTP or chrony on the node", "aws_is_ahead_by", skew)
	case c.wrong && off < goodSkew:
		c.wrong = false
		c.log.InfoContext(ctx, "This machine's clock agrees with AWS's again", "aws_is_ahead_by", skew)
	}
}

// read returns how far AWS's clock is ahead of ours, and whether that is known.
func (c *clock) read() (time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.skew, c.known
}

// local returns when our clock will show a time that AWS stated. A difference too small to be
// reported is one of measurement, and is left.
func (c *clock) local(stated time.Time) time.Time {
	if skew, _ := c.read(); skew.Abs() > maxSkew {
		return stated.Add(-skew)
	}
	return stated
}
