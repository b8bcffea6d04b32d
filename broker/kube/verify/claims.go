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
	// clockLeeway is how far the API server's clock may be ahead of this broker's. API servers grant each other the same
	// (go-jose's DefaultLeeway). Expiration has no leeway: an expired token is refused.
	clockLeeway = time.Minute
	// earlyRetry is the longest time after which a caller with a token that is not valid yet tries again, because an admin
	// may set either clock at any moment.
	earlyRetry = time.Minute
	// maxNamespace and maxName are Kubernetes' own limits. They bound the names that a token occupies while it waits for
	// its review.
	maxNamespace, maxName = 63, 253
	// maxClaim bounds a claim in an error, in bytes. The caller chooses the claim, and the error goes into logs.
	maxClaim = 200
)

// algorithms are those with which API servers sign service-account tokens: RS256 and ES256 with their own keys, all of
// these with an external signer (KEP-740). The list excludes "none", and HMAC with a public key as its secret.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512}

// claims are the claims of a service-account token that the broker uses.
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

// parse checks the form of a token. It does not read the claims.
func parse(token identity.UnverifiedToken) (*jose.JSONWebSignature, error) {
	raw := token.Reveal()
	switch {
	case raw == "":
		return nil, unauthenticated(credential.ReasonTokenMissing, nil, "the request has no service-account token")
	case len(raw) > identity.MaxTokenBytes:
		return nil, unauthenticated(credential.ReasonTokenInvalid, nil, "the token is longer than %d bytes", identity.MaxTokenBytes)
	}
	signed, err := jose.ParseSignedCompact(raw, algorithms)
	if other, ok := errors.AsType[*jose.ErrUnexpectedSignatureAlgorithm](err); ok {
		return nil, unauthenticated(credential.ReasonTokenInvalid, nil,
			"the token is signed with %q; only RS256, RS384, RS512, ES256, ES384 and ES512 are accepted", clip.Bytes(string(other.Got), maxMember))
	}
	if err != nil {
		return nil, unauthenticated(credential.ReasonTokenInvalid, err, "the token is not a signed service-account token")
	}
	return signed, nil
}

// parseClaims reads the payload of a token. It is a quarter faster than go-jose's reader, which matches names exactly and
// refuses duplicates. API servers sign neither other spellings nor duplicates.
func parseClaims(payload []byte) (c claims, err error) {
	if err := json.Unmarshal(payload, &c); err != nil {
		return claims{}, unauthenticated(credential.ReasonTokenInvalid, err, "cannot read the claims of the token")
	}
	return c, nil
}

// pod checks all claims except the issuer, and returns the pod that they name. This proves nothing if the signature was not
// verified. If only the audience is wrong, pod returns both the pod and the error.
func (c claims) pod(audience string, maxLife time.Duration, now time.Time) (identity.Pod, error) {
	pod, err := c.boundPod(maxLife, now)
	if !slices.Contains(c.Audience, audience) {
		return pod, unauthenticated(credential.ReasonTokenAudience, nil,
			"the token is made for audience %q, and this broker accepts %q: set --audience of the webhook and of the broker to the same value "+
				"(the chart value audience sets both), then recreate the pod", clipped(strings.Join(c.Audience, ", ")), audience)
	}
	return pod, err
}

// boundPod checks the times and the subject, and returns the pod that the claims name.
func (c claims) boundPod(maxLife time.Duration, now time.Time) (identity.Pod, error) {
	if err := c.checkTimes(maxLife, now); err != nil {
		return identity.Pod{}, err
	}
	k := c.Kubernetes
	if k.Pod == nil || k.ServiceAccount == nil || slices.Contains([]string{k.Namespace, k.Pod.Name, k.Pod.UID, k.ServiceAccount.Name, k.ServiceAccount.UID}, "") {
		return identity.Pod{}, notPodBound()
	}
	if len(k.Namespace) > maxNamespace || max(len(k.Pod.Name), len(k.Pod.UID), len(k.ServiceAccount.Name), len(k.ServiceAccount.UID)) > maxName {
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, nil, "the token names a pod or service account with a name longer than Kubernetes allows")
	}
	if want := strings.Join([]string{"system:serviceaccount", k.Namespace, k.ServiceAccount.Name}, ":"); c.Subject != want {
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, nil, "the token's subject %q is not %q", clipped(c.Subject), clipped(want))
	}
	return identity.Pod{
		Namespace: k.Namespace, Name: k.Pod.Name, UID: k.Pod.UID,
		ServiceAccount: k.ServiceAccount.Name, ServiceAccountUID: k.ServiceAccount.UID,
	}, nil
}

func (c claims) checkTimes(maxLife time.Duration, now time.Time) error {
	if c.Expiry == nil {
		return unauthenticated(credential.ReasonTokenInvalid, nil, "the token never expires; use a bound token")
	}
	end := c.Expiry.Time()
	// Kubernetes sets both to the same second. If both are missing, only the time left is known.
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
		return unauthenticated(credential.ReasonTokenExpired, nil, "the token expired at %s, and the broker's clock says %s",
			end.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case early > clockLeeway:
		return &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenEarly,
			RetryAfter: min(max(early-clockLeeway, time.Second), earlyRetry),
			Message: fmt.Sprintf("the token is valid from %s, and the broker's clock says %s; set the clocks of the broker's node and of the API server",
				last.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)),
		}
	case end.Sub(first) > maxLife:
		return unauthenticated(credential.ReasonTokenLongLived, nil,
			"the token is valid for %s, and this broker accepts at most %s (--max-token-life); use the token that the kubelet projects into the sidecar",
			end.Sub(first).Round(time.Second), maxLife)
	}
	return nil
}

// checkIssuer refuses claims whose issuer is not accepted.
func (c claims) checkIssuer(accepted []string) error {
	if slices.Contains(accepted, c.Issuer) {
		return nil
	}
	return unauthenticated(credential.ReasonTokenIssuer, nil, "the token's issuer %q is not accepted; use a token of this cluster, or set --issuer", clipped(c.Issuer))
}

func notPodBound() error {
	return unauthenticated(credential.ReasonTokenNotPodBound, nil, "the token is not bound to a pod; use the one that the kubelet projects")
}

func clipped(claim string) string { return clip.Bytes(claim, maxClaim) }

// unauthenticated returns a refusal. Its message may quote claims, which are not secret, but never the token.
func unauthenticated(reason credential.Reason, cause error, format string, args ...any) error {
	e := credential.Errorf(credential.ErrUnauthenticated, reason, format, args...)
	e.Cause = cause
	return e
}
