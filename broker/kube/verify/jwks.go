package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

const (
	// keysMaxAge is the maximum age of the signing keys. The broker fetches them again before that, so that it stops
	// trusting a removed key.
	keysMaxAge = 10 * time.Minute
	// keysMinAge is the minimum time between two fetches, however many tokens have unknown key IDs.
	keysMinAge = 10 * time.Second
	// maxDocument bounds the key set and the discovery document. One RSA-4096 key is under 1 kB.
	maxDocument = 1 << 20
	// fetchTimeout bounds the fetch of keys and issuer. A healthy API server responds within milliseconds.
	fetchTimeout = 5 * time.Second
)

// JWKS verifies tokens with the API server's published signing keys. It sends no token to the API server, and keeps
// working while the API server is unavailable. It implements [identity.Verifier].
type JWKS struct {
	verifier
	client  rest.Interface
	created time.Time

	mu        sync.Mutex // guards all below
	keys      keySet
	issuers   []string
	fetched   time.Time     // when the request for keys was sent
	attempted time.Time     // when the last fetch began
	fetching  chan struct{} // closed when the current fetch ends; nil if there is none
}

var _ identity.Verifier = (*JWKS)(nil)

// NewJWKS checks cfg. The first fetch is made by Run, or for the first token.
func NewJWKS(cfg Config) (*JWKS, error) {
	v, err := newVerifier(cfg, newTurns(runtime.GOMAXPROCS(0), 0))
	if err != nil {
		return nil, err
	}
	core, err := corev1client.NewForConfig(cfg.REST)
	if err != nil {
		return nil, fmt.Errorf("making a client for the key set: %w", err)
	}
	return &JWKS{verifier: v, client: core.RESTClient(), issuers: cfg.Issuers, created: time.Now()}, nil
}

// Age returns the age of the keys: at most ten minutes while the API server is available. Before the first fetch it
// returns the age of v.
func (v *JWKS) Age() time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fetched.IsZero() {
		return time.Since(v.created)
	}
	return time.Since(v.fetched)
}

// Ready reports whether v has a usable key and an issuer.
func (v *JWKS) Ready() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.ready()
}

// ready is Ready for callers that hold mu.
func (v *JWKS) ready() bool { return len(v.keys.usable) > 0 && len(v.issuers) > 0 }

// Run fetches the keys at least every ten minutes until ctx ends. While the API server is unavailable, v keeps the old
// keys.
func (v *JWKS) Run(ctx context.Context) error {
	ticker := time.NewTicker(keysMinAge)
	defer ticker.Stop()
	for {
		v.mu.Lock()
		age, ready := time.Since(v.fetched), v.ready()
		v.mu.Unlock()
		// Three ticks early, so that a failed fetch is repeated before the keys reach their maximum age.
		if !ready || age >= keysMaxAge-3*keysMinAge {
			v.refresh(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Verify implements [identity.Verifier].
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
			Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerUnavailable, RetryAfter: keysMinAge,
			Message: "cannot check the token's issuer: the broker could not fetch the issuer from the API server yet; try again, or set --issuer",
		}
	}
	if err := c.checkIssuer(issuers); err != nil {
		return identity.Pod{}, err
	}
	pod, err := c.pod(v.cfg.Audience, v.cfg.MaxLife, time.Now())
	if err != nil {
		return identity.Pod{}, withPod(pod, err)
	}
	return pod, nil
}

// verifySignature returns the payload if one of the keys signed it. This takes about 50 µs of a processor per key, and an
// unauthenticated caller can request it. So at most as many signatures are verified at once as there are processors, and
// addresses take turns.
func (v *JWKS) verifySignature(ctx context.Context, signed *jose.JSONWebSignature, keys []jose.JSONWebKey) ([]byte, error) {
	slot, err := v.turns.take(ctx, caller{address: identity.PeerOf(ctx)})
	if err != nil {
		return nil, noTurn(err)
	}
	defer v.turns.release(slot)
	for _, key := range keys {
		if payload, err := signed.Verify(key); err == nil {
			return payload, nil
		}
	}
	return nil, unauthenticated(credential.ReasonTokenInvalid, nil, "the token is not signed by this cluster's API server")
}

// keysOf returns the keys with that ID. For an unknown ID it fetches the key set, unless the last fetch began less than
// keysMinAge ago. It refuses a token because of its key only if the key set was fetched after the token arrived: an older
// key set may lack a new key.
func (v *JWKS) keysOf(ctx context.Context, id string) ([]jose.JSONWebKey, error) {
	arrived := time.Now()
	v.mu.Lock()
	keys, ok := v.keys.usable[id]
	wait := keysMinAge - time.Since(v.attempted)
	if v.fetching != nil {
		wait = 0 // Joining the current fetch makes no further request.
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
	if !v.fetched.Before(arrived) && len(v.issuers) > 0 {
		return nil, unauthenticated(credential.ReasonTokenInvalid, nil, "the token is signed with a key that this cluster's API server does not publish")
	}
	return nil, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerUnavailable, RetryAfter: max(wait, time.Second),
		Message: "the broker does not know the token's signing key: it could not fetch the API server's keys since the request arrived; try again",
	}
}

// refresh fetches keys and issuer, once for all concurrent callers. It returns when the fetch or ctx ends. The fetch does
// not use a caller's context, so a caller that gives up does not affect the others.
func (v *JWKS) refresh(ctx context.Context) {
	v.mu.Lock()
	if v.fetching == nil {
		v.fetching = make(chan struct{})
		v.attempted = time.Now()
		go v.fetch(context.WithoutCancel(ctx))
	}
	fetching := v.fetching
	v.mu.Unlock()
	select {
	case <-fetching:
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
	close(v.fetching)
	v.fetching = nil
	if err != nil {
		v.cfg.Logger.WarnContext(ctx, "Could not fetch the cluster's token-signing keys", "error", err, "keys", len(v.keys.usable))
	}
	if fetched {
		// A removed key loses its trust even if the fetch of the issuer failed, or if no key of the new set is usable.
		keys.report(ctx, v.cfg.Logger, v.keys)
		v.keys, v.fetched = keys, began
	}
	if issuer != "" {
		v.issuers = []string{issuer}
	}
}

// fetchKeys reads the keys from the API server itself. The jwks_uri of its discovery document may point outside the
// cluster, and is for verifiers there.
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
