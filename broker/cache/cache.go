// Package cache keeps credentials fresh: one session per key, fetched once however many ask, renewed
// well before anybody needs the next one, and served until it really expires.
//
// What it promises: callers never run the fetch on their own context, so one who leaves takes
// nothing from the others; a session that is still valid is never dropped because its renewal
// failed; no key that is kept is ever forgotten, however many fall due together; and of those who
// wait, no class is served before the others because it asks for more. It does not know what a key
// or a class means, and it does not decide who may have what.
package cache

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/credence-iam/credence/broker/credential"
)

// Renewal, as fractions of a session's life L. A session is renewed when what remains falls to
// somewhere between renewLow and renewHigh, spread so that sessions made together are not renewed
// together; earlier where too many would be (see renewals), and never later. Its holders are told to
// come back when between askLow and askHigh remain: after the
// renewal, so that they meet the new session, and early enough that what they serve never falls
// under 0.45 L, which is 27 minutes of the default hour and more than the 25 minutes below which
// botocore distrusts instance metadata.
const (
	renewLow, renewHigh = 0.50, 0.60
	askLow, askHigh     = 0.45, 0.50
)

// Bounds of RefreshAfter: less would let a broken clock turn holders into a storm, more would leave
// a holder of a 12 h session blind to a revocation for half a day.
const (
	minRefreshAfter = 30 * time.Second
	maxRefreshAfter = time.Hour
)

// Waits between failed fetches of one key: from the least, doubled each time and jittered, to the most.
const (
	// A dependency that is away is asked again soon at first: its recovery should not go unseen.
	minAwayWait, maxAwayWait = 200 * time.Millisecond, 30 * time.Second
	// A refusal is for a person to mend; IAM itself takes seconds to minutes to spread a change.
	minRefusedWait, maxRefusedWait = 10 * time.Second, 60 * time.Second
)

// failureMemory is how long a key that nobody keeps is remembered after its wait, so that the next
// failure counts as one more in a row and is followed by a longer wait.
const failureMemory = maxRefusedWait

// How long a caller waits for the renewal of a session that is past half of its life, before it is given the
// old one.
const (
	// staleWait is for keys that are kept. Their renewal is behind schedule for a reason, which a caller does
	// not wait out; it holds a valid session itself and is in no hurry. It is below the 250 ms after which clients ask
	// another broker as well, which would be twice the calls while STS throttles.
	staleWait = 200 * time.Millisecond
	// renewWait is for keys that nobody keeps, which are renewed when they are asked for and not before. The client
	// gives a call 10 s and asks another broker meanwhile, so half of that leaves time for the answer.
	renewWait = 5 * time.Second
)

// Config configures [New].
type Config[K comparable] struct {
	// Source fetches what the cache does not hold. Required.
	Source credential.Source[K]
	// Concurrency bounds the fetches that run at once, and those that may begin in a burst after a quiet time.
	// Default 64. The burst is shared as Rate is; the bound on what runs is each cache's own.
	Concurrency int
	// Rate bounds the fetches begun per second by all caches that share it, as ShareRate says; at first
	// this is the only one. Default [DefaultRate]. While the source says that it is throttled, or is away, fewer
	// begin. rate.Inf lifts all of that.
	Rate rate.Limit
	// MaxPerTenant bounds the distinct keys that one class has at a time, so that none can use up the
	// memory and the rate of all. Default: no bound.
	MaxPerTenant int
	// FetchTimeout bounds one fetch, whoever waits for it. Default 30 s.
	FetchTimeout time.Duration
	// Logger receives a line for each failed fetch. Required.
	Logger *slog.Logger
}

// DefaultRate is how many fetches begin per second. AWS is reported to take 600 calls of STS per second, account
// and region, and is used by others too.
const DefaultRate = 400

// ErrTenantFull refuses a key to a class that has as many as it may.
var ErrTenantFull = errors.New("the class has as many keys as it may")

// Cache is a cache of credentials by key. It fetches nothing until Run is called. Its methods are
// safe for concurrent use.
//
// Whoever asks for a key does so for a class, such as a tenant: queues are fair between classes.
type Cache[K comparable] struct {
	cfg  Config[K]
	wake chan struct{} // tells Run that there is something new to do; holds one

	mu       sync.Mutex // guards what follows, and the fields of every entry
	entries  map[K]*entry[K]
	perClass map[string]int // :: class → how many entries it has
	idle     map[string]int // :: class → how many of them it does not keep
	due      dueHeap[K]     // entries by the time they need attention
	queue    queue[K]       // entries whose fetch has not begun
	renewals renewals       // when sessions are renewed
	pace     pace
	running  int // fetches that have begun and not ended
	counts   counts
	stopped  bool
}

// entry is what is known of one key.
type entry[K comparable] struct {
	key     K
	classes []usage // who has asked for it; one, as a rule
	kept    int     // how many Keep calls have not been released

	held      credential.Credential // zero until the first fetch succeeded
	failure   error                 // of the last fetch; nil after a success
	failures  int                   // in a row
	notBefore time.Time             // after a failure: no fetch begins earlier

	flight *flight // the fetch under way or queued; nil when there is none

	dueAt    time.Time
	dueIndex int // in Cache.due; -1 when not there
	queued   int // index in Cache.queue; -1 when not there
	renewal  renewal
}

// usage is what one class has of an entry.
type usage struct {
	class string
	kept  int // of entry.kept
}

// flight is one fetch and those who wait for it. All but done is guarded by Cache.mu until done is
// closed.
type flight struct {
	done     chan struct{}   // closed when cred and err are final
	origin   context.Context // of who asked first, for its values; nil when nobody has asked
	callers  int             // who wait for it
	waiters  int             // those of them who have nothing to go on with
	turns    [kinds]turn     // its places among those of each kind; zero: none yet
	outdated bool            // what is being fetched is not wanted any more: fetch again
	cred     credential.Credential
	err      error
}

func (f *flight) waitedFor() bool { return f.waiters > 0 }

// Value is the answer to a caller.
type Value struct {
	credential.Credential
	// RefreshAfter is how long the caller should wait before asking again.
	RefreshAfter time.Duration
	// Failure is why the session could not be renewed so far; nil when that has not failed.
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
		return nil, fmt.Errorf("cache bounds must not be negative: concurrency %d, rate %v, fetch timeout %s, keys of a class %d",
			cfg.Concurrency, cfg.Rate, cfg.FetchTimeout, cfg.MaxPerTenant)
	}
	return &Cache[K]{
		cfg:      cfg,
		wake:     make(chan struct{}, 1),
		entries:  make(map[K]*entry[K]),
		perClass: make(map[string]int),
		idle:     make(map[string]int),
		renewals: newRenewals(),
		pace:     newPace(cfg.Rate, cfg.Concurrency),
	}, nil
}

// Get returns the credential of key, fetching it when none is held, and when that is past half of its
// life: who is told to come back then is to meet the next one. The old one is the answer where its renewal
// fails or takes long. Get waits for a fetch no longer than ctx, and a fetch that has begun goes on without it; one that
// has not is given up with its last caller, unless the key is kept. The error is [ErrTenantFull], the
// source's own, or credential.ErrUnavailable when ctx ended first or the cache has stopped.
//
// A fetch runs with the values of the context of who asked first, and without its end.
func (c *Cache[K]) Get(ctx context.Context, key K, class string) (Value, error) {
	c.mu.Lock()
	now := time.Now()
	if c.stopped {
		c.mu.Unlock()
		return Value{}, errShuttingDown()
	}
	e, err := c.entry(key, class)
	if err != nil {
		c.mu.Unlock()
		return Value{}, err
	}
	valid := e.held.Valid(now)
	switch {
	case valid && fraction(e.held, now) >= askHigh:
		c.counts.hits++
		defer c.mu.Unlock()
		return value(e.held, now), nil
	case valid && now.Before(e.notBefore):
		c.counts.stale++
		defer c.mu.Unlock()
		v := value(e.held, now)
		v.Failure = e.failure
		return v, nil
	case !valid && now.Before(e.notBefore):
		c.counts.misses++
		defer c.mu.Unlock()
		return Value{}, retryAt(e.failure, e.notBefore.Sub(now))
	}
	wait := staleWait
	if e.kept == 0 {
		wait = renewWait
	}
	f := c.ask(e, class)
	if f.origin == nil {
		f.origin = context.WithoutCancel(ctx)
	}
	if valid {
		c.counts.stale++
	} else {
		c.counts.misses++
		if f.waiters == 0 && e.queued >= 0 {
			c.queue.begin(e, waiting, class)
		}
	}
	c.wait(e, f, +1, !valid)
	c.mu.Unlock()
	c.poke()

	var patience <-chan time.Time
	if valid {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		patience = timer.C
	}
	select {
	case <-f.done:
	case <-patience:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wait(e, f, -1, !valid)
	now = time.Now()
	select {
	case <-f.done:
		if e.held.Valid(now) { // and has not been dropped since
			v := value(e.held, now)
			v.Failure = f.err
			return v, nil
		}
		if f.err != nil {
			return Value{}, f.err
		}
	default:
	}
	if e.held.Valid(now) { // what is held now: it may have been dropped meanwhile
		return value(e.held, now), nil
	}
	return Value{}, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSUnavailable, Cause: context.Cause(ctx),
		Message: "the credentials are still being fetched; ask again",
	}
}

// wait counts a caller in or out of a flight, and moves the flight in the queue accordingly: out of it when that was the
// last one and nobody keeps the key. Another cache is likely to keep it, and its callers have turned there.
func (c *Cache[K]) wait(e *entry[K], f *flight, n int, empty bool) {
	f.callers += n
	if empty {
		f.waiters += n
	}
	if e.flight == f {
		c.queue.fix(e)
		if c.abandon(e) {
			c.settle(e, time.Now())
		}
	}
}

// abandon takes an entry out of the queue that nobody keeps or waits for. The caller settles it then.
func (c *Cache[K]) abandon(e *entry[K]) (abandoned bool) {
	if e.queued < 0 || e.kept > 0 || e.flight.callers > 0 {
		return false
	}
	c.queue.remove(e)
	e.flight = nil
	return true
}

// Retain says that key is wanted: it is fetched ahead of the first Get and renewed until as many
// Release calls have been made. It fails with [ErrTenantFull] alone; there is nothing to release then.
func (c *Cache[K]) Retain(key K, class string) error {
	c.mu.Lock()
	e, err := c.entry(key, class)
	if err != nil {
		c.mu.Unlock()
		return err
	}
	e.kept++
	u := &e.classes[e.classIndex(class)]
	if u.kept == 0 {
		c.idle[class]--
	}
	u.kept++
	if e.kept == 1 {
		c.settle(e, time.Now())
	}
	c.mu.Unlock()
	c.poke()
	return nil
}

// Release takes back one Keep of the same key and class. A key that nobody keeps is renewed when somebody asks for it,
// and not ahead; its session is served until it expires, and then forgotten.
func (c *Cache[K]) Release(key K, class string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	if !ok {
		return
	}
	i := e.classIndex(class)
	if i < 0 || e.classes[i].kept == 0 {
		return
	}
	e.kept--
	e.classes[i].kept--
	if e.classes[i].kept == 0 {
		c.idle[class]++ // It counts until it is forgotten, or its place is wanted.
	}
	if e.kept > 0 {
		return
	}
	c.abandon(e)
	c.settle(e, time.Now())
}

// ShareRate says that this cache is one of n that share Config.Rate and its burst: it takes one of n equal
// parts. Less than 1 counts as 1. It may be called at any time, and costs next to nothing while n stays.
func (c *Cache[K]) ShareRate(n int) {
	c.mu.Lock()
	changed := c.pace.share(time.Now(), n)
	c.mu.Unlock()
	if changed {
		c.poke() // What Run waits for may come sooner.
	}
}

// Run fetches and renews until ctx ends. Fetches that are under way then are cancelled and waited
// for, and those who wait for them are told that the broker is shutting down.
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

// lookEvery bounds how long Run sleeps. Its timer stands still while a machine is suspended, and
// sessions go on expiring.
const lookEvery = time.Minute

// advance moves what is due into the queue, begins what may begin, and returns how long until it
// should be called again.
func (c *Cache[K]) advance(ctx context.Context, fetches *sync.WaitGroup) time.Duration {
	now := time.Now()
	for len(c.due) > 0 && !c.due[0].dueAt.After(now) {
		e := c.due[0]
		c.unschedule(e)
		if e.kept > 0 {
			c.ask(e, e.keeper())
		} else {
			c.settle(e, now)
		}
	}
	next := lookEvery
	if len(c.due) > 0 {
		next = min(next, c.due[0].dueAt.Sub(now))
	}
	for c.queue.len() > 0 && c.running < c.cfg.Concurrency {
		if wait := c.pace.take(now); wait > 0 {
			return min(next, wait)
		}
		e := c.queue.next()
		c.running++
		c.counts.begun(e.flight.waitedFor(), e.held.Valid(now))
		origin := e.flight.origin
		fetches.Go(func() { c.fetch(ctx, origin, e) })
	}
	return next
}

// fetch runs one fetch and shares its outcome. It ends with the cache's own context: a caller's would
// end with the caller, whose values alone are taken, from origin.
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
	cred, err := c.source(fetchCtx, e.key)
	now := time.Now()
	if err == nil && !cred.Valid(now) {
		err = credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable,
			"the credentials that came had expired already: is the broker's clock right?")
	}
	if err != nil && ctx.Err() != nil {
		err = errShuttingDown()
	}

	c.mu.Lock()
	f := e.flight
	c.running--
	c.pace.ended(now, err, e.failures > 0)
	if f.outdated && ctx.Err() == nil {
		f.outdated = false
		c.queue.push(e)
		c.mu.Unlock()
		c.poke()
		return
	}
	e.flight = nil
	if err == nil {
		c.counts.fetched++
		e.held, e.failure, e.failures, e.notBefore = cred, nil, 0, time.Time{}
	} else {
		c.counts.failed++
		e.failures++
		e.failure, e.notBefore = err, now.Add(failureWait(err, e.failures))
	}
	f.cred, f.err = cred, err
	c.settle(e, now)
	held, waiters, retry := e.held, f.waiters, e.notBefore.Sub(now)
	c.mu.Unlock()

	close(f.done)
	c.poke()
	if err != nil && ctx.Err() == nil {
		c.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "Fetching credentials failed",
			slog.String("key", fmt.Sprint(e.key)), slog.String("reason", string(credential.ReasonOf(err))), slog.Any("error", err),
			slog.Int("waiters", waiters), slog.Duration("retry_in", retry), slog.Duration("still_valid_for", max(held.Remaining(now), 0)))
	}
}

// source asks the source. A panic in it is that fetch's failure, and not the end of the program.
func (c *Cache[K]) source(ctx context.Context, key K) (cred credential.Credential, err error) {
	defer func() {
		if p := recover(); p != nil {
			cred, err = credential.Credential{}, fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return c.cfg.Source.Credential(ctx, key)
}

// stop ends every wait, once Run's context has ended.
func (c *Cache[K]) stop(fetches *sync.WaitGroup) {
	fetches.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	for c.queue.len() > 0 {
		e := c.queue.next()
		f := e.flight
		e.flight = nil
		f.err = errShuttingDown()
		close(f.done)
	}
}

func errShuttingDown() error {
	return credential.Errorf(credential.ErrUnavailable, credential.ReasonShuttingDown, "this broker is shutting down; ask another")
}

// entry returns the entry of key, making it if need be, and notes that class has it. The caller must
// make sure that the entry gets a flight or is settled, so that none is left that nothing ever looks
// at.
func (c *Cache[K]) entry(key K, class string) (*entry[K], error) {
	e, ok := c.entries[key]
	if ok && e.classIndex(class) >= 0 {
		return e, nil
	}
	if c.cfg.MaxPerTenant > 0 && c.perClass[class] >= c.cfg.MaxPerTenant && !c.makeRoom(class) {
		return nil, ErrTenantFull
	}
	if !ok {
		e = &entry[K]{key: key, dueIndex: -1, queued: -1}
		c.entries[key] = e
	}
	e.classes = append(e.classes, usage{class: class})
	c.perClass[class]++
	c.idle[class]++
	return e, nil
}

// makeRoom takes from the class an entry that it does not keep and nobody waits for: the one whose session ends first.
// It reports whether there was one.
func (c *Cache[K]) makeRoom(class string) bool {
	if c.idle[class] == 0 {
		return false
	}
	var victim *entry[K]
	for _, e := range c.entries {
		i := e.classIndex(class)
		if i >= 0 && e.classes[i].kept == 0 && e.flight == nil && (victim == nil || e.held.Expiration.Before(victim.held.Expiration)) {
			victim = e
		}
	}
	if victim == nil {
		return false
	}
	i := victim.classIndex(class)
	c.leave(victim.classes[i])
	if victim.classes = slices.Delete(victim.classes, i, i+1); len(victim.classes) == 0 {
		c.unschedule(victim)
		delete(c.entries, victim.key)
	}
	return true
}

// keeper is a class that keeps the entry; "" when none does.
func (e *entry[K]) keeper() string {
	for _, u := range e.classes {
		if u.kept > 0 {
			return u.class
		}
	}
	return ""
}

// classIndex returns where class is in e.classes, or -1.
func (e *entry[K]) classIndex(class string) int {
	return slices.IndexFunc(e.classes, func(u usage) bool { return u.class == class })
}

// leave notes that a class has one entry less.
func (c *Cache[K]) leave(u usage) {
	if u.kept == 0 {
		c.idle[u.class]--
	}
	if c.perClass[u.class]--; c.perClass[u.class] == 0 {
		delete(c.perClass, u.class)
		delete(c.idle, u.class)
	}
}

// forget drops the entry.
func (c *Cache[K]) forget(e *entry[K]) {
	for _, u := range e.classes {
		c.leave(u)
	}
	delete(c.entries, e.key)
}

// ask returns the entry's flight, queueing one for class if there is none.
func (c *Cache[K]) ask(e *entry[K], class string) *flight {
	if e.flight == nil {
		e.flight = &flight{done: make(chan struct{})}
		c.queue.begin(e, ahead, class)
		c.queue.push(e)
	}
	return e.flight
}

// unschedule takes an entry off what is due, and its renewal out of the count. Whatever changes when an entry is
// looked at comes through here.
func (c *Cache[K]) unschedule(e *entry[K]) {
	if e.dueIndex >= 0 {
		heap.Remove(&c.due, e.dueIndex)
	}
	c.renewals.cancel(&e.renewal)
}

// settle decides when an entry without a flight needs attention next, and forgets an entry that
// nobody needs. It is called whenever an entry is kept or not any more, or its session has changed.
func (c *Cache[K]) settle(e *entry[K], now time.Time) {
	c.unschedule(e)
	valid := e.held.Valid(now)
	if e.kept > 0 && valid {
		c.renewals.want(&e.renewal, e.held.Life())
	} else {
		c.renewals.want(&e.renewal, 0)
	}
	if e.flight != nil {
		return // fetch settles it.
	}
	switch {
	case e.kept > 0 && e.failure != nil:
		e.dueAt = e.notBefore
	case e.kept > 0 && valid:
		e.dueAt = c.renewals.plan(&e.renewal, e.held, now)
	case e.kept > 0:
		e.dueAt = now
	case valid:
		e.dueAt = e.held.Expiration
	case e.failure != nil && now.Before(e.notBefore.Add(failureMemory)):
		e.dueAt = e.notBefore.Add(failureMemory)
	default:
		c.forget(e)
		return
	}
	// By the wall clock, as expirations are: an order of mixed clocks would break when one is set.
	e.dueAt = e.dueAt.Round(0)
	heap.Push(&c.due, e)
}

// poke makes Run look again.
func (c *Cache[K]) poke() {
	select {
	case c.wake <- struct{}{}:
	default: // Run has not yet looked since the last poke; it will see this one's work too.
	}
}

// value is what a caller is told of cred.
func value(cred credential.Credential, now time.Time) Value {
	after := cred.Remaining(now) - jitter(cred.Life(), askLow, askHigh)
	return Value{Credential: cred, RefreshAfter: min(max(after, minRefreshAfter), maxRefreshAfter)}
}

// fraction is the part of the session's life that remains.
func fraction(cred credential.Credential, now time.Time) float64 {
	return float64(cred.Remaining(now)) / float64(cred.Life())
}

// failureWait is how long to leave a key alone after its nth failure in a row, and never less than
// the failure itself asks for.
func failureWait(err error, n int) time.Duration {
	shortest, longest := minAwayWait, maxAwayWait
	if refused(err) {
		shortest, longest = minRefusedWait, maxRefusedWait
	}
	if e, ok := errors.AsType[*credential.Error](err); ok {
		shortest = min(max(shortest, e.RetryAfter), longest)
	}
	wait := longest
	if n < 16 { // beyond that the shift has passed every bound above
		wait = min(shortest<<n, longest)
	}
	// Half fixed, half random, so that keys that failed together are not asked for together.
	return max(jitter(wait, 0.5, 1), shortest)
}

// retryAt is err with the time until its key is looked at again.
func retryAt(err error, wait time.Duration) error {
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		return err
	}
	again := *e
	again.RetryAfter = wait
	return &again
}

// jitter returns a random part of d between the fractions low and high.
func jitter(d time.Duration, low, high float64) time.Duration {
	return time.Duration(float64(d) * (low + (high-low)*rand.Float64())) //nolint:gosec // Spreads load; nothing is kept secret by it.
}
