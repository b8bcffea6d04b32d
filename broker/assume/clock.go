package assume

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// maxSkew is the skew above which the clock is reported. It is a tenth of the five minutes at which AWS starts to refuse
	// signatures, and three percent of the shortest session.
	maxSkew = 30 * time.Second
	// goodSkew is the skew below which the clock counts as correct again. It is lower than maxSkew, because the skew is
	// measured in seconds: a clock at the limit would be reported with every response.
	goodSkew = 20 * time.Second
	// maxExchange is the maximum duration of an exchange that updates the skew. STS dates a response when it sends it. A delay
	// in the network would count as skew.
	maxExchange = 5 * time.Second
)

// clock compares our clock with AWS's.
type clock struct {
	log *slog.Logger

	mu    sync.Mutex
	skew  time.Duration // AWS's clock less ours
	known bool
	wrong bool // the skew was reported, and the clock is not correct again
}

// update computes the skew from a response with AWS's date, which has whole seconds.
func (c *clock) update(ctx context.Context, date, began, ended time.Time) {
	if ended.Sub(began) > maxExchange {
		return
	}
	skew := date.Add(time.Second / 2).Sub(ended).Round(time.Second) // The header Date is truncated, not rounded.
	c.mu.Lock()
	defer c.mu.Unlock()
	c.skew, c.known = skew, true
	switch off := skew.Abs(); {
	case !c.wrong && off > maxSkew:
		c.wrong = true
		c.log.WarnContext(ctx, "Detected clock skew against AWS, set the node's clock with NTP or chrony", "aws_is_ahead_by", skew)
	case c.wrong && off < goodSkew:
		c.wrong = false
		c.log.InfoContext(ctx, "Clock skew against AWS ended", "aws_is_ahead_by", skew)
	}
}

// read returns how far AWS's clock is ahead of ours. known is false before the first response.
func (c *clock) read() (time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.skew, c.known
}

// local returns the time of our clock at a time that AWS stated. It ignores a skew up to maxSkew, which may be an error of
// measurement.
func (c *clock) local(stated time.Time) time.Time {
	if skew, _ := c.read(); skew.Abs() > maxSkew {
		return stated.Add(-skew)
	}
	return stated
}
