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
	// askTimeout bounds one question to the source of the broker's own credentials: two exchanges
	// with STS, or what the SDK spends on instance metadata. It leaves a caller of package cache,
	// whose fetches end after 30 s, the time for its own call.
	askTimeout = 20 * time.Second
	// renewAhead is how long before they expire own credentials are renewed, as the SDK does it.
	renewAhead = 5 * time.Minute
	// reread is how often credentials without an end are read again: a rotated file is taken up
	// while its predecessor still works. It is a read of a file.
	reread = 5 * time.Minute
	// Waits between questions to a source that fails, doubled each time, and between questions that
	// come of credentials that STS refuses. The second keeps a broken source's log readable, and is
	// no longer than an operator waits for a mended one.
	minAskWait, maxAskWait = time.Second, time.Minute
)

// own keeps the broker's own credentials, which sign its calls. However many calls want them, the
// source is asked by one of them at a time, and is left alone for a while after it failed; while it
// fails, what is held is used until it expires.
type own struct {
	ask   func(context.Context) (aws.Credentials, error)
	clock *clock
	log   *slog.Logger

	mu      sync.Mutex
	held    aws.Credentials
	version int       // of held: how often the source has yielded
	until   time.Time // when held ends, by our clock; zero: nothing is held
	renewAt time.Time
	asking  chan struct{} // closed when the question under way has ended; nil: there is none

	failure   error // why the last question failed; nil: it did not
	failures  int   // in a row
	notBefore time.Time

	doubted  time.Time // until, of before STS refused what is held
	refusals int       // by STS, since it last took what was held
	reloadAt time.Time
	denials  int // in a row
}

// manyDenials in a row, whatever the roles, may mean that the broker's own session was revoked: IAM's policy for
// that denies it everything, in the same words as a role does that does not trust it.
const manyDenials = 20

// forEver is longer than any process runs.
const forEver = 100 * 365 * 24 * time.Hour

// get returns credentials and their version. It asks the source when it has to, and ahead of that
// without waiting. The error is an *ownError.
func (o *own) get(ctx context.Context) (aws.Credentials, int, error) {
	for {
		o.mu.Lock()
		now := time.Now()
		usable := now.Before(o.until)
		if o.asking == nil && !now.Before(o.notBefore) && (!usable || !now.Before(o.renewAt)) {
			o.asking = make(chan struct{})
			// Not on this caller's time: others wait for the same answer.
			go o.fetch(context.WithoutCancel(ctx), o.asking)
		}
		held, version, asking, failure, wait := o.held, o.version, o.asking, o.failure, o.notBefore.Sub(now)
		o.mu.Unlock()
		switch {
		case usable:
			return held, version, nil
		case asking == nil:
			return aws.Credentials{}, 0, &ownError{err: failure, wait: wait}
		}
		select {
		case <-asking:
		case <-ctx.Done():
			return aws.Credentials{}, 0, &ownError{err: context.Cause(ctx)}
		}
	}
}

// fetch asks the source once, and closes done.
func (o *own) fetch(ctx context.Context, done chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	creds, err := o.ask(ctx)
	if err == nil && !creds.HasKeys() {
		err = errors.New("the source yields no keys")
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	defer close(done)
	o.asking = nil
	now := time.Now()
	if err != nil {
		o.notBefore = now.Add(min(minAskWait<<min(o.failures, 10), maxAskWait))
		o.failures++
		o.failure = cause(err)
		if o.until.IsZero() {
			o.until, o.doubted = o.doubted, time.Time{} // Nothing better is to be had.
		}
		o.log.WarnContext(ctx, "Obtaining the broker's own AWS credentials failed; asking again", "error", o.failure,
			"retry_in", o.notBefore.Sub(now), "held_until", o.until)
		return
	}
	o.held, o.failure, o.failures, o.notBefore = creds, nil, 0, time.Time{}
	o.version++
	if !creds.CanExpire {
		o.until, o.renewAt = now.Add(forEver), now.Add(reread)
		return
	}
	// What a source yields is tried though it seem expired: instance metadata hands out old
	// credentials in an outage, which AWS then accepts, and our clock may be the one that is wrong.
	o.until = o.clock.local(creds.Expires)
	if least := now.Add(minAskWait); o.until.Before(least) {
		o.until = least
	}
	o.renewAt = o.until.Add(-min(renewAhead, o.until.Sub(now)/2))
}

// refused hears that STS takes a version for wrong or expired, and reports whether another try is
// worth while: because the source is to be asked anew, or has been since.
func (o *own) refused(version int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if version != o.version {
		return true
	}
	now := time.Now()
	if o.until.IsZero() {
		return true // another caller heard it first
	}
	if now.Before(o.reloadAt) {
		return false
	}
	o.reloadAt = now.Add(min(minAskWait<<min(o.refusals, 10), maxAskWait))
	o.refusals++
	o.doubted, o.until = o.until, time.Time{}
	return true
}

// accepted hears that STS knew the caller, and whether it denied what was asked for.
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

// expiration is when what is held expires, by AWS's clock.
func (o *own) expiration() (time.Time, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.until.IsZero() || !o.held.CanExpire {
		return time.Time{}, false
	}
	return o.held.Expires, true
}

// ownError is a failure to obtain the broker's own credentials.
type ownError struct {
	err  error
	wait time.Duration // until the source is asked again; zero when that is not known
}

func (e *ownError) Error() string {
	return fmt.Sprintf("obtaining the broker's own AWS credentials: %v", e.err)
}

func (e *ownError) Unwrap() error { return e.err }
