// Package verify verifies the service-account tokens of pods: offline with the API server's published signing keys
// ([JWKS]), or with a review by the API server for each token ([TokenReview]).
//
// It guarantees: an accepted token is bound to a pod, was made for our audience by an accepted issuer, and has not expired;
// its lifetime is bounded; a flood of worthless tokens does not delay other callers, and does not become a flood on
// the API server; an error says whether the token is bad or the API server is unavailable; no error and no log contains a
// token.
//
// It does not check whether the pod still exists; package kube's Directory does. It does not decide about roles.
package verify

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

// DefaultMaxTokenLife is the default of [Config.MaxLife]. The webhook makes the kubelet request tokens of 24 hours at most.
// An API server extends the lifetime of tokens (--service-account-extend-token-expiration) only for its own audience. So a
// token with a longer lifetime comes from the TokenRequest API, for example from kubectl create token --duration, and can
// be replayed for as long as its pod exists.
const DefaultMaxTokenLife = 25 * time.Hour

// Config configures [NewJWKS] and [NewTokenReview].
type Config struct {
	// REST reaches the API server. [TokenReview] needs the right to create TokenReviews. Required.
	REST *rest.Config
	// Audience is the audience that a token must have. Required.
	Audience string
	// Issuers are the accepted issuers. Default: for [JWKS] the issuer in the API server's discovery document, for
	// [TokenReview] every issuer that the API server accepts.
	Issuers []string
	// MaxLife is the longest accepted lifetime of a token, from its first to its last second. Default:
	// DefaultMaxTokenLife.
	MaxLife time.Duration
	// Expected reports whether the pod that a token claims exists. It must not block. [TokenReview] uses it to order
	// reviews, and reviews tokens for another audience only for expected pods. [JWKS] does not use it. Default: no pod is
	// expected.
	Expected func(claimed identity.Pod) bool
	// Logger. Required.
	Logger *slog.Logger
}

// verifier is the part that JWKS and TokenReview share.
type verifier struct {
	cfg   Config
	turns *turns // for one verification each
}

// newVerifier checks cfg and sets its defaults.
func newVerifier(cfg Config, turns *turns) (verifier, error) {
	if cfg.REST == nil || cfg.Logger == nil {
		return verifier{}, errors.New("a REST configuration and a Logger are required")
	}
	if cfg.Audience == "" {
		return verifier{}, errors.New("no audience: the broker would accept tokens for any other service; set --audience")
	}
	if cfg.MaxLife == 0 {
		cfg.MaxLife = DefaultMaxTokenLife
	}
	if cfg.MaxLife < 0 {
		return verifier{}, fmt.Errorf("--max-token-life=%s: must be positive", cfg.MaxLife)
	}
	if cfg.Expected == nil {
		cfg.Expected = func(identity.Pod) bool { return false }
	}
	return verifier{cfg, turns}, nil
}

// Waiting returns the number of tokens that wait to be verified.
func (v verifier) Waiting() int {
	_, waiting := v.turns.state()
	return waiting
}

// withPod adds the pod of a verified token to err, if its audience is the only reason for the refusal.
func withPod(pod identity.Pod, err error) error {
	if e, ok := errors.AsType[*credential.Error](err); ok && pod != (identity.Pod{}) {
		e.Cause = &identity.OtherAudienceError{Pod: pod}
	}
	return err
}
