// Package verify verifies the service-account tokens of pods: offline with the API server's published signing keys
// ([JWKS]), or by asking the API server about each token ([TokenReview]).
//
// It promises that a token that both accept belongs to a pod, was made for our audience by an accepted issuer, and is
// within its life, which is bounded. A flood of worthless tokens neither keeps others from being verified, nor reaches
// the API server. An error says whether the token is bad or the API server could not be asked. No error, log or panic
// holds a token.
//
// It does not say whether the pod still exists: broker/kube's Directory does. It decides nothing about roles.
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

// DefaultMaxTokenLife is the longest life of a token that is accepted unless configured otherwise. The webhook has the
// kubelet request tokens for 24 hours at most. An API server extends the life of tokens
// (--service-account-extend-token-expiration) only if they are for its own audience. A longer life means that
// somebody made the token with the TokenRequest API, such as by kubectl create token --duration: such a token can be
// replayed for as long as its pod lives.
const DefaultMaxTokenLife = 25 * time.Hour

// Config configures [NewJWKS] and [NewTokenReview].
type Config struct {
	// REST reaches the API server. [TokenReview] needs the right to create TokenReviews. Required.
	REST *rest.Config
	// Audience is the audience that tokens must be made for. Required.
	Audience string
	// Issuers are the accepted issuers. Default: for [JWKS] the issuer that the API server's discovery document names,
	// for [TokenReview] all that the API server accepts.
	Issuers []string
	// MaxLife is the longest life of an accepted token, from its first to its last second. Default:
	// DefaultMaxTokenLife.
	MaxLife time.Duration
	// Expected reports whether the pod exists that a token claims to be of. It must not block. [TokenReview] uses it
	// only to order reviews, and to choose the tokens for another audience that it reviews; [JWKS] does not use it.
	// Default: no pod is expected.
	Expected func(claimed identity.Pod) bool
	// Logger. Required.
	Logger *slog.Logger
}

// verifier is what both ways to verify have.
type verifier struct {
	cfg   Config
	turns *turns
}

// newVerifier checks cfg and sets its defaults.
func newVerifier(cfg Config, turns *turns) (verifier, error) {
	if cfg.REST == nil || cfg.Logger == nil {
		return verifier{}, errors.New("a REST configuration and a Logger are required")
	}
	if cfg.Audience == "" {
		return verifier{}, errors.New("no audience: tokens made for any other service would be accepted; set --audience")
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

// otherAudience adds the pod of a verified token to its refusal, if it is refused for its audience alone.
func otherAudience(pod identity.Pod, err error) (identity.Pod, error) {
	if err == nil || pod == (identity.Pod{}) {
		return pod, err
	}
	if e, ok := errors.AsType[*credential.Error](err); ok {
		e.Cause = &identity.OtherAudienceError{Pod: pod}
	}
	return identity.Pod{}, err
}
