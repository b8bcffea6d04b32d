package verify_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/kube/verify"
)

// reviewer makes token reviews as an API server does, or differently if change says so.
type reviewer struct {
	reviews atomic.Int64
	current atomic.Int64 // reviews under way
	highest atomic.Int64 // the highest number of reviews under way

	mu     sync.Mutex
	takes  time.Duration                       // guarded by mu
	code   int                                 // unless 0: refuse requests with it; guarded by mu
	change func(*authenticationv1.TokenReview) // guarded by mu
}

func (s *reviewer) set(change func(*reviewer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *reviewer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.reviews.Add(1)
	defer s.current.Add(-1)
	if n := s.current.Add(1); n > s.highest.Load() {
		s.highest.Store(n)
	}
	s.mu.Lock()
	takes, code, change := s.takes, s.code, s.change
	s.mu.Unlock()
	time.Sleep(takes)
	w.Header().Set("Content-Type", "application/json")
	if code != 0 {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Code: int32(code), Reason: metav1.StatusReasonForbidden})
		return
	}
	var review authenticationv1.TokenReview
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if strings.Count(review.Spec.Token, ".") == 2 {
		review.Status = authenticationv1.TokenReviewStatus{
			Authenticated: true, Audiences: review.Spec.Audiences,
			User: authenticationv1.UserInfo{Username: "system:serviceaccount:shop:cart", UID: "s-1", Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": {"cart-1"}, "authentication.kubernetes.io/pod-uid": {"u-1"},
			}},
		}
		if change != nil {
			change(&review)
		}
	}
	_ = json.NewEncoder(w).Encode(review)
}

func startReviewer(t *testing.T) (*reviewer, *rest.Config) {
	t.Helper()
	s := new(reviewer)
	mux := http.NewServeMux()
	mux.Handle("POST /apis/authentication.k8s.io/v1/tokenreviews", s)
	return s, apitest.Serve(t, mux).Config()
}

func newReview(t *testing.T, config *rest.Config, issuers ...string) *verify.TokenReview {
	t.Helper()
	v, err := verify.NewTokenReview(verify.Config{REST: config, Audience: audience, Issuers: issuers, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestResultsOfReviews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, config := startReviewer(t)
		key := newSigner(t, "a")
		status := func(change func(*authenticationv1.TokenReviewStatus)) func(*authenticationv1.TokenReview) {
			return func(r *authenticationv1.TokenReview) { change(&r.Status) }
		}
		says := func(text string) func(*authenticationv1.TokenReview) {
			return func(r *authenticationv1.TokenReview) { r.Status = authenticationv1.TokenReviewStatus{Error: text} }
		}
		extra := func(field string, values ...string) func(*authenticationv1.TokenReview) {
			return status(func(s *authenticationv1.TokenReviewStatus) {
				s.User.Extra["authentication.kubernetes.io/"+field] = values
			})
		}
		for _, tt := range []struct {
			name   string
			change func(*authenticationv1.TokenReview)
			want   credential.Reason
		}{
			{"the token's pod", nil, ""},
			{"our audience and another", status(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = append(s.Audiences, "x") }), ""},
			{"a refusal", says(""), credential.ReasonTokenInvalid},
			{"a refusal with its reason", says("[invalid bearer token, service account token has been invalidated]"), credential.ReasonTokenInvalid},
			{"expired", says("[invalid bearer token, service account token has expired]"), credential.ReasonTokenExpired},
			{"not valid yet", says("[invalid bearer token, service account token is not valid yet]"), credential.ReasonTokenEarly},
			{"issued in the future", says("[invalid bearer token, service account token is issued in the future]"), credential.ReasonTokenEarly},
			{"a webhook's certificate has expired", says("Post \"https://authenticator.example\": x509: certificate has expired"), credential.ReasonAPIServerUnavailable},
			{"an unknown text", says("unknown"), credential.ReasonAPIServerUnavailable},
			{"a webhook did not respond", says("Post \"https://authenticator.example\": context deadline exceeded"), credential.ReasonAPIServerUnavailable},
			// An authenticator that does not support audiences.
			{"no audience", status(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }), credential.ReasonTokenAudience},
			{"another audience", status(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"x"} }), credential.ReasonTokenAudience},
			{"no pod", extra("pod-name"), credential.ReasonTokenNotPodBound},
			{"no UID of the pod", extra("pod-uid"), credential.ReasonTokenNotPodBound},
			{"two pods", extra("pod-name", "cart-1", "cart-2"), credential.ReasonTokenNotPodBound},
			{"a pod that the token does not claim", extra("pod-name", "cart-2"), credential.ReasonTokenInvalid},
			{"another UID of the pod", extra("pod-uid", "u-2"), credential.ReasonTokenInvalid},
			{"no UID of the service account", status(func(s *authenticationv1.TokenReviewStatus) { s.User.UID = "" }), credential.ReasonTokenNotPodBound},
			{"another UID of the service account", status(func(s *authenticationv1.TokenReviewStatus) { s.User.UID = "s-2" }), credential.ReasonTokenInvalid},
			{"a user that is not a service account", status(func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "admin" }), credential.ReasonTokenNotPodBound},
			{"another service account", status(func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:bank:cart" }), credential.ReasonTokenInvalid},
		} {
			server.set(func(s *reviewer) { s.change = tt.change })
			// A new verifier for each, so that no earlier review counts.
			if wantReason(t, newReview(t, config), key.token(t, nil), tt.want); t.Failed() {
				t.Fatalf("the review was %q", tt.name)
			}
		}
	})
}

func TestNoReviewForTokensThatRefuteThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, config := startReviewer(t)
		v, key, now := newReview(t, config, issuer), newSigner(t, "a"), time.Now()
		for _, tt := range []struct {
			token identity.UnverifiedToken
			want  credential.Reason
		}{
			{identity.UnverifiedToken{}, credential.ReasonTokenMissing},
			{identity.NewUnverifiedToken("x"), credential.ReasonTokenInvalid},
			{identity.NewUnverifiedToken(strings.Repeat("a", identity.MaxTokenBytes+1)), credential.ReasonTokenInvalid},
			{key.token(t, func(c map[string]any) { c["exp"] = now.Unix() }), credential.ReasonTokenExpired},
			{key.token(t, func(c map[string]any) { c["aud"] = "x" }), credential.ReasonTokenAudience},
			{key.token(t, func(c map[string]any) { c["iss"] = "https://elsewhere.example" }), credential.ReasonTokenIssuer},
			{key.token(t, func(c map[string]any) { delete(c, "kubernetes.io") }), credential.ReasonTokenNotPodBound},
		} {
			wantReason(t, v, tt.token, tt.want)
		}
		if n := server.reviews.Load(); n != 0 {
			t.Errorf("%d reviews were made, want none: the text of each token is reason enough", n)
		}
	})
}

func TestReviewsAreJoinedKeptAndForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, config := startReviewer(t)
		server.set(func(s *reviewer) { s.takes = time.Second })
		v, key := newReview(t, config), newSigner(t, "a")
		token := key.token(t, nil)
		var calls sync.WaitGroup
		for range 100 {
			calls.Go(func() { wantReason(t, v, token, "") })
		}
		calls.Wait()
		if n := server.reviews.Load(); n != 1 {
			t.Errorf("100 calls with one token caused %d reviews, want 1", n)
		}
		time.Sleep(9 * time.Second)
		wantReason(t, v, token, "")
		if n := server.reviews.Load(); n != 1 {
			t.Errorf("9 s later there were %d reviews, want 1", n)
		}
		server.set(func(s *reviewer) {
			s.change = func(r *authenticationv1.TokenReview) { r.Status = authenticationv1.TokenReviewStatus{} }
		})
		time.Sleep(2 * time.Second)
		wantReason(t, v, token, credential.ReasonTokenInvalid)
		// A refusal is not cached.
		server.set(func(s *reviewer) { s.change = nil })
		wantReason(t, v, token, "")

		// No token is cached beyond its expiration.
		short := key.token(t, func(c map[string]any) { c["exp"] = time.Now().Add(4 * time.Second).Unix() })
		wantReason(t, v, short, "")
		time.Sleep(4 * time.Second)
		wantReason(t, v, short, credential.ReasonTokenExpired)
	})
}

func TestReviewsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, config := startReviewer(t)
		server.set(func(s *reviewer) { s.takes = time.Second })
		v, key := newReview(t, config), newSigner(t, "a")
		var calls sync.WaitGroup
		for i := range 200 {
			token := key.token(t, func(c map[string]any) { c["jti"] = fmt.Sprint(i) })
			calls.Go(func() { wantReason(t, v, token, "") })
		}
		calls.Wait()
		if n := server.highest.Load(); n != 32 {
			t.Errorf("%d reviews were under way at once, want 32", n)
		}
	})
}

func TestReviewWithoutRightsOrServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, config := startReviewer(t)
		server.set(func(s *reviewer) { s.code = http.StatusForbidden })
		v, key := newReview(t, config), newSigner(t, "a")
		ctx, stop := withCancel(t)
		defer stop()
		go func() { _ = v.Run(ctx) }()
		synctest.Wait()
		if v.Ready() {
			t.Error("Ready is true without the right to create reviews")
		}
		wantReason(t, v, key.token(t, nil), credential.ReasonAPIServerUnavailable)
		time.Sleep(time.Minute)
		if age := v.Age(); age < time.Minute {
			t.Errorf("after a minute without a review Age is %s", age)
		}
		server.set(func(s *reviewer) { s.code = 0 })
		time.Sleep(11 * time.Second)
		if !v.Ready() || v.Age() != 0 {
			t.Errorf("with the right to create reviews, Ready is %t and Age is %s", v.Ready(), v.Age())
		}
		wantReason(t, v, key.token(t, nil), "")
	})
}

func TestNewTokenReviewNeedsAnAudience(t *testing.T) {
	_, err := verify.NewTokenReview(verify.Config{REST: &rest.Config{}, Logger: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "--audience") {
		t.Errorf("got error %v, want one that names --audience", err)
	}
}
