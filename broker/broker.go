// Package broker exchanges a pod's identity for AWS credentials. It connects the parts: verify the token, bind it to the live
// pod, decide on the grant, get the session from the cache, and record the decision in the audit log. It also prefetches the
// sessions that the broker owns.
//
// It guarantees: no credentials leave without a valid token for our audience, a live pod, an opted-in namespace and a
// permitted role. There is no fallback. Kubernetes and AWS are behind the interfaces of [Config].
package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// Binder finds the live pod of a verified identity.
//
// Bind returns the current pod and its namespace. It refuses a pod that was deleted or recreated, has finished or was not
// injected, with credential.ErrNotFound or credential.ErrDenied. If it cannot find out, it returns credential.ErrUnavailable.
type Binder interface {
	Bind(ctx context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error)
}

// Sessions has the sessions of grants.
//
// Get returns a valid session for the grant of a pod in the namespace. It waits until ctx ends at most. If the namespace has
// its maximum of distinct grants, it returns cache.ErrTenantFull.
type Sessions interface {
	Get(ctx context.Context, grant policy.Grant, namespace string) (cache.Value, error)
}

// Config configures [New].
type Config struct {
	// Verifier verifies tokens. Required.
	Verifier identity.Verifier
	// Binder finds pods. Required.
	Binder Binder
	// Rules decide on grants. Required.
	Rules *policy.Rules
	// Sessions has the sessions of grants. Required.
	Sessions Sessions
	// Audit records every decision. It is not one of Observers, because it can refuse: if it must record each decision and
	// cannot, the pod gets no credentials. Required.
	Audit *audit.Log
	// Region is the region in responses to pods that set none. Default: none.
	Region string
	// Observers are notified of each call, in order. Default: none.
	Observers []Observer
	// Logger receives the broker's own failures. Required.
	Logger *slog.Logger
}

// Broker serves the one RPC. [Broker.Serve] serves it on a listener.
type Broker struct {
	brokerpb.UnimplementedBrokerServer
	cfg         Config
	connections *connlimit.Limiter
}

// New checks cfg.
func New(cfg Config) (*Broker, error) {
	if cfg.Verifier == nil || cfg.Binder == nil || cfg.Rules == nil || cfg.Sessions == nil || cfg.Audit == nil || cfg.Logger == nil {
		return nil, errors.New("a broker needs a Verifier, a Binder, Rules, Sessions, an Audit log and a Logger")
	}
	if !brokerpb.ValidRegion(cfg.Region) {
		return nil, fmt.Errorf("region %q must have at most 64 lower-case letters, digits and hyphens, because sidecars accept no other", cfg.Region)
	}
	connections, err := newConnections()
	if err != nil {
		return nil, err
	}
	return &Broker{cfg: cfg, connections: connections}, nil
}

// replyMargin is how long before the caller's deadline the broker responds, so that the caller learns what took so long.
const replyMargin = 50 * time.Millisecond

// maxCall bounds a call whose caller sets no deadline or a late one.
const maxCall = 30 * time.Second

// GetCredentials implements brokerpb.BrokerServer.
func (b *Broker) GetCredentials(ctx context.Context, _ *brokerpb.GetCredentialsRequest) (*brokerpb.GetCredentialsResponse, error) {
	began := time.Now()
	deadline := began.Add(maxCall)
	if callers, ok := ctx.Deadline(); ok && callers.Before(deadline) {
		deadline = callers
	}
	ctx, cancel := context.WithDeadline(ctx, deadline.Add(-replyMargin))
	defer cancel()
	call := Call{Entry: audit.Entry{Decision: audit.Deny}}
	entry := &call.Entry
	if p, ok := peer.FromContext(ctx); ok {
		entry.Peer = p.Addr.String()
		if host, _, err := net.SplitHostPort(entry.Peer); err == nil {
			ctx = identity.WithPeer(ctx, host)
		}
	}
	lease, err := b.decide(ctx, &call)
	if err != nil {
		entry.Reason, entry.Message = credential.ReasonOf(err), message(err)
	}
	// Queued before the response leaves: a decision that cannot be recorded does not take effect.
	if auditErr := b.cfg.Audit.Record(*entry); err == nil && auditErr != nil {
		err = auditErr
	}
	call.Err, call.Took = err, time.Since(began)
	for _, observe := range b.cfg.Observers {
		observe(ctx, call)
	}
	if err != nil {
		if credential.ReasonOf(err) == credential.ReasonInternal {
			b.cfg.Logger.ErrorContext(ctx, "Could not serve a call", "namespace", entry.Namespace, "pod", entry.Pod, "error", err)
		}
		return nil, brokerpb.ToStatus(err).Err()
	}
	return &brokerpb.GetCredentialsResponse{
		AccessKeyId:     lease.AccessKeyID,
		SecretAccessKey: lease.SecretAccessKey.Reveal(),
		SessionToken:    lease.SessionToken.Reveal(),
		Expiration:      timestamppb.New(lease.Expiration),
		RefreshAfter:    durationpb.New(lease.RefreshAfter),
		RoleArn:         lease.Role.String(),
		AccountId:       lease.Role.Account(),
		Region:          lease.Region,
	}, nil
}

// decide goes from the call's token to the session, and fills in call on the way. It turns a panic into an error, so that
// the call has its audit line.
func (b *Broker) decide(ctx context.Context, call *Call) (lease credential.Lease, err error) {
	defer func() {
		if p := recover(); p != nil {
			// The stack's arguments are addresses only.
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	token, err := bearer(ctx)
	if err != nil {
		return credential.Lease{}, err
	}
	id, err := b.cfg.Verifier.Verify(ctx, token)
	if err != nil {
		return credential.Lease{}, err
	}
	entry := &call.Entry
	entry.Namespace, entry.Pod, entry.PodUID, entry.ServiceAccount = id.Namespace, id.Name, id.UID, id.ServiceAccount
	if conn := connectionOf(ctx); conn != nil && !conn.Authenticated(id.Namespace, id.UID) {
		return credential.Lease{}, credential.Errorf(credential.ErrUnavailable, credential.ReasonBrokerBusy,
			"this broker has too many calls at once from this pod or from namespace %q; call another broker, or try again later", id.Namespace)
	}
	pod, ns, err := b.cfg.Binder.Bind(ctx, id)
	if err != nil {
		return credential.Lease{}, err
	}
	call.Pod = pod
	grant, err := b.cfg.Rules.Decide(ctx, pod, ns)
	if err != nil {
		return credential.Lease{}, err
	}
	entry.Role, entry.SessionName = grant.Role().String(), grant.SessionName()
	session, err := b.cfg.Sessions.Get(ctx, grant, pod.Namespace)
	if errors.Is(err, cache.ErrTenantFull) {
		err = credential.Errorf(credential.ErrDenied, credential.ReasonTooManyGrants,
			"namespace %q has the maximum of distinct sessions; let its pods share them, by equal annotations and a wider %q",
			pod.Namespace, b.cfg.Rules.Keys().Name(policy.SessionScope))
	}
	if err != nil {
		return credential.Lease{}, err
	}
	call.RenewalErr = session.Failure
	entry.Decision, entry.AccessKeyID, entry.Expiration = audit.Allow, session.AccessKeyID, session.Expiration
	region := b.cfg.Region
	if settings, err := pod.Request.Settings(); err == nil && settings.Region != "" {
		region = settings.Region
	}
	return credential.Lease{Credential: session.Credential, Role: grant.Role(), Region: region, RefreshAfter: session.RefreshAfter}, nil
}

// bearer returns the token of the call's metadata.
func bearer(ctx context.Context) (identity.UnverifiedToken, error) {
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) == 1 {
		// The scheme's case does not matter (RFC 9110, 11.1).
		if scheme, token, ok := strings.Cut(values[0], " "); ok && strings.EqualFold(scheme, "Bearer") {
			return identity.NewUnverifiedToken(token), nil
		}
	}
	return identity.UnverifiedToken{}, credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenMissing,
		`the call has no service-account token; send exactly one "authorization: Bearer TOKEN"`)
}

// message returns the part of err that may leave the process.
func message(err error) string {
	if e, ok := errors.AsType[*credential.Error](err); ok {
		return e.Message
	}
	return ""
}
