package client

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/placement"
)

const (
	// hedgeAfter is how long the first broker may take before the second is called. A broker with the session cached
	// responds within milliseconds, handshake included. SDKs wait for a second.
	hedgeAfter = 250 * time.Millisecond
	// nextAfter is how long each later broker may take before the next is called, if none has accepted the call: they
	// seem to be down. A broker that has accepted it waits for something, such as a slow STS, for which another broker
	// would wait too. Besides, only the first two have the session cached, so a third would call STS once more.
	nextAfter = time.Second
	// fallbackAfter is how long the first broker may take if the hedge budget is spent, and how long any broker may take
	// before addresses are looked up again. It is longer than a pod's first call if STS is fast. Four such times fit
	// into a call, so a node that drops packets does not use all of it.
	fallbackAfter = 2500 * time.Millisecond
	// fewAddresses brokers may all have been replaced while DNS responses were cached. Of more, at least one still exists.
	fewAddresses = 3
)

// sharedReasons point to a dependency of all brokers, so another broker would probably fail too. An owner may still have
// the session cached. Others do not: calling them turns each sidecar request into one STS call per broker, when STS has
// too many already. But perhaps only the owners fail, with their node or zone, so one more is called while the hedge
// budget lasts. Throttling applies to the whole account.
var sharedReasons = []credential.Reason{
	credential.ReasonSTSThrottled, credential.ReasonSTSUnavailable, credential.ReasonBrokerCredentials, credential.ReasonAPIServerUnavailable,
}

// call is one call of [Client.Credentials]. One goroutine uses it. Attempts and the second look-up run in other
// goroutines, which end with the call.
type call struct {
	*Client

	token identity.UnverifiedToken
	began time.Time

	remaining   []netip.Addr // brokers not called yet, in order
	attempts    []attempt
	inFlight    int // attempts without an outcome
	maxAttempts int // 0: no limit
	// mayLookUp permits one more look-up of the addresses; lookingUp is set while it runs.
	mayLookUp, lookingUp bool

	running  sync.WaitGroup
	outcomes chan outcome
	found    chan []netip.Addr

	timer    *time.Timer   // fires when the last attempt has taken too long
	wait     time.Duration // what timer was first set to for the last attempt
	extended bool          // timer was set again for the last attempt, because no hedge was available
	hedged   bool          // a hedge of the budget was used
}

// attempt is the call of one broker.
type attempt struct {
	addr     netip.Addr
	accepted *atomic.Bool // the broker is verified and has the call
	err      error        // nil while in flight
	detail   int          // how useful err is to the user
}

// outcome is the result of attempt number index.
type outcome struct {
	index  int
	lease  credential.Lease
	err    error
	detail int
}

func (c *Client) newCall(token identity.UnverifiedToken, began time.Time, found []netip.Addr, current bool) *call {
	return &call{
		Client: c, token: token, began: began,
		remaining: c.order(found), mayLookUp: !current || len(found) <= fewAddresses,
		outcomes: make(chan outcome), found: make(chan []netip.Addr),
	}
}

// run calls brokers until one gives a lease or a refusal, or none remains.
func (c *call) run(ctx context.Context) (credential.Lease, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer c.running.Wait()
	defer cancel()
	c.timer = time.NewTimer(callTimeout)
	defer c.timer.Stop()

	for c.callNext(ctx); c.inFlight > 0 || c.lookingUp; {
		select {
		case o := <-c.outcomes:
			if c.isFinal(o) {
				return c.finish(o)
			}
			c.recordFailure(o)
			c.callNext(ctx)
		case <-c.timer.C:
			c.onTimeout(ctx)
		case found := <-c.found:
			c.lookingUp = false
			c.remaining = slices.DeleteFunc(c.order(found), func(addr netip.Addr) bool {
				return slices.ContainsFunc(c.attempts, func(a attempt) bool { return a.addr == addr })
			})
			c.callNext(ctx)
		case <-ctx.Done():
			return credential.Lease{}, c.finalError(ctx)
		}
	}
	return credential.Lease{}, c.finalError(ctx)
}

// isFinal reports whether o ends the call: it is a lease, or a refusal that all brokers would give. A broker finds that a
// token has expired by its own clock, which may be wrong, so two brokers must agree.
func (c *call) isFinal(o outcome) bool {
	switch {
	case o.err == nil:
		return true
	case errors.Is(o.err, credential.ErrUnavailable):
		return false
	default:
		return !tokenExpired(o.err) || slices.ContainsFunc(c.attempts, func(other attempt) bool { return tokenExpired(other.err) })
	}
}

// tokenExpired reports whether err is a broker's response that the token has expired.
func tokenExpired(err error) bool { return credential.ReasonOf(err) == credential.ReasonTokenExpired }

// finish returns the lease or the refusal of o.
func (c *call) finish(o outcome) (credential.Lease, error) {
	if !c.hedged {
		c.hedges.refund()
	}
	if o.err != nil {
		return credential.Lease{}, fmt.Errorf("calling broker %s at %s: %w", c.target, c.attempts[o.index].addr, o.err)
	}
	return o.lease, nil
}

func (c *call) recordFailure(o outcome) {
	c.inFlight--
	c.attempts[o.index].err, c.attempts[o.index].detail = o.err, o.detail
	reason := credential.ReasonOf(o.err)
	switch {
	case !slices.Contains(sharedReasons, reason):
	case reason == credential.ReasonSTSThrottled:
		c.maxAttempts, c.mayLookUp = placement.Owners, false
	case c.maxAttempts == 0:
		c.maxAttempts, c.mayLookUp = placement.Owners, false
		if len(c.remaining) > 0 && c.hedges.take() {
			c.hedged = true
			c.maxAttempts++
		}
	}
}

// exhausted reports whether no broker remains, even after another look-up.
func (c *call) exhausted() bool {
	return c.maxAttempts > 0 && len(c.attempts) >= c.maxAttempts || len(c.remaining) == 0 && !c.mayLookUp
}

// callNext calls the next broker, or looks addresses up again if none remains.
func (c *call) callNext(ctx context.Context) {
	switch {
	case c.exhausted():
	case len(c.remaining) == 0:
		c.mayLookUp, c.lookingUp = false, true
		c.running.Go(func() {
			// If it fails, it returns the known addresses, which have all been called.
			found, _, _ := c.addresses.find(ctx)
			select {
			case c.found <- found:
			case <-ctx.Done():
			}
		})
	default:
		c.startAttempt(ctx)
	}
}

func (c *call) startAttempt(ctx context.Context) {
	index, addr := len(c.attempts), c.remaining[0]
	c.remaining = c.remaining[1:]
	accepted := new(atomic.Bool)
	c.attempts = append(c.attempts, attempt{addr: addr, accepted: accepted})
	c.inFlight++
	c.running.Go(func() {
		o := c.callBroker(ctx, addr, accepted)
		o.index = index
		select {
		case c.outcomes <- o:
		case <-ctx.Done():
		}
	})
	c.wait, c.extended = hedgeAfter, false
	if index > 0 {
		c.wait = nextAfter
	}
	c.timer.Reset(c.wait)
}

// onTimeout handles a last attempt that has taken too long.
func (c *call) onTimeout(ctx context.Context) {
	second := len(c.attempts) < placement.Owners
	if c.exhausted() || !second && c.anyAccepted() {
		return
	}
	if !c.extended && (len(c.remaining) == 0 || second && !c.hedges.take()) {
		c.extended = true
		c.timer.Reset(fallbackAfter - c.wait)
		return
	}
	c.hedged = c.hedged || second
	c.callNext(ctx)
}

// anyAccepted reports whether a broker in flight has accepted the call.
func (c *call) anyAccepted() bool {
	return slices.ContainsFunc(c.attempts, func(a attempt) bool { return a.err == nil && a.accepted.Load() })
}

// How useful an error is to the user who must fix the cause. [call.finalError] returns the error with the most detail.
const (
	detailNone   = iota // no broker's error: no connection, or no response
	detailLow           // a failure of the broker itself, or it is shutting down
	detailReason        // a broker's reason
)

// callBroker calls one broker, and sets accepted when the broker has the call.
func (c *call) callBroker(ctx context.Context, addr netip.Addr, accepted *atomic.Bool) outcome {
	conn, err := grpc.NewClient("passthrough:///"+netip.AddrPortFrom(addr, c.port).String(), c.options...)
	if err != nil {
		return outcome{err: unreachable(fmt.Errorf("creating a connection: %w", err))}
	}
	defer conn.Close()
	response, err := brokerpb.NewBrokerClient(conn).GetCredentials(ctx,
		&brokerpb.GetCredentialsRequest{}, grpc.PerRPCCredentials(bearer{c.token, func() { accepted.Store(true) }}))
	if err != nil {
		o := outcome{err: brokerpb.FromError(err), detail: detailNone}
		fromGRPC := len(status.Convert(err).Details()) == 0 // a broker's errors have details
		switch reason := credential.ReasonOf(o.err); {
		case fromGRPC && (status.Code(err) == codes.DeadlineExceeded || status.Code(err) == codes.Canceled) && accepted.Load():
			o.err = timedOut(err)
		case fromGRPC && (status.Code(err) == codes.Unavailable || status.Code(err) == codes.DeadlineExceeded || status.Code(err) == codes.Canceled):
			o.err = unreachable(errors.New(status.Convert(err).Message()))
		case fromGRPC:
			// The server at this address is not a broker.
		case reason != credential.ReasonInternal && reason != credential.ReasonShuttingDown:
			o.detail = detailReason
		default:
			o.detail = detailLow
		}
		return o
	}
	lease, err := leaseOf(response, c.began)
	if err != nil {
		return outcome{detail: detailLow, err: credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal,
			"the broker's response is invalid: %v", err)}
	}
	return outcome{lease: lease}
}

// unreachable returns the error of a call that no broker has accepted. SDKs show its message to users. The sidecar logs
// the cause too.
func unreachable(cause error) error {
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonBrokerUnreachable, Cause: cause,
		Message: "cannot reach any broker; the sidecar keeps retrying",
	}
}

// timedOut returns the error of a call that a broker has accepted but not finished in time. The broker logs why.
func timedOut(cause error) error {
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal, Cause: fmt.Errorf("no response: %w", cause),
		Message: "the broker did not respond in time; the sidecar keeps retrying",
	}
}

// finalError returns the error of a call without lease and refusal: the one with the most detail, and of those the first.
func (c *call) finalError(ctx context.Context) error {
	for i := range c.attempts {
		if c.attempts[i].err == nil {
			c.attempts[i].err = unreachable(fmt.Errorf("no response: %w", ctx.Err()))
			if c.attempts[i].accepted.Load() {
				c.attempts[i].err = timedOut(ctx.Err())
			}
		}
	}
	best := slices.MaxFunc(c.attempts, func(a, b attempt) int { return a.detail - b.detail })
	if e, ok := errors.AsType[*credential.Error](best.err); ok && tokenExpired(e) && len(c.attempts) > 1 {
		// No second broker agreed. A refusal would make SDKs give up because of one wrong clock.
		best.err = &credential.Error{
			Kind: credential.ErrUnavailable, Reason: e.Reason, RetryAfter: e.RetryAfter, Cause: e.Cause,
			Message: e.Message + "; no second broker has confirmed it, so the sidecar keeps retrying",
		}
	}
	return fmt.Errorf("calling broker %s at %s (%d called, %d not): %w", c.target, best.addr, len(c.attempts), len(c.remaining), best.err)
}
