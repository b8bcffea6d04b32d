package verify

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

const (
	// reviewsAtOnce bounds the concurrent reviews. An API server responds within milliseconds, so this allows thousands a
	// second. If many sidecars request at once, they wait here by turns, not at the API server.
	reviewsAtOnce = 32
	// reviewsOfVerified bounds further reviews, only for tokens that were verified before. An API server that calls an
	// authenticating webhook for unknown tokens may take seconds for each of those.
	reviewsOfVerified = 4
	// reviewTimeout bounds one review. An API server waits for its authenticating webhook for 30 s by default; sidecars do
	// not wait that long.
	reviewTimeout = 10 * time.Second
	// acceptedFor is how long an accepted token needs no further review. API servers cache reviews as long. The watches
	// notice earlier that the pod or service account was deleted.
	acceptedFor = 10 * time.Second
	// maxAccepted bounds the accepted tokens in memory, at about 400 bytes each. A broker responds to fewer calls in
	// acceptedFor. Above the limit, each call needs a review.
	maxAccepted = 20_000
	// maxRecent bounds the recently verified tokens in each of two sets, at about 50 bytes each.
	maxRecent = 50_000
)

// An API server has these extra fields for a user that is a pod's service account.
const (
	extraPodName = "authentication.kubernetes.io/pod-name"
	extraPodUID  = "authentication.kubernetes.io/pod-uid"
)

// TokenReview verifies tokens by a review of the API server for each. It implements [identity.Verifier].
//
// It refuses a token without a review if the token's own text is reason enough: malformed, another audience, expired, a
// lifetime that is too long, or no pod. For another audience it makes a review only if the token claims an expected pod, so
// that an Event can be written on that pod. For everything else the API server decides, the audience included.
type TokenReview struct {
	verifier
	client authenticationv1client.TokenReviewInterface

	mu       sync.Mutex
	pending  map[digest]*pendingReview // :: token → its review; guarded by mu
	accepted map[digest]acceptedToken  // guarded by mu
	// Recently verified tokens get their turns earlier. The older set has those that were not seen since recent reached
	// maxRecent; guarded by mu.
	recent, older map[digest]struct{}
	ready         bool      // the API server has made a review for the broker; guarded by mu
	lastReview    time.Time // guarded by mu
	failing       bool      // the last review failed; guarded by mu
}

// digest stands for a token. So a printed map does not reveal a token.
type digest [sha256.Size]byte

// acceptedToken is the result of a review.
type acceptedToken struct {
	pod   identity.Pod
	until time.Time
}

// pendingReview is the review of one token that waits for its turn or is in flight. All callers with that token share it.
type pendingReview struct {
	callers int           // those that wait; guarded by the TokenReview's mu
	begun   bool          // the review has its turn; guarded by the TokenReview's mu
	cancel  func()        // stops the wait for a turn
	done    chan struct{} // closed when pod and err are set
	pod     identity.Pod
	err     error
}

var _ identity.Verifier = (*TokenReview)(nil)

// NewTokenReview checks cfg. The first review is made by Run, or for the first token.
func NewTokenReview(cfg Config) (*TokenReview, error) {
	v, err := newVerifier(cfg, newTurns(reviewsAtOnce, reviewsOfVerified))
	if err != nil {
		return nil, err
	}
	config := rest.CopyConfig(cfg.REST)
	config.QPS = -1 // reviewsAtOnce is the limit; client-go's own limit of 5 a second would make pods wait.
	client, err := authenticationv1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client for token reviews: %w", err)
	}
	return &TokenReview{
		verifier: v, client: client.TokenReviews(), lastReview: time.Now(),
		pending: make(map[digest]*pendingReview), accepted: make(map[digest]acceptedToken), recent: make(map[digest]struct{}),
	}, nil
}

// Ready reports whether the API server has made a review for the broker.
func (v *TokenReview) Ready() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.ready
}

// InFlight returns the number of reviews under way and its limit. Further reviews wait.
func (v *TokenReview) InFlight() (now, limit int) {
	now, _ = v.turns.state()
	return now, reviewsAtOnce + reviewsOfVerified
}

// Age returns the time since the last successful review if the last review failed, and otherwise 0.
func (v *TokenReview) Age() time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.failing {
		return 0
	}
	return time.Since(v.lastReview)
}

// probe is not a token. Run has it reviewed to find out whether the API server makes reviews for the broker.
const probe = "credence-asks-whether-it-may-review-tokens"

// Run checks that the API server makes reviews, and forgets accepted tokens after acceptedFor, until ctx ends.
func (v *TokenReview) Run(ctx context.Context) error {
	ticker := time.NewTicker(acceptedFor)
	defer ticker.Stop()
	for {
		v.mu.Lock()
		check := !v.ready || v.failing
		now := time.Now()
		maps.DeleteFunc(v.accepted, func(_ digest, a acceptedToken) bool { return !now.Before(a.until) })
		v.mu.Unlock()
		if check {
			if _, err := v.reviewInTurn(ctx, caller{}, probe, v.cfg.Audience); err != nil && ctx.Err() == nil {
				v.cfg.Logger.WarnContext(ctx, "Could not review tokens, the service account may lack the right to create tokenreviews", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Verify implements [identity.Verifier].
func (v *TokenReview) Verify(ctx context.Context, token identity.UnverifiedToken) (identity.Pod, error) {
	signed, err := parse(token)
	if err != nil {
		return identity.Pod{}, err
	}
	c, err := parseClaims(signed.UnsafePayloadWithoutVerification())
	if err != nil {
		return identity.Pod{}, err
	}
	now := time.Now()
	claimed, err := c.pod(v.cfg.Audience, v.cfg.MaxLife, now)
	if err != nil {
		return identity.Pod{}, v.audienceRefusal(ctx, token, c, claimed, err)
	}
	if len(v.cfg.Issuers) > 0 {
		if err := c.checkIssuer(v.cfg.Issuers); err != nil {
			return identity.Pod{}, err
		}
	}
	d := digest(sha256.Sum256([]byte(token.Reveal())))
	expected := v.cfg.Expected(claimed)
	v.mu.Lock()
	// An accepted token can have expired since. c.pod above has refused it then.
	if a, ok := v.accepted[d]; ok && now.Before(a.until) {
		v.mu.Unlock()
		return a.pod, nil
	}
	r := v.pending[d]
	if r == nil {
		by := caller{address: identity.PeerOf(ctx), namespace: claimed.Namespace, verified: v.isRecent(d), expected: expected}
		r = &pendingReview{done: make(chan struct{})}
		v.pending[d] = r
		// The review does not use a caller's context, so a caller that gives up does not affect the others. Only r.cancel
		// stops it, and only before it has begun.
		var turn context.Context
		turn, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
		go v.run(turn, r, d, by, token, claimed)
	}
	r.callers++
	v.mu.Unlock()
	select {
	case <-r.done:
		return r.pod, r.err
	case <-ctx.Done():
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	// When the last caller gives up, the review leaves the queue. A review that has begun continues, because a second one for
	// the next caller would cost the API server more.
	r.callers--
	if r.begun {
		return identity.Pod{}, notReviewed(ctx.Err())
	}
	if r.callers == 0 {
		r.cancel()
		v.remove(r, d)
	}
	return identity.Pod{}, noTurn(ctx.Err())
}

// run reviews one token, for all its callers.
func (v *TokenReview) run(turn context.Context, r *pendingReview, d digest, by caller, token identity.UnverifiedToken, claimed identity.Pod) {
	defer r.cancel()
	slot, err := v.turns.take(turn, by)
	if err == nil {
		defer v.turns.release(slot)
	}
	v.mu.Lock()
	if err == nil && r.callers == 0 {
		err = context.Canceled // The last caller gave up at this moment.
	}
	r.begun = err == nil
	v.mu.Unlock()
	var pod identity.Pod
	if err == nil {
		var status authenticationv1.TokenReviewStatus
		if status, err = v.review(turn, token.Reveal(), v.cfg.Audience); err == nil {
			pod, err = podOf(status, claimed, v.cfg.Audience)
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case err == nil:
		v.remember(d, acceptedToken{pod, time.Now().Add(acceptedFor)})
	case errors.Is(err, credential.ErrUnauthenticated):
		delete(v.recent, d)
		delete(v.older, d)
	}
	r.pod, r.err = pod, err
	v.remove(r, d)
	close(r.done)
}

// remove removes r from the pending reviews. The caller holds mu.
func (v *TokenReview) remove(r *pendingReview, d digest) {
	if v.pending[d] == r {
		delete(v.pending, d)
	}
}

// audienceRefusal adds the pod to the refusal of a token for another audience. It does so only if nothing else is wrong with
// the token, the pod is expected, and the API server accepts the token for its own audience. Otherwise it returns refusal.
func (v *TokenReview) audienceRefusal(ctx context.Context, token identity.UnverifiedToken, c claims, claimed identity.Pod, refusal error) error {
	if claimed == (identity.Pod{}) || len(c.Audience) == 0 || !v.cfg.Expected(claimed) {
		return refusal
	}
	by := caller{address: identity.PeerOf(ctx), namespace: claimed.Namespace, expected: true}
	status, err := v.reviewInTurn(ctx, by, token.Reveal(), c.Audience[0])
	if err != nil {
		return refusal
	}
	pod, err := podOf(status, claimed, c.Audience[0])
	if err != nil {
		return refusal
	}
	return withPod(pod, refusal)
}

// reviewInTurn waits for a turn and calls review.
func (v *TokenReview) reviewInTurn(ctx context.Context, by caller, token, audience string) (authenticationv1.TokenReviewStatus, error) {
	slot, err := v.turns.take(ctx, by)
	if err != nil {
		return authenticationv1.TokenReviewStatus{}, err
	}
	defer v.turns.release(slot)
	return v.review(ctx, token, audience)
}

// review has the API server review a token. Its error is of kind credential.ErrUnavailable. The caller has a turn.
func (v *TokenReview) review(ctx context.Context, token, audience string) (authenticationv1.TokenReviewStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	review, err := v.client.Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}},
	}, metav1.CreateOptions{})
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.failing = err != nil; err != nil {
		return authenticationv1.TokenReviewStatus{}, notReviewed(err)
	}
	v.ready, v.lastReview = true, time.Now()
	return review.Status, nil
}

// podOf returns the pod of a reviewed token, or the refusal. The token claimed that pod and that audience.
func podOf(status authenticationv1.TokenReviewStatus, claimed identity.Pod, audience string) (identity.Pod, error) {
	switch {
	case !status.Authenticated && strings.Contains(status.Error, "token has expired"):
		// The API server's clock is ahead of the broker's. Another broker may use another API server.
		return identity.Pod{}, unauthenticated(credential.ReasonTokenExpired, errors.New(clipped(status.Error)), "the token expired by the API server's clock")
	case !status.Authenticated && (strings.Contains(status.Error, "token is not valid yet") || strings.Contains(status.Error, "token is issued in the future")):
		return identity.Pod{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenEarly, RetryAfter: earlyRetry, Cause: errors.New(clipped(status.Error)),
			Message: "the token is not valid yet by the API server's clock; set the clocks of the API servers",
		}
	case !status.Authenticated && !isRefusal(status.Error):
		return identity.Pod{}, notReviewed(fmt.Errorf("the API server could not decide: %s", clipped(status.Error)))
	case !status.Authenticated:
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, errors.New(clipped(status.Error)),
			"the API server does not accept the token: it was altered, its signing key is no longer trusted, or its pod or service account was deleted")
	case !slices.Contains(status.Audiences, audience):
		// An authenticator that does not support audiences leaves them out, so it has checked none.
		return identity.Pod{}, unauthenticated(credential.ReasonTokenAudience, nil,
			"the API server does not confirm that the token is made for audience %q", audience)
	}
	pod := identity.Pod{ServiceAccountUID: status.User.UID, Name: sole(status.User.Extra[extraPodName]), UID: sole(status.User.Extra[extraPodUID])}
	account, ok := strings.CutPrefix(status.User.Username, "system:serviceaccount:")
	if ok {
		pod.Namespace, pod.ServiceAccount, ok = strings.Cut(account, ":")
	}
	if !ok || slices.Contains([]string{pod.Namespace, pod.ServiceAccount, pod.ServiceAccountUID, pod.Name, pod.UID}, "") {
		return identity.Pod{}, notPodBound()
	}
	if pod != claimed {
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, nil, "the token claims pod %s, and the API server does not confirm it", claimed)
	}
	return pod, nil
}

// refusals are API servers' texts for tokens that they refuse, except texts that podOf handles (pkg/serviceaccount
// and the token authenticators, read at Kubernetes 1.37).
var refusals = []string{
	"invalid bearer token", "has been invalidated", "invalid for the target audiences",
	"error in cryptographic primitive", "signature is invalid", "does not match", "not found", "has been deleted", "is being deleted",
}

// isRefusal reports whether the API server has refused a token, rather than failed to decide. Both use one field. An unknown
// text counts as a failure: it refuses the caller too, but makes it retry instead of giving up.
func isRefusal(text string) bool {
	return text == "" || slices.ContainsFunc(refusals, func(r string) bool { return strings.Contains(text, r) })
}

// sole returns the only value, or "" if there is not exactly one.
func sole(values authenticationv1.ExtraValue) string {
	if len(values) != 1 {
		return ""
	}
	return values[0]
}

// remember stores an accepted token. The caller holds mu.
func (v *TokenReview) remember(d digest, a acceptedToken) {
	if len(v.accepted) < maxAccepted {
		v.accepted[d] = a
	}
	delete(v.older, d)
	if v.recent[d] = struct{}{}; len(v.recent) >= maxRecent {
		v.recent, v.older = make(map[digest]struct{}), v.recent
	}
}

// isRecent reports whether a token was accepted recently. This proves nothing now, and serves only to order turns. The
// caller holds mu.
func (v *TokenReview) isRecent(d digest) bool {
	_, recent := v.recent[d]
	_, older := v.older[d]
	return recent || older
}

// notReviewed returns the error for a token without a review.
func notReviewed(cause error) error {
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerUnavailable, RetryAfter: time.Second,
		Message: "cannot verify the token: the Kubernetes API server did not review it; try again", Cause: cause,
	}
}
