// Package sidecar gives a pod's AWS credentials to the SDKs in that pod. On loopback, it serves the container-credentials
// endpoint that all AWS SDKs know, and the part of the EC2 instance metadata service that SDKs read for credentials and
// region. One loop renews the session for both.
//
// It guarantees:
//   - It listens before it has credentials, and continues while it cannot get any. Only the end of its context or a
//     failure of its listener ends [Sidecar.Run].
//   - It serves a valid session, even if its renewal has failed. It never serves an expired one.
//   - A response begins within 900 ms, because many SDKs time out after a second.
//   - Only a program that reaches the pod's loopback gets credentials. It needs the authorization that the webhook put into
//     the pod, or the handshake of IMDSv2. Browsers that reach it by DNS rebinding, and programs that fetch URLs for
//     others, can do neither.
//   - Secrets are only in the responses for them.
//
// It does not isolate containers of one pod from each other, because they share its loopback. It stores nothing on disk,
// so it needs its source once after a restart.
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

// Source gets the credentials of this pod.
//
// Credentials returns a valid lease or an error. The error is or wraps a [*credential.Error] if the user should see the
// reason. Credentials must limit its own time, and return soon after ctx ends. One goroutine calls it.
type Source interface {
	Credentials(ctx context.Context) (credential.Lease, error)
}

// Config configures [New].
type Config struct {
	// Source gets the credentials. Required.
	Source Source
	// Authorization is the exact Authorization header that a request for container credentials must have. SDKs send
	// AWS_CONTAINER_AUTHORIZATION_TOKEN unchanged. Required.
	Authorization string
	// Metadata is the mode of the emulated instance metadata. Required.
	Metadata policy.Metadata
	// Zone is the availability zone of the pod, from the labels of its node. The sidecar reports it only if it is a zone of
	// the source's region. SDKs derive the region from the zone, so a zone of another region or of a data center would
	// mislead them. Empty: unknown.
	Zone string
	// StartTimeout is how long [Probe] waits for the first credentials, counted from [New]. It does not wait for a pod that
	// was not injected. Zero: no limit.
	StartTimeout time.Duration
	// Logger logs received credentials and failures to get them, but no requests and no secrets. Nil: no log.
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

	// state is the current state. Only the renewal loop replaces it. Each request reads it.
	state atomic.Pointer[state]
	// wake notifies the renewal loop that a request found the renewal overdue.
	wake chan struct{}
	// waiting has one element for each waiting request.
	waiting chan struct{}
}

// state is immutable after it is published, except that changed is closed when the next state replaces it.
type state struct {
	// lease is the last received lease; zero before the first.
	lease credential.Lease
	// body is lease as the response of the container-credentials endpoint.
	body []byte
	// receivedAt is when lease was received, with a monotonic reading. validFor is how long it was valid then.
	receivedAt time.Time
	validFor   time.Duration
	// renewAt is when to renew lease, by the wall clock; zero before the first lease.
	renewAt time.Time
	// err is the error of the latest attempt; nil if it succeeded, and before the first.
	err error
	// failedWhileValid is set if the latest attempt failed while lease was valid.
	failedWhileValid bool
	changed          chan struct{}
}

// New returns a sidecar. It starts nothing but the clock of [Config.StartTimeout].
func New(cfg Config) (*Sidecar, error) {
	switch {
	case cfg.Source == nil:
		return nil, errors.New("creating sidecar: no source of credentials")
	case cfg.Authorization == "":
		return nil, errors.New("creating sidecar: no authorization; without it every URL fetcher in the pod could read the credentials")
	case cfg.StartTimeout < 0:
		return nil, fmt.Errorf("creating sidecar: the start timeout %v is negative; use 0 for no limit", cfg.StartTimeout)
	}
	switch cfg.Metadata {
	case policy.MetadataV2, policy.MetadataV1, policy.MetadataOff:
	default:
		return nil, fmt.Errorf("creating sidecar: metadata %q is none of %q, %q and %q",
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
	_, _ = rand.Read(s.metadataKey) // never fails: crypto/rand crashes the program instead
	s.state.Store(&state{changed: make(chan struct{})})
	return s, nil
}

// How long a request waits if there is no session. Most SDKs time out after a second. The SDK for Go v2 gives a metadata
// service half a second until the response begins, and retries. botocore's metadata client tries once; if that fails, it
// has no credentials until it is recreated.
const (
	maxWait      = 900 * time.Millisecond
	maxWaitShort = 400 * time.Millisecond
	// maxWaiting is how many requests may wait at once. The remaining connections are for requests that need not wait. If
	// more requests would wait, they get an error immediately.
	maxWaiting = maxConnections / 2
)

// await returns a state whose lease is valid. If there is none, it waits for one, unless the latest attempt was refused:
// then waiting is useless, and the user should see the refusal. The error may only say that there is no response yet.
func (s *Sidecar) await(ctx context.Context, limit time.Duration) (*state, error) {
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
				return nil, st.failure()
			}
			timer := time.NewTimer(limit)
			defer timer.Stop()
			timeout = timer.C
		}
		select {
		case <-st.changed:
		case <-timeout:
			return nil, st.failure()
		case <-ctx.Done():
			return nil, st.failure()
		}
	}
}

// valid reports whether AWS still accepts the lease of st. The wall clock decides, because it continues while a machine is
// suspended. But if the clock was set back, the lease is no longer valid after validFor, by the monotonic clock.
func (st *state) valid(now time.Time) bool {
	return st.lease.Valid(now) && now.Sub(st.receivedAt) < st.validFor
}

// errPending is the error before the first attempt has finished.
var errPending = credential.Errorf(credential.ErrUnavailable, "CREDENTIALS_PENDING",
	"the broker has not responded yet; try again")

// failure returns the reason why st has no valid lease.
func (st *state) failure() error {
	if st.err == nil {
		return errPending
	}
	return st.err
}

// overdue reports whether a renewal was missed: after a success, when renewAt has passed; after a failure that left a
// valid lease, when that lease has expired. Timers stop while a machine is suspended, the wall clock does not: renewal
// can sleep past an expiration. The next request detects that, at no cost when idle.
func (st *state) overdue(now time.Time) bool {
	if st.err != nil {
		return st.failedWhileValid && !st.valid(now)
	}
	return !st.renewAt.IsZero() && now.After(st.renewAt)
}

// uninjected reports whether the latest attempt found that the pod was not injected, for example a copy by kubectl debug.
// Injection happens only at creation, so such a pod never gets credentials.
func (st *state) uninjected() bool {
	return refused(st.err) && credential.ReasonOf(st.err) == credential.ReasonPodNotInjected
}

// refused reports whether err is a refusal: a retry fails until a user fixes the cause.
func refused(err error) bool {
	return errors.Is(err, credential.ErrDenied) || errors.Is(err, credential.ErrInvalid) ||
		errors.Is(err, credential.ErrUnauthenticated) || errors.Is(err, credential.ErrNotFound)
}
