package assume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

const (
	// loadTimeout bounds one load of the broker's own credentials: two exchanges with STS, or the SDK's attempts at instance
	// metadata. Fetches of package cache end after 30 s, so the caller still has time for its own call.
	loadTimeout = 20 * time.Second
	// renewAhead is the time left at which the credentials are renewed. It equals the SDK's.
	renewAhead = 5 * time.Minute
	// reread is the interval at which credentials that do not expire are read again. It costs the read of a file, and picks
	// up a rotated key while the old one still works.
	reread = 5 * time.Minute
	// minLoadWait and maxLoadWait bound the wait between loads from a source that fails, or whose credentials STS refuses. The
	// wait doubles each time. The maximum keeps the log of a broken source readable, and a cluster admin who repaired the
	// source waits no longer.
	minLoadWait, maxLoadWait = time.Second, time.Minute
)

// own caches the broker's own credentials, which sign its calls. One caller at a time loads them from their source, however
// many callers wait. After a failure it waits before the next load. Until then it uses the current credentials until they
// expire.
type own struct {
	load  func(context.Context) (aws.Credentials, error)
	clock *clock
	log   *slog.Logger

	mu      sync.Mutex
	creds   aws.Credentials
	version int       // of creds: counts successful loads
	until   time.Time // when creds expire, by our clock; zero: there are none
	renewAt time.Time
	loading chan struct{} // closed when the current load has finished; nil: none runs

	failure   error // of the last load; nil: it succeeded
	failures  int   // in a row
	notBefore time.Time

	refusedUntil time.Time // the value of until before STS refused creds
	refusals     int       // by STS, since it last accepted creds
	reloadAt     time.Time
	denials      int // in a row
}

// manyDenials is how many denials in a row, for any roles, make own load credentials again. The broker's own session may have been
// revoked: IAM does that by a policy that denies everything, with the message of a role that does not trust the caller.
const manyDenials = 20

// forever is longer than any process runs.
const forever = 100 * 365 * 24 * time.Hour

// get returns credentials and their version. If they have expired, it waits for a load. If their renewal time has passed, it
// starts a load and does not wait. Its errors are of type *ownError.
func (o *own) get(ctx context.Context) (aws.Credentials, int, error) {
	for {
		o.mu.Lock()
		now := time.Now()
		usable := now.Before(o.until)
		if o.loading == nil && !now.Before(o.notBefore) && (!usable || !now.Before(o.renewAt)) {
			o.loading = make(chan struct{})
			// It must not end with this caller, because others wait for the same load.
			go o.fetch(context.WithoutCancel(ctx), o.loading)
		}
		creds, version, loading, failure, wait := o.creds, o.version, o.loading, o.failure, o.notBefore.Sub(now)
		o.mu.Unlock()
		switch {
		case usable:
			return creds, version, nil
		case loading == nil:
			return aws.Credentials{}, 0, &ownError{err: failure, wait: wait}
		}
		select {
		case <-loading:
		case <-ctx.Done():
			return aws.Credentials{}, 0, &ownError{err: context.Cause(ctx)}
		}
	}
}

// fetch loads credentials once, and closes done.
func (o *own) fetch(ctx context.Context, done chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	creds, err := o.load(ctx)
	if err == nil && !creds.HasKeys() {
		err = errors.New("the source returned no keys")
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	defer close(done)
	o.loading = nil
	now := time.Now()
	if err != nil {
		o.notBefore = now.Add(min(minLoadWait<<min(o.failures, 10), maxLoadWait))
		o.failures++
		o.failure = cause(err)
		if o.until.IsZero() {
			o.until, o.refusedUntil = o.refusedUntil, time.Time{} // No other credentials are available.
		}
		o.log.WarnContext(ctx, "Could not load the broker's own AWS credentials, retrying", "error", o.failure,
			"retry_in", o.notBefore.Sub(now), "held_until", o.until)
		return
	}
	o.creds, o.failure, o.failures, o.notBefore = creds, nil, 0, time.Time{}
	o.version++
	if !creds.CanExpire {
		o.until, o.renewAt = now.Add(forever), now.Add(reread)
		return
	}
	// Use the credentials even if they seem expired. In an outage, instance metadata returns old credentials, and AWS accepts
	// them then. Or our clock may be wrong.
	o.until = o.clock.local(creds.Expires)
	if least := now.Add(minLoadWait); o.until.Before(least) {
		o.until = least
	}
	o.renewAt = o.until.Add(-min(renewAhead, o.until.Sub(now)/2))
}

// refused records that STS refuses the credentials of a version as wrong or expired. It reports whether another call may
// succeed, because the credentials are loaded again or have been since.
func (o *own) refused(version int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if version != o.version {
		return true
	}
	now := time.Now()
	if o.until.IsZero() {
		return true // Another caller recorded it first.
	}
	if now.Before(o.reloadAt) {
		return false
	}
	o.reloadAt = now.Add(min(minLoadWait<<min(o.refusals, 10), maxLoadWait))
	o.refusals++
	o.refusedUntil, o.until = o.until, time.Time{}
	return true
}

// accepted records that STS knows the caller, and whether it denied the action.
func (o *own) accepted(version int, denied bool) {
	o.mu.Lock()
	o.refusals = 0
	if !denied {
		o.denials = 0
	} else {
		o.denials++
	}
	suspicious := o.denials >= manyDenials
	if suspicious {
		o.denials = 0
	}
	o.mu.Unlock()
	if suspicious {
		o.refused(version)
	}
}

// expiration returns when the current credentials expire, by AWS's clock.
func (o *own) expiration() (time.Time, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.until.IsZero() || !o.creds.CanExpire {
		return time.Time{}, false
	}
	return o.creds.Expires, true
}

// ownError is a failure to load the broker's own credentials.
type ownError struct {
	err  error
	wait time.Duration // until the next load; zero if not known
}

func (e *ownError) Error() string {
	return fmt.Sprintf("loading the broker's own AWS credentials: %v", e.err)
}

func (e *ownError) Unwrap() error { return e.err }
