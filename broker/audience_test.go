package broker_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// refusing is a verifier that refuses with err and records the caller's address in from.
type refusing struct {
	world

	err  error
	from *string
}

func (r refusing) Verify(ctx context.Context, _ identity.UnverifiedToken) (identity.Pod, error) {
	*r.from = identity.PeerOf(ctx)
	return identity.Pod{}, r.err
}

// reports records the pods of reported refusals.
type reports struct {
	refused []policy.Pod
	reasons []credential.Reason
}

func (r *reports) Refused(pod policy.Pod, refusal *credential.Error) {
	r.refused, r.reasons = append(r.refused, pod), append(r.reasons, refusal.Reason)
}
func (r *reports) Shadowed(policy.Pod, string)               {}
func (r *reports) Unavailable(policy.Pod, *credential.Error) {}

// A genuine token for another audience shows wrong settings, so the broker reports it on the pod. It reports nothing for a
// token that proves no identity.
func TestTokenForAnotherAudienceIsReported(t *testing.T) {
	pod := identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", ServiceAccountUID: "s-1"}
	refusal := func(cause error) error {
		return &credential.Error{Kind: credential.ErrUnauthenticated, Reason: credential.ReasonTokenAudience, Message: "set --audience", Cause: cause}
	}
	for name, tt := range map[string]struct {
		err      error
		expects  func(identity.Pod) bool
		reported bool
	}{
		"of a known pod":            {refusal(&identity.OtherAudienceError{Pod: pod}), func(id identity.Pod) bool { return id == pod }, true},
		"of an unknown pod":         {refusal(&identity.OtherAudienceError{Pod: pod}), func(identity.Pod) bool { return false }, false},
		"without an identity":       {refusal(nil), func(identity.Pod) bool { return true }, false},
		"of no pod":                 {refusal(&identity.OtherAudienceError{}), func(id identity.Pod) bool { return id == pod }, false},
		"refused for another cause": {credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenInvalid, "no"), func(identity.Pod) bool { return true }, false},
	} {
		t.Run(name, func(t *testing.T) {
			keys, err := policy.NewKeys(policy.DefaultPrefix)
			if err != nil {
				t.Fatal(err)
			}
			rules, err := policy.New(policy.Config{Keys: keys})
			if err != nil {
				t.Fatal(err)
			}
			log := slog.New(slog.DiscardHandler)
			decisions, err := audit.New(audit.Config{Writer: io.Discard, Logger: log})
			if err != nil {
				t.Fatal(err)
			}
			var from string
			var reported reports
			impairments, err := broker.NewImpairments(broker.ImpairmentsConfig{
				Impaired: func(broker.Impairment) {}, Recovered: func(broker.Impairment) {}, Logger: log,
			})
			if err != nil {
				t.Fatal(err)
			}
			b, err := broker.New(broker.Config{
				Verifier: refusing{err: tt.err, from: &from}, Binder: world{}, Rules: rules, Sessions: world{}, Audit: decisions, Logger: log,
				Observers: []broker.Observer{broker.ReportTo(&reported, tt.expects, impairments)},
			})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			ctx = peer.NewContext(ctx, &peer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 4711}})
			ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", "Bearer x"))
			if _, err := b.GetCredentials(ctx, &brokerpb.GetCredentialsRequest{}); err == nil {
				t.Error("the token was accepted")
			}
			var want reports
			if tt.reported {
				want.Refused(policy.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1"}, &credential.Error{Reason: credential.ReasonTokenAudience})
			}
			if !slices.Equal(reported.refused, want.refused) || !slices.Equal(reported.reasons, want.reasons) {
				t.Errorf("reported %+v, want %+v", reported, want)
			}
			if from != "2001:db8::/64" {
				t.Errorf("the verifier received %q as the caller's address, want 2001:db8::/64", from)
			}
		})
	}
}
