package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

const (
	// keysMaxAge is how old the signing keys may grow before they are fetched again, so that a
	// removed key stops being trusted.
	keysMaxAge = 10 * time.Minute
	// keysMinAge bounds how often tokens with unknown key ids make us fetch the keys.
	keysMinAge = 10 * time.Second
	// clockLeeway is how far the API server's clock may be ahead of this broker's. It is what API servers grant each
	// other (go-jose's DefaultLeeway). Expiry has no leeway: a token is not accepted after its end.
	clockLeeway = time.Minute
	// maxNamespace and maxName are Kubernetes' own bounds. They bound the names that the broker holds of a
	// token that waits for its review.
	maxNamespace, maxName = 63, 253
	// earlyRetry is the longest time after which a caller with a token that is not valid yet tries again: either
	// clock may be set right at any moment.
	earlyRetry = time.Minute
	// maxDocument bounds the key set and the discovery document: one RSA-4096 key is under 1 kB.
	maxDocument = 1 << 20
	// fetchTimeout bounds a fetch of keys and issuer. An API server responds within milliseconds.
	fetchTimeout = 5 * time.Second
)

// DefaultMaxTokenLife is the longest life of a token that is accepted unless configured otherwise. The webhook has the
// kubelet request tokens for 24 hours at most. An API server extends the life of tokens
// (--service-account-extend-token-expiration) only if they are for its own audience. A longer life means that
// somebody made the token with the TokenRequest API, such as by kubectl create token --duration: such a token can be
// replayed for as long as its pod lives.
const DefaultMaxTokenLife = 25 * time.Hour

// algorithms are those with which API servers sign service-account tokens: RS256 and ES256 with
// their own keys, any of these with an external signer (KEP-740). Naming them shuts out "none" and
// HMAC with a public key.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512}

// JWKSConfig configures [NewJWKS].
type JWKSConfig struct {
	// REST reaches the API server, whose key set and issuer are fetched. Required.
	REST *rest.Config
	// Audience is the audience that tokens must be made for. Required.
	Audience string
	// Issuers are the accepted issuers. Default: the one that the API server's discovery document
	// names.
	Issuers []string
	// MaxLife is the longest life of a token that is accepted, from its first to its last second. Default:
	// DefaultMaxTokenLife.
	MaxLife time.Duration
	// Logger. Required.
	Logger *slog.Logger
}

// JWKS verifies tokens against the API server's published signing keys, without asking it about
// each token: it goes on while the API server is away. It implements identity.Verifier.
type JWKS struct {
	cfg    JWKSConfig
	client rest.Interface
	made   time.Time
	turns  *turns // to verify a signature

	mu      sync.Mutex // guards what follows
	keys    keySet
	issuers []string
	fetched time.Time     // when keys were last fetched
	tried   time.Time     // when that was last begun
	flight  chan struct{} // closed when the fetch under way ends; nil when there is none
}

var _ identity.Verifier = (*JWKS)(nil)

// NewJWKS checks cfg. It fetches nothing until Run, or until the first token comes.
func NewJWKS(cfg JWKSConfig) (*JWKS, error) {
	if cfg.REST == nil || cfg.Logger == nil {
		return nil, errors.New("a REST configuration and a Logger are required")
	}
	if err := checkConfig(cfg.Audience, &cfg.MaxLife); err != nil {
		return nil, err
	}
	core, err := corev1client.NewForConfig(cfg.REST)
	if err != nil {
		return nil, fmt.Errorf("making a client for the key set: %w", err)
	}
	return &JWKS{cfg: cfg, client: core.RESTClient(), issuers: cfg.Issuers, made: time.Now(), turns: newTurns(runtime.GOMAXPROCS(0), 0)}, nil
}

// checkConfig checks what both verifiers have, and sets its default.
func checkConfig(audience string, maxLife *time.Duration) error {
	if audience == "" {
		return errors.New("no audience: tokens made for any other service would be accepted; set --audience")
	}
	if *maxLife == 0 {
		*maxLife = DefaultMaxTokenLife
	}
	if *maxLife < 0 {
		return fmt.Errorf("--max-token-life=%s: must be positive", *maxLife)
	}
	return nil
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

// Age is how long ago the keys were fetched: at most ten minutes while all is well. Where none were yet, it is
// how long the verifier has been there.
func (v *JWKS) Age() time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fetched.IsZero() {
		return time.Since(v.made)
	}
	return time.Since(v.fetched)
}

// Waiting is how many tokens wait for their signature to be verified.
func (v *JWKS) Waiting() int {
	_, waiting := v.turns.state()
	return waiting
}

// Ready reports whether keys are held.
func (v *JWKS) Ready() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.keys.usable) > 0 && len(v.issuers) > 0
}

// Run keeps the keys no older than ten minutes, until ctx ends. Old ones are used for as long as the
// API server is away.
func (v *JWKS) Run(ctx context.Context) error {
	ticker := time.NewTicker(keysMinAge)
	defer ticker.Stop()
	for {
		v.mu.Lock()
		age, incomplete := time.Since(v.fetched), len(v.keys.usable) == 0 || len(v.issuers) == 0
		v.mu.Unlock()
		// Three ticks early, so that a failed attempt is repeated before the age is reached.
		if incomplete || age >= keysMaxAge-3*keysMinAge {
			v.refresh(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

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

// Verify implements identity.Verifier.
func (v *JWKS) Verify(ctx context.Context, token identity.UnverifiedToken) (identity.Pod, error) {
	signed, err := parse(token)
	if err != nil {
		return identity.Pod{}, err
	}
	// The compact form has exactly one signature.
	keys, err := v.keysOf(ctx, signed.Signatures[0].Header.KeyID)
	if err != nil {
		return identity.Pod{}, err
	}
	payload, err := v.verifySignature(ctx, signed, keys)
	if err != nil {
		return identity.Pod{}, err
	}
	c, err := parseClaims(payload)
	if err != nil {
		return identity.Pod{}, err
	}
	v.mu.Lock()
	issuers := v.issuers
	v.mu.Unlock()
	if len(issuers) == 0 {
		return identity.Pod{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerAway, RetryAfter: keysMinAge,
			Message: "the broker could not ask the API server yet which issuer its tokens have; try again, or set --issuer",
		}
	}
	if !slices.Contains(issuers, c.Issuer) {
		return identity.Pod{}, unauthenticated(credential.ReasonTokenIssuer, nil, "the token's issuer %q is not accepted", clipped(c.Issuer))
	}
	pod, err := c.pod(v.cfg.Audience, v.cfg.MaxLife, time.Now())
	return otherAudience(pod, err)
}

// verifySignature returns what one of the keys has signed. It takes some 50 µs of a processor per key, which callers who
// have proved nothing could use up: so no more of it is done at once than there are processors, and addresses take
// turns.
func (v *JWKS) verifySignature(ctx context.Context, signed *jose.JSONWebSignature, keys []jose.JSONWebKey) ([]byte, error) {
	slot, err := v.turns.take(ctx, claimant{address: identity.PeerOf(ctx)})
	if err != nil {
		return nil, noTurn(err)
	}
	defer v.turns.give(slot)
	for _, key := range keys {
		if payload, err := signed.Verify(key); err == nil {
			return payload, nil
		}
	}
	return nil, unauthenticated(credential.ReasonTokenInvalid, nil, "the token is not signed by this cluster's API server")
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
		return identity.Pod{}, unauthenticated(credential.ReasonTokenNotPodBound, nil, "the token is not bound to a pod; use the one that kubelet projects")
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

// clipped is as much of a claim as a message may have: it is the caller's own text, and goes into logs.
func clipped(claim string) string { return clip.Bytes(claim, 200) }

// unauthenticated makes a refusal. Messages may quote claims, which are no secret, and never the
// token.
func unauthenticated(reason credential.Reason, cause error, format string, args ...any) error {
	e := credential.Errorf(credential.ErrUnauthenticated, reason, format, args...)
	e.Cause = cause
	return e
}

// keysOf returns the keys of that id. For an id that is unknown it fetches the key set, unless that
// was tried a moment ago. A token is refused for its key only by a key set that was fetched after the
// token came: before that, the key may be a new one.
func (v *JWKS) keysOf(ctx context.Context, id string) ([]jose.JSONWebKey, error) {
	came := time.Now()
	v.mu.Lock()
	keys, ok := v.keys.usable[id]
	wait := keysMinAge - time.Since(v.tried)
	if v.flight != nil {
		wait = 0 // Joined: nothing more is asked of the API server.
	}
	v.mu.Unlock()
	if ok {
		return keys, nil
	}
	if wait <= 0 {
		v.refresh(ctx)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if keys, ok := v.keys.usable[id]; ok {
		return keys, nil
	}
	if err := v.keys.unusable(id); err != nil {
		return nil, err
	}
	if !v.fetched.Before(came) && len(v.issuers) > 0 {
		return nil, unauthenticated(credential.ReasonTokenInvalid, nil, "the token is signed with a key that this cluster's API server does not publish")
	}
	return nil, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerAway, RetryAfter: max(wait, time.Second),
		Message: "the broker does not know the key that the token is signed with, and could not ask the API server since; ask again",
	}
}

// refresh fetches keys and issuer once, however many ask, and not on a caller's context: one who
// leaves must not make it fail for the others. It returns when that is done or ctx ends.
func (v *JWKS) refresh(ctx context.Context) {
	v.mu.Lock()
	if v.flight == nil {
		v.flight = make(chan struct{})
		v.tried = time.Now()
		go v.fetch(context.WithoutCancel(ctx))
	}
	flight := v.flight
	v.mu.Unlock()
	select {
	case <-flight:
	case <-ctx.Done():
	}
}

func (v *JWKS) fetch(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	began := time.Now()
	keys, err := v.fetchKeys(ctx)
	fetched := err == nil
	var issuer string
	if fetched && len(v.cfg.Issuers) == 0 {
		issuer, err = v.fetchIssuer(ctx)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	close(v.flight)
	v.flight = nil
	if err != nil {
		v.cfg.Logger.WarnContext(ctx, "Could not fetch the cluster's token-signing keys", "error", err, "keys", len(v.keys.usable))
	}
	if fetched {
		// Also without the issuer, and also if no key of the new set is usable: a removed key is not trusted any
		// longer. The keys are as old as the request for them.
		keys.report(ctx, v.cfg.Logger, v.keys)
		v.keys, v.fetched = keys, began
	}
	if issuer != "" {
		v.issuers = []string{issuer}
	}
}

// fetchKeys asks the API server itself. The jwks_uri of its discovery document may point outside
// the cluster, where pods of the same issuer are verified by others.
func (v *JWKS) fetchKeys(ctx context.Context) (keySet, error) {
	var document struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := v.getJSON(ctx, "/openid/v1/jwks", &document); err != nil {
		return keySet{}, err
	}
	if len(document.Keys) == 0 {
		return keySet{}, errors.New("the API server publishes no token-signing key at /openid/v1/jwks")
	}
	return decodeKeys(document.Keys), nil
}

func (v *JWKS) fetchIssuer(ctx context.Context) (string, error) {
	var document struct {
		Issuer string `json:"issuer"`
	}
	if err := v.getJSON(ctx, "/.well-known/openid-configuration", &document); err != nil {
		return "", err
	}
	if document.Issuer == "" {
		return "", errors.New("the API server names no issuer at /.well-known/openid-configuration; set --issuer")
	}
	return document.Issuer, nil
}

func (v *JWKS) getJSON(ctx context.Context, path string, into any) error {
	stream, err := v.client.Get().AbsPath(path).Stream(ctx)
	if err != nil {
		return fmt.Errorf("getting %s: %w", path, err)
	}
	defer func() { _ = stream.Close() }()
	body, err := io.ReadAll(io.LimitReader(stream, maxDocument+1))
	if err != nil {
		return fmt.Errorf("getting %s: %w", path, err)
	}
	if len(body) > maxDocument {
		return fmt.Errorf("getting %s: the response has more than %d bytes", path, maxDocument)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}
