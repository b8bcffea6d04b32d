package broker_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// steps are the steps of a call; each is that of world unless the test sets it.
type steps struct {
	world
	verify, bind, get func(ctx context.Context) error
}

func (s steps) Verify(ctx context.Context, token identity.UnverifiedToken) (identity.Pod, error) {
	if s.verify != nil {
		return identity.Pod{}, s.verify(ctx)
	}
	return s.world.Verify(ctx, token)
}

func (s steps) Bind(ctx context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	if s.bind != nil {
		return policy.Pod{}, policy.Namespace{}, s.bind(ctx)
	}
	return s.world.Bind(ctx, id)
}

func (s steps) Get(ctx context.Context, g policy.Grant, namespace string) (cache.Value, error) {
	if s.get != nil {
		return cache.Value{}, s.get(ctx)
	}
	return s.world.Get(ctx, g, namespace)
}

// newStepped returns a broker with the given steps. Tests call it without a connection.
func newStepped(t *testing.T, s steps, w io.Writer, observe func(broker.Call)) (b *broker.Broker, end func()) {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	fatal(t, err)
	rules, err := policy.New(policy.Config{Keys: keys})
	fatal(t, err)
	log := slog.New(slog.DiscardHandler)
	decisions, err := audit.New(audit.Config{Writer: w, Logger: log})
	fatal(t, err)
	b, err = broker.New(broker.Config{
		Verifier: s, Binder: s, Rules: rules, Sessions: s, Audit: decisions, Logger: log,
		Observers: []broker.Observer{func(_ context.Context, call broker.Call) {
			if observe != nil {
				observe(call)
			}
		}},
	})
	fatal(t, err)
	return b, func() {
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		_ = decisions.Run(ended) // writes the queued lines
	}
}

func bearing(t *testing.T) context.Context {
	return metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer x"))
}

// Each call has one line in the audit log, whatever its outcome, with the same message that the pod gets.
func TestAuditLineOfEachOutcome(t *testing.T) {
	refuse := func(kind error, reason credential.Reason) func(context.Context) error {
		return func(context.Context) error {
			e := credential.Errorf(kind, reason, "for the pod")
			e.Cause = errors.New("for the operator: " + secret)
			return fmt.Errorf("doing this with %s: %w", secret, e)
		}
	}
	for name, tt := range map[string]struct {
		steps   steps
		reason  credential.Reason
		message string
		role    bool // the line has the role of the grant
	}{
		"credentials":                           {steps{}, "", "", true},
		"refused by STS":                        {steps{get: refuse(credential.ErrDenied, credential.ReasonSTSDenied)}, credential.ReasonSTSDenied, "for the pod", true},
		"rejected by STS":                       {steps{get: refuse(credential.ErrInvalid, credential.ReasonSTSRejected)}, credential.ReasonSTSRejected, "for the pod", true},
		"throttled by STS":                      {steps{get: refuse(credential.ErrUnavailable, credential.ReasonSTSThrottled)}, credential.ReasonSTSThrottled, "for the pod", true},
		"STS fails with another error":          {steps{get: func(context.Context) error { return errors.New(secret) }}, credential.ReasonInternal, "", true},
		"pod is gone":                           {steps{bind: refuse(credential.ErrNotFound, credential.ReasonPodNotFound)}, credential.ReasonPodNotFound, "for the pod", false},
		"binding fails with another error":      {steps{bind: func(context.Context) error { return errors.New(secret) }}, credential.ReasonInternal, "", false},
		"token is refused":                      {steps{verify: refuse(credential.ErrUnauthenticated, credential.ReasonTokenExpired)}, credential.ReasonTokenExpired, "for the pod", false},
		"verification fails with another error": {steps{verify: func(context.Context) error { return errors.New(secret) }}, credential.ReasonInternal, "", false},
		"a panic":                               {steps{get: func(context.Context) error { panic(secret) }}, credential.ReasonInternal, "", true},
		"a panic before the decision":           {steps{verify: func(context.Context) error { panic(secret) }}, credential.ReasonInternal, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			var audited lines
			var observed []broker.Call
			b, end := newStepped(t, tt.steps, &audited, func(c broker.Call) { observed = append(observed, c) })
			got, err := b.GetCredentials(bearing(t), &brokerpb.GetCredentialsRequest{})
			if reason := credential.ReasonOf(brokerpb.FromError(err)); reason != tt.reason || (got != nil) != (tt.reason == "") {
				t.Errorf("the response is there: %v, with reason %q, want %q", got != nil, reason, tt.reason)
			}
			end()
			if n := strings.Count(audited.buf.String(), "\n"); n != 1 {
				t.Fatalf("%d audit lines, want 1:\n%s", n, audited.buf.String())
			}
			e := audited.last(t, 1) // which fails for a secret
			want := audit.Deny
			if tt.reason == "" {
				want = audit.Allow
			}
			if e.Decision != want || e.Reason != tt.reason || e.Message != tt.message {
				t.Errorf("the audit entry is %+v, want %s, %q, %q", e, want, tt.reason, tt.message)
			}
			if allowed := want == audit.Allow; (e.AccessKeyID != "") != allowed || e.Expiration.IsZero() == allowed {
				t.Errorf("the audit entry has the session %q until %s with the outcome %s", e.AccessKeyID, e.Expiration, want)
			}
			if (e.Role != "") != tt.role || (e.SessionName != "") != tt.role || (tt.role && e.Pod != cart.Identity.Name) {
				t.Errorf("the audit entry has role %q, session name %q, pod %q", e.Role, e.SessionName, e.Pod)
			}
			if len(observed) != 1 {
				t.Fatalf("the observer was notified of %d calls, want 1", len(observed))
			}
			c := observed[0]
			if c.Entry.Decision != e.Decision || c.Entry.Reason != e.Reason || c.Entry.Message != e.Message || credential.ReasonOf(c.Err) != tt.reason {
				t.Errorf("the observer was notified of %+v, the audit log has %+v", c.Entry, e)
			}
		})
	}
}

// If a step hangs, the call ends before its caller's deadline, or after 30 s.
func TestCallsAreBounded(t *testing.T) {
	hang := func(ctx context.Context) error {
		<-ctx.Done()
		return credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSUnavailable, "it took too long")
	}
	for name, s := range map[string]steps{"verifying": {verify: hang}, "binding": {bind: hang}, "fetching": {get: hang}} {
		for _, tt := range []struct{ deadline, want time.Duration }{
			{0, 30*time.Second - 50*time.Millisecond}, // no deadline
			{time.Hour, 30*time.Second - 50*time.Millisecond},
			{10 * time.Second, 10*time.Second - 50*time.Millisecond},
		} {
			t.Run(fmt.Sprintf("%s, %s", name, tt.deadline), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b, _ := newStepped(t, s, io.Discard, nil)
					ctx := bearing(t)
					if tt.deadline != 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, tt.deadline)
						defer cancel()
					}
					began := time.Now()
					_, err := b.GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
					if took := time.Since(began); took != tt.want || credential.ReasonOf(brokerpb.FromError(err)) != credential.ReasonSTSUnavailable {
						t.Errorf("took %s, want %s (%v)", took, tt.want, err)
					}
				})
			})
		}
	}
}
