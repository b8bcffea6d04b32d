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
	// reviewsAtOnce bounds the reviews under way. An API server answers one in milliseconds, so these are
	// thousands a second, and a storm of sidecars waits here, in turns, and not there.
	reviewsAtOnce = 32
	// reviewsOfVerified are further ones, for tokens that passed before: an API server may take seconds for a token
	// that it does not know, if it asks an authenticating webhook about it.
	reviewsOfVerified = 4
	// reviewTimeout bounds one. An authenticating webhook, which the API server may have to ask, is given 30 s
	// by default; sidecars do not wait that long.
	reviewTimeout = 10 * time.Second
	// reviewKept is how long a token that passed is not asked for again, which is what API servers do themselves.
	// That its pod or service account is gone is seen sooner, by the watches.
	reviewKept = 10 * time.Second
	// maxReviewsKept bounds how many are kept, at some 400 bytes each. It is more calls than a broker answers in
	// that time; should it be reached, what comes on top is asked each time.
	maxReviewsKept = 20_000
	// maxRecent bounds how many tokens are remembered to have passed: twice as many, at some 50 bytes each.
	maxRecent = 50_000
)

// Extra fields of a user that is a pod's service account, as an API server names them.
const (
	extraPodName = "authentication.kubernetes.io/pod-name"
	extraPodUID  = "authentication.kubernetes.io/pod-uid"
)

// TokenReview verifies tokens by asking the API server about each. It implements identity.Verifier.
//
// What a token itself says against itself is refused without asking: a form that is none, another audience, a
// time that has passed, a life that is too long, no pod. Only a token for another audience is asked about, if it is of
// an expected pod: so that the pod can be told. Everything else is the API server's word, the audience once more included.
type TokenReview struct {
	verifier
	client authenticationv1client.TokenReviewInterface

	mu      sync.Mutex
	flights map[digest]*reviewFlight // :: token → its review; guarded by mu
	passed  map[digest]passed        // :: token → the pod that it proved; guarded by mu
	// Tokens that passed lately, for their turn: the older ones are those that were not seen since recent had
	// maxRecent; guarded by mu.
	recent, older map[digest]struct{}
	ready         bool      // the API server has reviewed for us; guarded by mu
	heard         time.Time // when it last did; guarded by mu
	failing       bool      // it did not the last time; guarded by mu
}

// digest stands for a token, so that no token is a key of anything that is printed one day.
type digest [sha256.Size]byte

type passed struct {
	pod   identity.Pod
	until time.Time
}

// reviewFlight is the review of one token, which waits for its turn or is under way, for all who show that token.
type reviewFlight struct {
	callers int           // those that wait for it; guarded by the verifier's mu
	begun   bool          // it has its turn; guarded by the verifier's mu
	abandon func()        // ends the wait for a turn
	done    chan struct{} // closed when there are pod and err
	pod     identity.Pod
	err     error
}

var _ identity.Verifier = (*TokenReview)(nil)

// NewTokenReview checks cfg. It asks for nothing until Run, or until the first token comes.
func NewTokenReview(cfg Config) (*TokenReview, error) {
	v, err := newVerifier(cfg, newTurns(reviewsAtOnce, reviewsOfVerified))
	if err != nil {
		return nil, err
	}
	config := rest.CopyConfig(cfg.REST)
	config.QPS = -1 // reviewsAtOnce bounds them; client-go's own limit of 5 a second would make pods wait.
	client, err := authenticationv1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client for token reviews: %w", err)
	}
	return &TokenReview{
		verifier: v, client: client.TokenReviews(), heard: time.Now(),
		flights: make(map[digest]*reviewFlight), passed: make(map[digest]passed), recent: make(map[digest]struct{}),
	}, nil
}

// Ready reports whether the API server has let us review a token.
func (v *TokenReview) Ready() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.ready
}

// UnderWay is how many reviews are under way, and how many may be: further ones wait.
func (v *TokenReview) UnderWay() (now, most int) {
	now, _ = v.turns.state()
	return now, reviewsAtOnce + reviewsOfVerified
}

// Age is how long ago the API server last reviewed a token for us, if it did not the last time, and else 0.
func (v *TokenReview) Age() time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.failing {
		return 0
	}
	return time.Since(v.heard)
}

// probe is reviewed to see whether reviews can be made. It is no token.
const probe = "credence-asks-whether-it-may-review-tokens"

// Run makes sure that reviews can be made, and forgets tokens whose time is over, until ctx ends.
func (v *TokenReview) Run(ctx context.Context) error {
	ticker := time.NewTicker(reviewKept)
	defer ticker.Stop()
	for {
		v.mu.Lock()
		ask := !v.ready || v.failing
		now := time.Now()
		maps.DeleteFunc(v.passed, func(_ digest, p passed) bool { return !now.Before(p.until) })
		v.mu.Unlock()
		if ask {
			if _, err := v.reviewInTurn(ctx, claimant{}, probe, v.cfg.Audience); err != nil && ctx.Err() == nil {
				v.cfg.Logger.WarnContext(ctx, "Reviewing tokens does not work; may this service account create tokenreviews?", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Verify implements identity.Verifier.
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
	// No later than its own expiry, which was judged above.
	v.mu.Lock()
	if held, ok := v.passed[d]; ok && now.Before(held.until) {
		v.mu.Unlock()
		return held.pod, nil
	}
	f := v.flights[d]
	if f == nil {
		who := claimant{address: identity.PeerOf(ctx), namespace: claimed.Namespace, verified: v.isRecent(d), expected: expected}
		f = &reviewFlight{done: make(chan struct{})}
		v.flights[d] = f
		// Not on a caller's context: one who leaves must not make it fail for the others. It ends only by abandon,
		// and not once the review has begun.
		var turn context.Context
		turn, f.abandon = context.WithCancel(context.WithoutCancel(ctx))
		go v.fly(turn, f, d, who, token, claimed)
	}
	f.callers++
	v.mu.Unlock()
	select {
	case <-f.done:
		return f.pod, f.err
	case <-ctx.Done():
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	// The last one to leave takes it out of the queue. A review that has begun continues: to begin it again for the
	// next caller would cost the API server more.
	f.callers--
	if f.begun {
		return identity.Pod{}, notReviewed(ctx.Err())
	}
	if f.callers == 0 {
		f.abandon()
		v.land(f, d)
	}
	return identity.Pod{}, noTurn(ctx.Err())
}

// fly reviews one token, for all its callers.
func (v *TokenReview) fly(turn context.Context, f *reviewFlight, d digest, who claimant, token identity.UnverifiedToken, claimed identity.Pod) {
	defer f.abandon()
	slot, err := v.turns.take(turn, who)
	if err == nil {
		defer v.turns.give(slot)
	}
	v.mu.Lock()
	if err == nil && f.callers == 0 {
		err = context.Canceled // The last one left at the very moment.
	}
	f.begun = err == nil
	v.mu.Unlock()
	var pod identity.Pod
	if err == nil {
		pod, err = v.ask(turn, token.Reveal(), claimed)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case err == nil:
		v.keep(d, passed{pod, time.Now().Add(reviewKept)})
	case errors.Is(err, credential.ErrUnauthenticated):
		delete(v.recent, d)
		delete(v.older, d)
	}
	f.pod, f.err = pod, err
	v.land(f, d)
	close(f.done)
}

// land forgets a flight. The caller holds mu.
func (v *TokenReview) land(f *reviewFlight, d digest) {
	if v.flights[d] == f {
		delete(v.flights, d)
	}
}

// ask asks the API server about a token that claims to be of that pod.
func (v *TokenReview) ask(ctx context.Context, token string, claimed identity.Pod) (identity.Pod, error) {
	status, err := v.review(ctx, token, v.cfg.Audience)
	if err != nil {
		return identity.Pod{}, err
	}
	return judge(status, claimed, v.cfg.Audience)
}

// audienceRefusal adds the pod to the refusal of a token that has another audience, if that is all that is wrong with
// it, the pod is there, and the API server says so for the audience that the token has. It returns refusal otherwise.
func (v *TokenReview) audienceRefusal(ctx context.Context, token identity.UnverifiedToken, c claims, claimed identity.Pod, refusal error) error {
	if claimed == (identity.Pod{}) || len(c.Audience) == 0 || !v.cfg.Expected(claimed) {
		return refusal
	}
	who := claimant{address: identity.PeerOf(ctx), namespace: claimed.Namespace, expected: true}
	status, err := v.reviewInTurn(ctx, who, token.Reveal(), c.Audience[0])
	if err != nil {
		return refusal
	}
	pod, err := judge(status, claimed, c.Audience[0])
	if err != nil {
		return refusal
	}
	_, refusal = otherAudience(pod, refusal)
	return refusal
}

// reviewInTurn is review, once there is a turn for it.
func (v *TokenReview) reviewInTurn(ctx context.Context, who claimant, token, audience string) (authenticationv1.TokenReviewStatus, error) {
	slot, err := v.turns.take(ctx, who)
	if err != nil {
		return authenticationv1.TokenReviewStatus{}, err
	}
	defer v.turns.give(slot)
	return v.review(ctx, token, audience)
}

// review asks the API server about a token. Its error is of kind credential.ErrUnavailable. The caller has a turn.
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
	v.ready, v.heard = true, time.Now()
	return review.Status, nil
}

// judge reads the API server's answer about a token that claims to be of that pod and for that audience.
func judge(status authenticationv1.TokenReviewStatus, claimed identity.Pod, audience string) (identity.Pod, error) {
	switch {
	case !status.Authenticated && strings.Contains(status.Error, "token has expired"):
		// Its clock is ahead of ours. Another broker may ask another API server.
		return identity.Pod{}, unauthenticated(credential.ReasonTokenExpired, errors.New(clipped(status.Error)), "the token expired by the API server's clock")
	case !status.Authenticated && (strings.Contains(status.Error, "token is not valid yet") || strings.Contains(status.Error, "token is issued in the future")):
		return identity.Pod{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenEarly, RetryAfter: earlyRetry, Cause: errors.New(clipped(status.Error)),
			Message: "the token is not valid yet by the API server's clock; set the clocks of the API servers",
		}
	case !status.Authenticated && undecided(status.Error):
		return identity.Pod{}, notReviewed(fmt.Errorf("the API server could not decide: %s", clipped(status.Error)))
	case !status.Authenticated:
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, errors.New(clipped(status.Error)),
			"the API server does not accept the token: it was altered, is signed with a key that is not trusted any more, or its pod or service account is gone")
	case !slices.Contains(status.Audiences, audience):
		// An authenticator that knows nothing of audiences leaves them out, and so has checked none.
		return identity.Pod{}, unauthenticated(credential.ReasonTokenAudience, nil,
			"the API server does not say that the token is made for %q", audience)
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
		return identity.Pod{}, unauthenticated(credential.ReasonTokenInvalid, nil, "the token says that it is of pod %s, and the API server says otherwise", claimed)
	}
	return pod, nil
}

// refusals are how API servers word what is wrong with a service-account token, as far as the token's own text
// does not say it (pkg/serviceaccount and the token authenticators, read at Kubernetes 1.37).
var refusals = []string{
	"invalid bearer token", "has been invalidated", "invalid for the target audiences",
	"error in cryptographic primitive", "signature is invalid", "does not match", "not found", "has been deleted", "is being deleted",
}

// undecided reports whether an API server that did not authenticate a token failed to find out, rather than found
// against it. It has one field for both. A text that we do not know is taken for a failure: the caller is
// refused either way, and asks again instead of giving up.
func undecided(text string) bool {
	return text != "" && !slices.ContainsFunc(refusals, func(r string) bool { return strings.Contains(text, r) })
}

func sole(values authenticationv1.ExtraValue) string {
	if len(values) != 1 {
		return ""
	}
	return values[0]
}

// keep remembers what a token has proved. The caller holds mu.
func (v *TokenReview) keep(d digest, p passed) {
	if len(v.passed) < maxReviewsKept {
		v.passed[d] = p
	}
	delete(v.older, d)
	if v.recent[d] = struct{}{}; len(v.recent) >= maxRecent {
		v.recent, v.older = make(map[digest]struct{}), v.recent
	}
}

// isRecent reports whether a token has passed lately. That proves nothing any more, and is for its turn only. The
// caller holds mu.
func (v *TokenReview) isRecent(d digest) bool {
	_, recent := v.recent[d]
	_, older := v.older[d]
	return recent || older
}

// notReviewed says that the API server could not be asked about a token.
func notReviewed(cause error) error {
	return &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerAway, RetryAfter: time.Second,
		Message: "the Kubernetes API server cannot be asked about the token; ask again", Cause: cause,
	}
}
