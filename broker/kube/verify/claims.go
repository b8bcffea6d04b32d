package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

const (
	// clockLeeway is how far the API server's clock may be ahead of this broker's. It is what API servers grant each
	// other (go-jose's DefaultLeeway). Expiry has no leeway: a token is not accepted after its end.
	clockLeeway = time.Minute
	// earlyRetry is the longest time after which a caller with a token that is not valid yet tries again: either
	// clock may be set right at any moment.
	earlyRetry = time.Minute
	// maxNamespace and maxName are Kubernetes' own bounds. They bound the names that the broker holds of a
	// token that waits for its review.
	maxNamespace, maxName = 63, 253
)

// algorithms are those with which API servers sign service-account tokens: RS256 and ES256 with
// their own keys, any of these with an external signer (KEP-740). Naming them shuts out "none" and
// HMAC with a public key.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512}

// claims are the parts of a service-account token that are looked at.
type claims struct {
	jwt.Claims
	Kubernetes struct {
		Namespace      string   `json:"namespace"`
		Pod            *nameUID `json:"pod"`
		ServiceAccount *nameUID `json:"serviceaccount"`
	} `json:"kubernetes.io"`
}

type nameUID struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// parse reads the form of a token, and nothing that it says.
func parse(token identity.UnverifiedToken) (*jose.JSONWebSignature, error) {
	raw := token.Reveal()
	switch {
	case raw == "":
		return nil, unauthenticated(credential.ReasonTokenMissing, nil, "the call carries no service-account token")
	case len(raw) > identity.MaxTokenBytes:
		return nil, unauthenticated(credential.ReasonTokenInvalid, nil, "the token is longer than %d bytes", identity.MaxTokenBytes)
	}
	signed, err := jose.ParseSignedCompact(raw, algorithms)
	if other, ok := errors.AsType[*jose.ErrUnexpectedSignatureAlgorithm](err); ok {
		return nil, unauthenticated(credential.ReasonTokenInvalid, nil,
			"the token is signed with %q; only RS256, RS384, RS512, ES256, ES384 and ES512 are accepted", clip.Bytes(string(other.Got), maxClaimedKey))
	}
	if err != nil {
		return nil, unauthenticated(credential.ReasonTokenInvalid, err, "the token is not a signed service-account token")
	}
	return signed, nil
}

// parseClaims reads a token's payload. It is a quarter faster than go-jose's own reader, which matches names
// exactly and refuses those that stand twice: what API servers sign has neither.
func parseClaims(payload []byte) (c claims, err error) {
	if err := json.Unmarshal(payload, &c); err != nil {
		return claims{}, unauthenticated(credential.ReasonTokenInvalid, err, "the token's claims cannot be read")
	}
	return c, nil
}

// pod judges the claims, but for the issuer, and returns the pod that they name. It proves nothing of a token
// whose signature was not verified. A token for another audience that is as it should be otherwise is refused with
// the pod beside the error.
func (c claims) pod(audience string, maxLife time.Duration, now time.Time) (identity.Pod, error) {
	pod, err := c.bound(maxLife, now)
	if !slices.Contains(c.Audience, audience) {
		return pod, unauthenticated(credential.ReasonTokenAudience, nil,
			"the token is made for audience %q, and this broker accepts %q: set --audience of the webhook and of the broker to the same value "+
				"(the chart value audience sets both), then recreate the pod", clipped(strings.Join(c.Audience, ", ")), audience)
	}
	return pod, err
}

// bound judges the times and the subject of the claims, and returns the pod that they name.
func (c claims) bound(maxLife time.Duration, now time.Time) (identity.Pod, error) {
	if c.Expiry == nil {
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, nil, "the token never expires; use a bound token")
	}
	end := c.Expiry.Time()
	// Kubernetes sets both to the same second. Without them, only the rest of the life is known.
	first, last := now, now
	switch {
	case c.NotBefore != nil && c.IssuedAt != nil:
		first, last = c.NotBefore.Time(), c.IssuedAt.Time()
		if last.Before(first) {
			first, last = last, first
		}
	case c.NotBefore != nil:
		first, last = c.NotBefore.Time(), c.NotBefore.Time()
	case c.IssuedAt != nil:
		first, last = c.IssuedAt.Time(), c.IssuedAt.Time()
	}
	switch early := last.Sub(now); {
	case !now.Before(end):
		return identity.Pod{}, unauthenticated(credential.ReasonTokenExpired, nil, "the token expired at %s, and it is %s by this broker's clock",
			end.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case early > clockLeeway:
		return identity.Pod{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenEarly,
			RetryAfter: min(max(early-clockLeeway, time.Second), earlyRetry),
			Message: fmt.Sprintf("the token is valid from %s, and it is %s by this broker's clock; set the clocks of the broker's node and of the API server",
				last.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)),
		}
	case end.Sub(first) > maxLife:
		return identity.Pod{}, unauthenticated(credential.ReasonTokenLongLived, nil,
			"the token is valid for %s, and this broker accepts at most %s (--max-token-life); use the token that the kubelet projects into the sidecar",
			end.Sub(first).Round(time.Second), maxLife)
	}
	k := c.Kubernetes
	if k.Pod == nil || k.ServiceAccount == nil || slices.Contains([]string{k.Namespace, k.Pod.Name, k.Pod.UID, k.ServiceAccount.Name, k.ServiceAccount.UID}, "") {
		return identity.Pod{}, notPodBound()
	}
	if len(k.Namespace) > maxNamespace || max(len(k.Pod.Name), len(k.Pod.UID), len(k.ServiceAccount.Name), len(k.ServiceAccount.UID)) > maxName {
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, nil, "the token names a pod or service account that Kubernetes could not have: its name is too long")
	}
	if want := strings.Join([]string{"system:serviceaccount", k.Namespace, k.ServiceAccount.Name}, ":"); c.Subject != want {
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, nil, "the token's subject %q is not %q", clipped(c.Subject), clipped(want))
	}
	return identity.Pod{
		Namespace: k.Namespace, Name: k.Pod.Name, UID: k.Pod.UID,
		ServiceAccount: k.ServiceAccount.Name, ServiceAccountUID: k.ServiceAccount.UID,
	}, nil
}

// checkIssuer refuses claims of an issuer that is not among the accepted ones.
func (c claims) checkIssuer(accepted []string) error {
	if slices.Contains(accepted, c.Issuer) {
		return nil
	}
	return unauthenticated(credential.ReasonTokenIssuer, nil, "the token's issuer %q is not accepted", clipped(c.Issuer))
}

func notPodBound() error {
	return unauthenticated(credential.ReasonTokenNotPodBound, nil, "the token is not bound to a pod; use the one that kubelet projects")
}

// clipped is as much of a claim as a message may have: it is the caller's own text, and goes into logs.
func clipped(claim string) string { return clip.Bytes(claim, 200) }

// unauthenticated makes a refusal. Messages may quote claims, which are no secret, and never the
// token.
func unauthenticated(reason credential.Reason, cause error, format string, args ...any) error {
	e := credential.Errorf(credential.ErrUnauthenticated, reason, format, args...)
	e.Cause = cause
	return e
}
