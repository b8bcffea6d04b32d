package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/credence-iam/credence/broker/cache/schedule"
	"github.com/credence-iam/credence/broker/credential"
)

// Waits between failed fetches of one key: the minimum, doubled after each failure and jittered, up to the maximum.
const (
	// A source that is unavailable is called again soon at first, so that its return is noticed.
	minUnavailableWait, maxUnavailableWait = 200 * time.Millisecond, 30 * time.Second
	// A user must fix a refusal, and IAM itself takes seconds to minutes to apply a change.
	minRefusedWait, maxRefusedWait = 10 * time.Second, 60 * time.Second
)

// failureMemory is how long a failure of a key that is not active stays cached after its wait. The next failure then counts
// as one more in a row and has a longer wait.
const failureMemory = maxRefusedWait

// maxSleep bounds how long Run sleeps. Timers stop while a machine is suspended, and sessions expire meanwhile.
const maxSleep = time.Minute

// Run fetches and renews sessions until ctx ends. Then it cancels the fetches in flight and waits for them. Callers that
// wait for a fetch get an error that the broker is shutting down.
func (c *Cache[K]) Run(ctx context.Context) error {
	var fetches sync.WaitGroup
	defer c.stop(&fetches)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		c.mu.Lock()
		next := c.advance(ctx, &fetches)
		c.mu.Unlock()
		timer.Reset(next)
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-timer.C:
		}
	}
}

// advance queues what is due, begins the fetches that may begin, and returns when to call it again.
func (c *Cache[K]) advance(ctx context.Context, fetches *sync.WaitGroup) time.Duration {
	now := time.Now()
	for i := c.schedule.Due(now); i != nil; i = c.schedule.Due(now) {
		if e := i.Value; e.refs > 0 {
			c.ensureFetch(e, e.retainer())
		} else {
			c.reschedule(e, now)
		}
	}
	for i := c.schedule.Begin(now); i != nil; i = c.schedule.Begin(now) {
		e := i.Value
		c.counts.began(e.fetch.hasWaiters(), e.session.Valid(now))
		origin := e.fetch.origin
		fetches.Go(func() { c.fetch(ctx, origin, e) })
	}
	return min(c.schedule.Wait(now), maxSleep)
}

// fetch runs one fetch and shares its result. It ends with ctx, the cache's own context. From origin, the first caller's
// context, it takes the values only.
func (c *Cache[K]) fetch(ctx, origin context.Context, e *entry[K]) {
	fetchCtx := ctx
	if origin != nil {
		var stop context.CancelFunc
		fetchCtx, stop = context.WithCancel(origin)
		defer stop()
		defer context.AfterFunc(ctx, stop)()
	}
	fetchCtx, cancel := context.WithTimeout(fetchCtx, c.cfg.FetchTimeout)
	defer cancel()
	session, err := c.callSource(fetchCtx, e.key)
	now := time.Now()
	if err == nil && !session.Valid(now) {
		err = credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable,
			"new session has already expired; check the broker's clock")
	}
	if err != nil && ctx.Err() != nil {
		err = errShuttingDown()
	}

	c.mu.Lock()
	f := e.fetch
	c.schedule.Finish(now, outcomeOf(err), e.failures > 0)
	if f.outdated && ctx.Err() == nil {
		f.outdated = false
		c.schedule.Requeue(e.item)
		c.mu.Unlock()
		c.wakeRun()
		return
	}
	e.fetch = nil
	if err == nil {
		c.counts.fetched++
		e.session, e.failure, e.failures, e.notBefore = session, nil, 0, time.Time{}
	} else {
		c.counts.failed++
		e.failures++
		e.failure, e.notBefore = err, now.Add(failureWait(err, e.failures))
	}
	f.err = err
	c.reschedule(e, now)
	current, waiters, retry := e.session, f.waiters, e.notBefore.Sub(now)
	c.mu.Unlock()

	close(f.done)
	c.wakeRun()
	if err != nil && ctx.Err() == nil {
		c.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "Could not fetch session",
			slog.String("key", fmt.Sprint(e.key)), slog.String("reason", string(credential.ReasonOf(err))), slog.Any("error", err),
			slog.Int("waiters", waiters), slog.Duration("retry_in", retry), slog.Duration("still_valid_for", max(current.Remaining(now), 0)))
	}
}

// callSource calls the source. A panic in it fails this fetch, and does not end the program.
func (c *Cache[K]) callSource(ctx context.Context, key K) (session credential.Credential, err error) {
	defer func() {
		if p := recover(); p != nil {
			session, err = credential.Credential{}, fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return c.cfg.Source.Credential(ctx, key)
}

// stop waits for the fetches in flight, and fails those that have not begun.
func (c *Cache[K]) stop(fetches *sync.WaitGroup) {
	fetches.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	for _, e := range c.entries {
		if f := e.fetch; f != nil {
			c.schedule.Dequeue(e.item)
			e.fetch = nil
			f.err = errShuttingDown()
			close(f.done)
		}
	}
}

func errShuttingDown() error {
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonShuttingDown, "the broker is shutting down; call another one")
}

// outcomeOf says what the result of a fetch means for the rate.
func outcomeOf(err error) schedule.Outcome {
	switch {
	case credential.ReasonOf(err) == credential.ReasonSTSThrottled:
		return schedule.Throttled
	case errors.Is(err, credential.ErrUnavailable):
		return schedule.Unavailable
	}
	return schedule.Responded
}

// refused reports whether a user must fix the cause of a failure.
func refused(err error) bool {
	return errors.Is(err, credential.ErrDenied) || errors.Is(err, credential.ErrInvalid)
}

// failureWait returns how long to wait after the nth failure of a key in a row. It is never less than the
// RetryAfter of the failure.
func failureWait(err error, n int) time.Duration {
	shortest, longest := minUnavailableWait, maxUnavailableWait
	if refused(err) {
		shortest, longest = minRefusedWait, maxRefusedWait
	}
	if e, ok := errors.AsType[*credential.Error](err); ok {
		shortest = min(max(shortest, e.RetryAfter), longest)
	}
	wait := longest
	if n < 16 { // A greater shift exceeds every maximum above.
		wait = min(shortest<<n, longest)
	}
	// Half is random, so that keys that failed together are not fetched together.
	return max(randomPart(wait, 0.5, 1), shortest)
}

// withRetryAfter returns a copy of err with the time until the next fetch.
func withRetryAfter(err error, wait time.Duration) error {
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		return err
	}
	again := *e
	again.RetryAfter = wait
	return &again
}
