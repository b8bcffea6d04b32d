package verify

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

const (
	// accountReviews per second, above accountBurst, is how often callers of one Account make the API server review a token.
	// Each process that reaches the debug pages can call, and people who command a broker need a few.
	accountReviews, accountBurst = 2, 10
	// accountTimeout limits one review.
	accountTimeout = 10 * time.Second
)

// Account verifies the tokens of one ServiceAccount. Everybody who may create tokens of that ServiceAccount can have one. The API server
// reviews each token, so that a deleted ServiceAccount takes effect at once.
type Account struct {
	client         authenticationv1client.TokenReviewInterface
	user, audience string
	limit          *rate.Limiter
}

// NewAccount returns the verifier of a ServiceAccount's tokens for an audience. It needs the right to create TokenReviews.
// All arguments are required.
func NewAccount(config *rest.Config, namespace, name, audience string) (*Account, error) {
	if config == nil || namespace == "" || name == "" || audience == "" {
		return nil, errors.New("a REST configuration, the namespace and name of a ServiceAccount, and an audience are required")
	}
	client, err := authenticationv1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client for TokenReviews: %w", err)
	}
	return &Account{
		client: client.TokenReviews(), user: "system:serviceaccount:" + namespace + ":" + name, audience: audience,
		limit: rate.NewLimiter(accountReviews, accountBurst),
	}, nil
}

// Verify returns nil if the token is one of the ServiceAccount for the audience. The error is a [*credential.Error], of kind
// credential.ErrUnavailable if Verify could not find out.
func (a *Account) Verify(ctx context.Context, token identity.UnverifiedToken) error {
	text := token.Reveal()
	switch {
	case text == "":
		return unauthenticated(credential.ReasonTokenMissing, nil, "there is no token")
	case len(text) > identity.MaxTokenBytes:
		return unauthenticated(credential.ReasonTokenInvalid, nil, "the token is longer than %d bytes", identity.MaxTokenBytes)
	case !a.limit.Allow():
		return notReviewed(errors.New("too many tokens at once"))
	}
	ctx, cancel := context.WithTimeout(ctx, accountTimeout)
	defer cancel()
	review, err := a.client.Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: text, Audiences: []string{a.audience}},
	}, metav1.CreateOptions{})
	switch {
	case err != nil:
		return notReviewed(err)
	case !review.Status.Authenticated && !isRefusal(review.Status.Error):
		return notReviewed(fmt.Errorf("the API server could not decide: %s", clipped(review.Status.Error)))
	case !review.Status.Authenticated:
		return unauthenticated(credential.ReasonTokenInvalid, errors.New(clipped(review.Status.Error)), "the API server does not accept the token for audience %q", a.audience)
	case !slices.Contains(review.Status.Audiences, a.audience):
		return unauthenticated(credential.ReasonTokenAudience, nil, "the API server does not confirm that the token is made for audience %q", a.audience)
	case review.Status.User.Username != a.user:
		return unauthenticated(credential.ReasonTokenInvalid, nil, "the token is not of %s", a.user)
	}
	return nil
}
