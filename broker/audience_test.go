package broker_test

import (
	"context"
	"io"
	"log/slog"
	"net"
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

// refusing is a verifier that answers with an error, and notes where calls come from.
type refusing struct {
	world

	err  error
	from *string
}

func (r refusing) Verify(ctx context.Context, _ identity.UnverifiedToken) (identity.Pod, error) {
	*r.from = identity.PeerOf(ctx)
	return identity.Pod{}, r.err
}

// A token that is genuine and made for another audience is the fault of a setting, and its pod is told. Of a token
// that proves nothing, nobody is told.
func TestTokenForAnotherAudienceIsPassedOn(t *testing.T) {
	pod := identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", ServiceAccountUID: "s-1"}
	refusal := func(cause error) error {
		return &credential.Error{Kind: credential.ErrUnauthenticated, Reason: credential.ReasonTokenAudience, Message: "set --audience", Cause: cause}
	}
	for name, tt := range map[string]struct {
		err     error
		expects func(identity.Pod) bool
		told    bool
	}{
		"of a pod that is there":   {refusal(&identity.OtherAudienceError{Pod: pod}), func(id identity.Pod) bool { return id == pod }, true},
		"of a pod that is not":     {refusal(&identity.OtherAudienceError{Pod: pod}), func(identity.Pod) bool { return false }, false},
		"where nothing is known":   {refusal(&identity.OtherAudienceError{Pod: pod}), nil, false},
		"that proves nothing":      {refusal(nil), func(identity.Pod) bool { return true }, false},
		"of nobody":                {refusal(&identity.OtherAudienceError{}), func(id identity.Pod) bool { return id == pod }, false},
		"and not for its audience": {credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenInvalid, "no"), func(identity.Pod) bool { return true }, false},
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
			var told []policy.Pod
			b, err := broker.New(broker.Config{
				Verifier: refusing{err: tt.err, from: &from}, Binder: world{}, Rules: rules, Sessions: world{}, Audit: decisions, Logger: log, Expects: tt.expects,
				Notify: func(pod policy.Pod, e *credential.Error) {
					if e.Reason != credential.ReasonTokenAudience {
						t.Errorf("told of %v", e)
					}
					told = append(told, pod)
				},
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
			if tt.told != (len(told) == 1) || tt.told && (told[0].Namespace != "shop" || told[0].Name != "cart-1" || told[0].UID != "u-1") {
				t.Errorf("told of %+v", told)
			}
			if from != "2001:db8::/64" {
				t.Errorf("the verifier was told that the call comes from %q", from)
			}
		})
	}
}
