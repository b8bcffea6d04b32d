// Package sidecar hands a pod's AWS credentials to the SDKs in that pod. It serves, on loopback, the
// container-credentials endpoint that every AWS SDK knows, and emulates the part of the EC2 instance
// metadata service that SDKs ask for credentials and region; behind both, one loop keeps the
// credential fresh.
//
// It promises that
//   - it listens before it has credentials, and goes on while they cannot be had: nothing but its
//     context or its listener ends [Sidecar.Run];
//   - while it holds a credential that is valid it answers with it, whatever the last attempt to
//     renew it came to; what has expired is never served;
//   - an answer begins within 900 ms, because many SDKs give up after a second;
//   - only a program that can reach the pod's loopback and knows what the webhook told it, or speaks
//     the handshake of IMDSv2, gets a credential. Browsers that were sent here by a foreign name
//     (DNS rebinding) and programs that fetch URLs for others do neither;
//   - secrets are in the answers that carry them, and nowhere else.
//
// It does not shield containers of one pod from each other: they share its loopback. It keeps
// nothing on disk, so after a restart it needs its source once.
package sidecar

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Source yields the credentials of this pod.
//
// Credentials returns a valid lease, or an error that is or wraps a [*credential.Error] where the
// user is to be told why. It must bound its own time, and return soon after ctx ends. It is called
// by one goroutine.
type Source interface {
	Credentials(ctx context.Context) (credential.Lease, error)
}

// Config says what to serve and to whom.
type Config struct {
	// Source yields the credentials. Required.
	Source Source
	// Authorization is what requests for container credentials must carry as their Authorization
	// header, as SDKs send AWS_CONTAINER_AUTHORIZATION_TOKEN: raw. Required.
	Authorization string
	// Metadata says how instance metadata is emulated. Required.
	Metadata policy.Metadata
	// Zone is the availability zone that the pod runs in, as the labels of nodes have it; empty when
	// unknown. It is told only where it is one of the region that the source tells: a zone of another
	// region, or of a data center, would mislead SDKs that make a region of it.
	Zone string
	// StartTimeout is how long [Probe] waits for the first credential, counted from [New]. Zero: for
	// ever. A pod that was not injected is not waited for.
	StartTimeout time.Duration
	// Logger gets a record when credentials are got, and when they can no longer be got; none per
	// request, and no secret. Nil discards them.
	Logger *slog.Logger
}

// Sidecar serves credentials. Make it with [New].
type Sidecar struct {
	source        Source
	authorization []byte
	metadata      policy.Metadata
	zone          string
	metadataKey   []byte // signs session tokens of the metadata service
	startTimeout  time.Duration
	started       time.Time
	log           *slog.Logger

	// state is replaced as a whole by the renewal loop alone, and read by every request.
	state atomic.Pointer[state]
	// wake tells the renewal loop that a request found the renewal overdue.
	wake chan struct{}
	// waiting has an element for each request that waits.
	waiting chan struct{}
}

// state is what is known at one moment. It does not change once it is published, but for changed,
// which is closed when a newer state takes its place.
type state struct {
	// lease is the last one that was got; zero before the first.
	lease credential.Lease
	// body is lease in the form of the container-credentials endpoint.
	body []byte
	// got is when lease was got, with a monotonic reading, and left how long it was valid from then on.
	got  time.Time
	left time.Duration
	// renewAt is when lease should be renewed, by the wall clock; zero before the first.
	renewAt time.Time
	// err says why the latest attempt failed; nil when lease came from it, and before the first.
	err error
	// holding: the latest attempt failed while lease was valid.
	holding bool
	changed chan struct{}
}

// New checks cfg. It starts nothing but the clock of [Config.StartTimeout].
func New(cfg Config) (*Sidecar, error) {
	switch {
	case cfg.Source == nil:
		return nil, errors.New("making sidecar: no source of credentials")
	case cfg.Authorization == "":
		return nil, errors.New("making sidecar: no authorization: without it every URL fetcher in the pod could read the credentials")
	case cfg.StartTimeout < 0:
		return nil, fmt.Errorf("making sidecar: the start timeout %v is negative (0 waits for ever)", cfg.StartTimeout)
	}
	switch cfg.Metadata {
	case policy.MetadataV2, policy.MetadataV1, policy.MetadataOff:
	default:
		return nil, fmt.Errorf("making sidecar: metadata %q is none of %q, %q and %q",
			cfg.Metadata, policy.MetadataV2, policy.MetadataV1, policy.MetadataOff)
	}
	s := &Sidecar{
		source:        cfg.Source,
		authorization: []byte(cfg.Authorization),
		metadata:      cfg.Metadata,
		zone:          cfg.Zone,
		metadataKey:   make([]byte, 32),
		startTimeout:  cfg.StartTimeout,
		started:       time.Now(),
		log:           cfg.Logger,
		wake:          make(chan struct{}, 1),
		waiting:       make(chan struct{}, maxWaiting),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	_, _ = rand.Read(s.metadataKey) // never fails: crypto/rand ends the program instead
	s.state.Store(&state{changed: make(chan struct{})})
	return s, nil
}

// How long a request waits for a credential while none is held. Most SDKs give up after a second. The SDK for Go v2
// gives a metadata service half of one until it begins to answer, and asks again; botocore's metadata client asks
// once, and is without credentials for its life if that fails.
const (
	patience      = 900 * time.Millisecond
	shortPatience = 400 * time.Millisecond
	// maxWaiting is how many may wait at a time. The connections that are left are for those who need not, and further
	// ones hear at once that there is nothing yet.
	maxWaiting = maxConnections / 2
)

// await returns a state whose lease is valid now. While there is none it waits for one, unless the
// latest attempt was refused: then waiting is idle, and the refusal is what the user should see.
// The error is nil only with a state; it may be one that says no more than "not yet".
func (s *Sidecar) await(ctx context.Context, patience time.Duration) (*state, error) {
	var timeout <-chan time.Time
	for {
		st, now := s.state.Load(), time.Now()
		if st.overdue(now) {
			select {
			case s.wake <- struct{}{}:
			default:
			}
		}
		if st.valid(now) {
			return st, nil
		}
		if refused(st.err) {
			return nil, st.err
		}
		if timeout == nil {
			select {
			case s.waiting <- struct{}{}:
				defer func() { <-s.waiting }()
			default:
				return nil, st.why()
			}
			timer := time.NewTimer(patience)
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-st.changed:
		case <-timeout:
			return nil, st.why()
		case <-ctx.Done():
			return nil, st.why()
		}
	}
}

// valid reports whether st has a lease that AWS still accepts. The wall clock decides, and a clock that
// was set back since does not lengthen a lease: then it is time that has passed that counts. (The other
// way round, time that passed does not tell of a machine's sleep, and the wall clock does.)
func (st *state) valid(now time.Time) bool {
	return st.lease.Valid(now) && now.Sub(st.got) < st.left
}

// errPending is the answer while the first attempt is still under way.
var errPending = credential.Errorf(credential.ErrUnavailable, "CREDENTIALS_PENDING",
	"the broker has not answered yet; try again")

// why returns the reason for which st has no valid lease.
func (st *state) why() error {
	if st.err == nil {
		return errPending
	}
	return st.err
}

// overdue reports whether the time to renew has passed though the latest attempt went well, or the end of what was
// held then though it did not. Timers stand still while a machine is suspended and the wall clock does not, so the
// renewal loop can sleep through the end of a credential; the next request notices, at no cost while there is none.
func (st *state) overdue(now time.Time) bool {
	if st.err != nil {
		return st.holding && !st.valid(now)
	}
	return !st.renewAt.IsZero() && now.After(st.renewAt)
}

// uninjected reports whether the latest attempt found that the pod was not injected, as a copy made by kubectl debug is.
// Brokers say so of what a pod has had from its creation on, so it has no credentials to wait for.
func (st *state) uninjected() bool {
	return refused(st.err) && credential.ReasonOf(st.err) == credential.ReasonPodNotInjected
}

// refused reports whether err says that asking again will not help until somebody mends something.
func refused(err error) bool {
	return errors.Is(err, credential.ErrDenied) || errors.Is(err, credential.ErrInvalid) ||
		errors.Is(err, credential.ErrUnauthenticated) || errors.Is(err, credential.ErrNotFound)
}
