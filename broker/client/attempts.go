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
	// hedgeAfter is how long the first broker may be silent. One that holds the session answers in some
	// milliseconds, with its handshake; SDKs wait for a second.
	hedgeAfter = 250 * time.Millisecond
	// laterAfter is how long those after it may be silent, where none has taken the call: they seem to be lost. One
	// that has taken it waits for something, such as a slow STS, which another would have to wait for as well; and
	// no other than the first two holds the session, so that the third would ask STS once more.
	laterAfter = time.Second
	// reluctantAfter is how long the first may be silent when the budget of hedges is spent, and any before addresses
	// are looked up again. It is above what a pod's first call takes when STS is quick, and four such times fit
	// into a call: a node that swallows packets does not cost all of it.
	reluctantAfter = 2500 * time.Millisecond
	// few addresses can all have been replaced while DNS answers were cached. Of more, one at least will be there.
	few = 3
)

// shared are the reasons for which another broker is likely to fail alike: what is away is what all of them depend on.
// An owner of the key may still hold the session. Others do not, and to ask them would make each sidecar's call
// as many calls to STS as there are brokers, of which it has too many already. It may also be these two alone, though,
// by their node or zone; so that one more is asked while the budget of hedges lasts. Throttling is of the whole account.
var shared = []credential.Reason{
	credential.ReasonSTSThrottled, credential.ReasonSTSUnavailable, credential.ReasonBaseCredential, credential.ReasonAPIServerAway,
}

// call is one call of [Client.Credentials]. It is used by one goroutine; attempts and the second look-up run
// in others, which end with it.
type call struct {
	*Client

	token identity.UnverifiedToken
	began time.Time

	left  []netip.Addr // in the order in which to ask them
	asked []attempt
	open  int // how many of those asked are silent
	most  int // how many may be asked; 0: all
	// lookable is set while addresses may be looked up again, and looking while they are.
	lookable, looking bool

	running sync.WaitGroup
	answers chan answer
	found   chan []netip.Addr

	silence   *time.Timer   // ends the patience with whoever was asked last
	patience  time.Duration // how long silence was set for
	reluctant bool          // it was set again, since no hedge was to be had
	hedged    bool          // somebody was asked for whom the budget paid
}

// attempt is one broker asked.
type attempt struct {
	addr  netip.Addr
	taken *atomic.Bool // it has been verified, and has the call
	err   error        // nil while it is silent
	says  int          // how much err tells
}

// answer is what came of attempt at.
type answer struct {
	at    int
	lease credential.Lease
	err   error
	says  int
}

func (c *Client) newCall(token identity.UnverifiedToken, began time.Time, found []netip.Addr, current bool) *call {
	return &call{
		Client: c, token: token, began: began,
		left: c.order(found), lookable: !current || len(found) <= few,
		answers: make(chan answer), found: make(chan []netip.Addr),
	}
}

// run asks until there is an answer, or nobody left.
func (c *call) run(ctx context.Context) (credential.Lease, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer c.running.Wait()
	defer cancel()
	c.silence = time.NewTimer(CallTimeout)
	defer c.silence.Stop()

	for c.next(ctx); c.open > 0 || c.looking; {
		select {
		case a := <-c.answers:
			if c.final(a) {
				return c.settled(a)
			}
			c.failed(a)
			c.next(ctx)
		case <-c.silence.C:
			c.silent(ctx)
		case found := <-c.found:
			c.looking = false
			c.left = slices.DeleteFunc(c.order(found), func(a netip.Addr) bool {
				return slices.ContainsFunc(c.asked, func(asked attempt) bool { return asked.addr == a })
			})
			c.next(ctx)
		case <-ctx.Done():
			return credential.Lease{}, c.verdict(ctx)
		}
	}
	return credential.Lease{}, c.verdict(ctx)
}

// final reports whether the answer ends the call: it is a lease, or a refusal that all brokers would make. That a token
// has expired is by the broker's own clock, which may be wrong, so it takes two brokers to say so.
func (c *call) final(a answer) bool {
	switch {
	case a.err == nil:
		return true
	case errors.Is(a.err, credential.ErrUnavailable):
		return false
	default:
		return !expired(a.err) || slices.ContainsFunc(c.asked, func(other attempt) bool { return expired(other.err) })
	}
}

// expired reports whether a broker said that the token has expired.
func expired(err error) bool { return credential.ReasonOf(err) == credential.ReasonTokenExpired }

// settled ends the call with a lease or a refusal.
func (c *call) settled(a answer) (credential.Lease, error) {
	if !c.hedged {
		c.hedges.refund()
	}
	if a.err != nil {
		return credential.Lease{}, fmt.Errorf("asking broker %s at %s: %w", c.target, c.asked[a.at].addr, a.err)
	}
	return a.lease, nil
}

func (c *call) failed(a answer) {
	c.open--
	c.asked[a.at].err, c.asked[a.at].says = a.err, a.says
	reason := credential.ReasonOf(a.err)
	switch {
	case !slices.Contains(shared, reason):
	case reason == credential.ReasonSTSThrottled:
		c.most, c.lookable = placement.Owners, false
	case c.most == 0:
		c.most, c.lookable = placement.Owners, false
		if len(c.left) > 0 && c.hedges.take() {
			c.hedged = true
			c.most++
		}
	}
}

// exhausted reports whether there is nobody to turn to, now or after another look-up.
func (c *call) exhausted() bool {
	return c.most > 0 && len(c.asked) >= c.most || len(c.left) == 0 && !c.lookable
}

// next asks the next broker, or looks for one where none is left.
func (c *call) next(ctx context.Context) {
	switch {
	case c.exhausted():
	case len(c.left) == 0:
		c.lookable, c.looking = false, true
		c.running.Go(func() {
			// Where it fails, it yields what is known already, and that is no news.
			found, _, _ := c.addresses.find(ctx)
			select {
			case c.found <- found:
			case <-ctx.Done():
			}
		})
	default:
		c.start(ctx)
	}
}

func (c *call) start(ctx context.Context) {
	at, addr := len(c.asked), c.left[0]
	c.left = c.left[1:]
	taken := new(atomic.Bool)
	c.asked = append(c.asked, attempt{addr: addr, taken: taken})
	c.open++
	c.running.Go(func() {
		a := c.ask(ctx, addr, taken)
		a.at = at
		select {
		case c.answers <- a:
		case <-ctx.Done():
		}
	})
	c.patience, c.reluctant = hedgeAfter, false
	if at > 0 {
		c.patience = laterAfter
	}
	c.silence.Reset(c.patience)
}

// silent deals with a broker that says nothing for longer than patience.
func (c *call) silent(ctx context.Context) {
	second := len(c.asked) < placement.Owners
	if c.exhausted() || !second && c.taken() {
		return
	}
	if !c.reluctant && (len(c.left) == 0 || second && !c.hedges.take()) {
		c.reluctant = true
		c.silence.Reset(reluctantAfter - c.patience)
		return
	}
	c.hedged = c.hedged || second
	c.next(ctx)
}

// taken reports whether one of those who are silent has the call.
func (c *call) taken() bool {
	return slices.ContainsFunc(c.asked, func(a attempt) bool { return a.err == nil && a.taken.Load() })
}

// How much an error tells whoever has to mend something, see [call.verdict].
const (
	saysNothing = iota // of the broker's: no connection, or no answer
	saysLittle         // the broker has a fault of its own, or is leaving
	saysReason
)

// ask asks one broker, and sets has once it has the call.
func (c *call) ask(ctx context.Context, addr netip.Addr, has *atomic.Bool) answer {
	conn, err := grpc.NewClient("passthrough:///"+netip.AddrPortFrom(addr, c.port).String(), c.options...)
	if err != nil {
		return answer{err: unreachable(fmt.Errorf("making a connection: %w", err))}
	}
	defer conn.Close()
	response, err := brokerpb.NewBrokerClient(conn).GetCredentials(ctx,
		&brokerpb.GetCredentialsRequest{}, grpc.PerRPCCredentials(bearer{c.token, func() { has.Store(true) }}))
	if err != nil {
		a := answer{err: brokerpb.FromError(err)}
		own := len(status.Convert(err).Details()) == 0 // gRPC's own errors have none
		switch reason := credential.ReasonOf(a.err); {
		case own && (status.Code(err) == codes.DeadlineExceeded || status.Code(err) == codes.Canceled) && has.Load():
			a.err = unanswered(err)
		case own && (status.Code(err) == codes.Unavailable || status.Code(err) == codes.DeadlineExceeded || status.Code(err) == codes.Canceled):
			a.err = unreachable(errors.New(status.Convert(err).Message()))
		case own:
			// Something answers there, and it is no broker.
		case reason != credential.ReasonInternal && reason != credential.ReasonShuttingDown:
			a.says = saysReason
		default:
			a.says = saysLittle
		}
		return a
	}
	lease, err := leaseOf(response, c.began)
	if err != nil {
		return answer{says: saysLittle, err: credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal,
			"the answer is of no use: %v", err)}
	}
	return answer{lease: lease}
}

// unreachable is the error of a call that no broker has taken. Users of an SDK get its message, the sidecar's log the
// cause as well.
func unreachable(cause error) error {
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonBrokerUnreachable, Cause: cause,
		Message: "no broker can be reached, which the sidecar goes on trying",
	}
}

// unanswered is the error of a call that a broker has taken and not answered in time. What it waits for, its log says.
func unanswered(cause error) error {
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal, Cause: fmt.Errorf("no answer: %w", cause),
		Message: "the broker has not answered in time, and is asked again",
	}
}

// verdict is the error of a call that nobody has answered: the one that tells most, and of those the first in rank.
func (c *call) verdict(ctx context.Context) error {
	for i := range c.asked {
		if c.asked[i].err == nil {
			c.asked[i].err = unreachable(fmt.Errorf("no answer: %w", ctx.Err()))
			if c.asked[i].taken.Load() {
				c.asked[i].err = unanswered(ctx.Err())
			}
		}
	}
	most := slices.MaxFunc(c.asked, func(a, b attempt) int { return a.says - b.says })
	if e, ok := errors.AsType[*credential.Error](most.err); ok && expired(e) && len(c.asked) > 1 {
		// No other broker has confirmed it. A refusal would make SDKs give up because of one wrong clock.
		most.err = &credential.Error{
			Kind: credential.ErrUnavailable, Reason: e.Reason, RetryAfter: e.RetryAfter, Cause: e.Cause,
			Message: e.Message + "; no second broker could be asked, so the sidecar tries again",
		}
	}
	return fmt.Errorf("asking broker %s at %s (%d asked, %d not): %w", c.target, most.addr, len(c.asked), len(c.left), most.err)
}
