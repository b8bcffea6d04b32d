package verify_test

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/kube/verify"
)

// TestAccount accepts only tokens of one ServiceAccount for one audience.
func TestAccount(t *testing.T) {
	const user, audience = "system:serviceaccount:credence:commands", "credence-broker-commands"
	good := authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{audience}, User: authenticationv1.UserInfo{Username: user}}
	with := func(change func(*authenticationv1.TokenReviewStatus)) authenticationv1.TokenReviewStatus {
		s := good
		change(&s)
		return s
	}
	for _, tt := range []struct {
		name, token string
		status      authenticationv1.TokenReviewStatus
		code        int
		want        error
	}{
		{"a token of the account", "a.b.c", good, 0, nil},
		{"no token", "", good, 0, credential.ErrUnauthenticated},
		{"an endless token", strings.Repeat("x", identity.MaxTokenBytes+1), good, 0, credential.ErrUnauthenticated},
		{"a token of another account", "a.b.c", with(func(s *authenticationv1.TokenReviewStatus) { s.User.Username += "2" }), 0, credential.ErrUnauthenticated},
		{"a token of a user with that name", "a.b.c", with(func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "commands" }), 0, credential.ErrUnauthenticated},
		{"a token for another audience", "a.b.c", with(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"credence-broker"} }), 0, credential.ErrUnauthenticated},
		{"a review without audiences", "a.b.c", with(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }), 0, credential.ErrUnauthenticated},
		{"a refused token", "a.b.c", authenticationv1.TokenReviewStatus{Error: "invalid bearer token"}, 0, credential.ErrUnauthenticated},
		{"an unclear review", "a.b.c", authenticationv1.TokenReviewStatus{Error: "the webhook does not respond"}, 0, credential.ErrUnavailable},
		{"an API server that fails", "a.b.c", good, http.StatusInternalServerError, credential.ErrUnavailable},
	} {
		synctest.Test(t, func(t *testing.T) {
			server := &reviewer{code: tt.code, change: func(r *authenticationv1.TokenReview) { r.Status = tt.status }}
			a, err := verify.NewAccount(apitest.Serve(t, server).Config(), "credence", "commands", audience)
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Verify(t.Context(), identity.NewUnverifiedToken(tt.token)); !errors.Is(err, tt.want) {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
		})
	}
}

// TestAccountLimit limits the reviews that clients of the debug pages cause.
func TestAccountLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &reviewer{}
		a, err := verify.NewAccount(apitest.Serve(t, server).Config(), "credence", "commands", "audience")
		if err != nil {
			t.Fatal(err)
		}
		unavailable := 0
		for range 100 {
			if errors.Is(a.Verify(t.Context(), identity.NewUnverifiedToken("x")), credential.ErrUnavailable) {
				unavailable++
			}
		}
		if n := server.reviews.Load(); n != 10 || unavailable != 90 {
			t.Errorf("%d reviews, %d calls are refused for now", n, unavailable)
		}
	})
	for _, names := range [][3]string{{"", "a", "b"}, {"a", "", "b"}, {"a", "b", ""}} {
		if _, err := verify.NewAccount(apitest.Serve(t, http.NotFoundHandler()).Config(), names[0], names[1], names[2]); err == nil {
			t.Errorf("%q are accepted", names)
		}
	}
}
