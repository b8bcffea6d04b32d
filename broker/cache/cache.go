// Package cache keeps AWS sessions fresh. It holds one session per key, shares each fetch among all callers, renews
// sessions well before they expire, and serves each until it expires.
//
// It guarantees: no fetch runs on a caller's context, so a caller that gives up does not affect others; a failed renewal
// never discards a valid session; no active key is dropped, however many are due at once; no tenant is served first
// because it requests more. It does not interpret keys or tenants, and does not authorize.
//
// This package is the store: entries, in-flight fetches and what callers get. Package schedule decides which fetch
// begins when.
package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/cache/schedule"
	"github.com/credence-iam/credence/broker/credential"
)

// When a caller should return, as fractions of the session duration that are then left. That is after the renewal, at
// [schedule.RenewLow] at the latest, so that the caller gets the new session. And it is early enough that a caller never
// serves a session with less than 0.45 left: 27 minutes of the default hour, more than the 25 minutes below which
// botocore distrusts instance metadata.
const refreshLow, refreshHigh = 0.45, schedule.RenewLow

// Bounds of Value.RefreshAfter. Below the minimum, a broken clock would turn callers into a burst. Above the maximum,
// the caller of a 12 h session would notice a revocation half a day late.
const (
	minRefreshAfter = 30 * time.Second
	maxRefreshAfter = time.Hour
)

// How long a caller waits for the renewal of a session with less than half of its duration left, before it gets that
// session.
const (
	// activeWait is for active keys. Their renewal is overdue for a reason that a caller does not wait out: it has a
	// valid session itself. It is below the 250 ms after which clients call a second broker, which would double the calls
	// while STS throttles.
	activeWait = 200 * time.Millisecond
	// inactiveWait is for other keys, which are renewed only on request. The client gives a call 10 s and calls a second
	// broker meanwhile. Half of that leaves time for the response.
	inactiveWait = 5 * time.Second
)

// Config configures [New].
type Config[K comparable] struct {
	// Source fetches sessions. Required.
	Source credential.Source[K]
	// Concurrency is the maximum number of fetches that run at a time, and of those that begin in a burst after a quiet
	// time. Default 64. The burst is shared as Rate is; the number of running fetches is not.
	Concurrency int
	// Rate is the maximum number of fetches per second of all caches that share it, see ShareRate. At first this cache
	// has it alone. Default [DefaultRate]. While the source throttles or is unavailable, fewer fetches begin. rate.Inf
	// removes all limits on the rate.
	Rate rate.Limit
	// MaxPerTenant is the maximum number of distinct keys per tenant, so that none can use up the memory and the rate of
	// all. Default: no maximum.
	MaxPerTenant int
	// FetchTimeout is the maximum duration of one fetch, whatever its callers' deadlines. Default 30 s.
	FetchTimeout time.Duration
	// Logger receives a line for each failed fetch. Required.
	Logger *slog.Logger
}

// DefaultRate is the default maximum of fetches per second. AWS is reported to accept 600 STS calls per second, account
// and region, and others use it too.
const DefaultRate = 400

// ErrTenantFull refuses a key to a tenant that has Config.MaxPerTenant keys.
var ErrTenantFull = errors.New("the tenant has its maximum number of keys")

// Cache holds sessions by key. It fetches nothing until Run is called. Its methods are safe for concurrent use.
//
// Each request for a key names a tenant. Queues are fair between tenants.
type Cache[K comparable] struct {
	cfg  Config[K]
	wake chan struct{} // makes Run look for work; holds one

	mu       sync.Mutex // guards the fields below, and those of every entry
	entries  map[K]*entry[K]
	tenants  map[string]tenantKeys // by tenant; none without keys
	schedule *schedule.Schedule[*entry[K]]
	counts   counts
	stopped  bool
}

// Value is what a caller of Get receives.
type Value struct {
	credential.Credential
	// RefreshAfter is how long the caller should wait before it calls Get again.
	RefreshAfter time.Duration
	// Failure is why the session could not be renewed so far; nil if no renewal failed.
	Failure error
}

// New checks cfg and returns an empty cache.
func New[K comparable](cfg Config[K]) (*Cache[K], error) {
	if cfg.Source == nil || cfg.Logger == nil {
		return nil, errors.New("a cache needs a Source and a Logger")
	}
	if cfg.Concurrency == 0 {
		cfg.Concurrency = 64
	}
	if cfg.Rate == 0 {
		cfg.Rate = DefaultRate
	}
	if cfg.FetchTimeout == 0 {
		cfg.FetchTimeout = 30 * time.Second
	}
	if cfg.Concurrency < 0 || cfg.Rate < 0 || cfg.FetchTimeout < 0 || cfg.MaxPerTenant < 0 {
		return nil, fmt.Errorf("limits of a cache must not be negative: concurrency %d, rate %v, fetch timeout %s, keys per tenant %d",
			cfg.Concurrency, cfg.Rate, cfg.FetchTimeout, cfg.MaxPerTenant)
	}
	perSecond := float64(cfg.Rate)
	if cfg.Rate == rate.Inf {
		perSecond = schedule.Unlimited
	}
	return &Cache[K]{
		cfg:      cfg,
		wake:     make(chan struct{}, 1),
		entries:  make(map[K]*entry[K]),
		tenants:  make(map[string]tenantKeys),
		schedule: schedule.New[*entry[K]](perSecond, cfg.Concurrency),
	}, nil
}

// Get returns the session of key. It fetches the session if none is cached, and renews it if less than half of its
// duration is left, because a caller that returns after RefreshAfter should get the next one. If the renewal fails or
// takes long, Get returns the current session.
//
// Get waits for a fetch until ctx ends. A fetch that has begun continues without its callers. One that has not begun is
// dropped with its last caller, unless the key is active. The error is [ErrTenantFull], the source's own, or
// credential.ErrUnavailable if ctx ended first or the cache has stopped.
//
// A fetch keeps the values of the first caller's context, but not its deadline or cancellation.
func (c *Cache[K]) Get(ctx context.Context, key K, tenant string) (Value, error) {
	c.mu.Lock()
	now := time.Now()
	if c.stopped {
		c.mu.Unlock()
		return Value{}, errShuttingDown()
	}
	e, err := c.entry(key, tenant)
	if err != nil {
		c.mu.Unlock()
		return Value{}, err
	}
	valid := e.session.Valid(now)
	switch {
	case valid && fractionLeft(e.session, now) >= refreshHigh:
		c.counts.hits++
		defer c.mu.Unlock()
		return valueOf(e.session, now), nil
	case valid && now.Before(e.notBefore):
		c.counts.stale++
		defer c.mu.Unlock()
		v := valueOf(e.session, now)
		v.Failure = e.failure
		return v, nil
	case !valid && now.Before(e.notBefore):
		c.counts.misses++
		defer c.mu.Unlock()
		return Value{}, withRetryAfter(e.failure, e.notBefore.Sub(now))
	}
	wait := activeWait
	if e.refs == 0 {
		wait = inactiveWait
	}
	f := c.ensureFetch(e, tenant)
	if f.origin == nil {
		f.origin = context.WithoutCancel(ctx)
	}
	if valid {
		c.counts.stale++
	} else {
		c.counts.misses++
	}
	c.join(e, f, tenant, !valid)
	c.mu.Unlock()
	c.wakeRun()

	var enough <-chan time.Time // never, without a session
	if valid {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		enough = timer.C
	}
	select {
	case <-f.done:
	case <-enough:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leave(e, f, !valid)
	now = time.Now()
	done := false
	select {
	case <-f.done:
		done = true
	default:
	}
	// The session may have been dropped meanwhile.
	switch {
	case e.session.Valid(now):
		v := valueOf(e.session, now)
		if done {
			v.Failure = f.err
		}
		return v, nil
	case done && f.err != nil:
		return Value{}, f.err
	}
	return Value{}, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSUnavailable, Cause: context.Cause(ctx),
		Message: "the session is still being fetched; try again",
	}
}

// Retain makes key active: its session is fetched before the first Get, and renewed until Release has been called as
// often. The only error is [ErrTenantFull]; there is nothing to release then.
func (c *Cache[K]) Retain(key K, tenant string) error {
	c.mu.Lock()
	e, err := c.entry(key, tenant)
	if err != nil {
		c.mu.Unlock()
		return err
	}
	c.addRef(e, tenant, +1)
	if e.refs == 1 {
		c.reschedule(e, time.Now())
	}
	c.mu.Unlock()
	c.wakeRun()
	return nil
}

// Release undoes one Retain of the same key and tenant. A key that is not active is renewed only on request. Its session
// is served until it expires, and then removed.
func (c *Cache[K]) Release(key K, tenant string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok {
		return
	}
	if i := e.usageOf(tenant); i < 0 || e.usages[i].refs == 0 {
		return
	}
	c.addRef(e, tenant, -1)
	if e.refs == 0 {
		c.dropUnneeded(e)
		c.reschedule(e, time.Now())
	}
}

// ShareRate makes this cache one of n that share Config.Rate and its burst equally. Less than 1 counts as 1. It may be
// called at any time, and is cheap if n has not changed.
func (c *Cache[K]) ShareRate(n int) {
	c.mu.Lock()
	changed := c.schedule.ShareRate(time.Now(), n)
	c.mu.Unlock()
	if changed {
		c.wakeRun() // The next fetch may begin earlier.
	}
}

// wakeRun makes Run look for work.
func (c *Cache[K]) wakeRun() {
	select {
	case c.wake <- struct{}{}:
	default: // Run has not looked since the last call, and will find this work too.
	}
}

// valueOf returns what a caller receives with session.
func valueOf(session credential.Credential, now time.Time) Value {
	after := session.Remaining(now) - randomPart(session.Duration(), refreshLow, refreshHigh)
	return Value{Credential: session, RefreshAfter: min(max(after, minRefreshAfter), maxRefreshAfter)}
}

// fractionLeft returns the fraction of the session duration that is left.
func fractionLeft(session credential.Credential, now time.Time) float64 {
	return float64(session.Remaining(now)) / float64(session.Duration())
}

// randomPart returns a random part of d between the fractions low and high.
func randomPart(d time.Duration, low, high float64) time.Duration {
	return time.Duration(float64(d) * (low + (high-low)*rand.Float64())) //nolint:gosec // It spreads load and protects no secret.
}
