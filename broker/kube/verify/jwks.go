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
	// keysMaxAge is how old the signing keys may grow before they are fetched again, so that a
	// removed key stops being trusted.
	keysMaxAge = 10 * time.Minute
	// keysMinAge bounds how often tokens with unknown key ids make us fetch the keys.
	keysMinAge = 10 * time.Second
	// maxDocument bounds the key set and the discovery document: one RSA-4096 key is under 1 kB.
	maxDocument = 1 << 20
	// fetchTimeout bounds a fetch of keys and issuer. An API server responds within milliseconds.
	fetchTimeout = 5 * time.Second
)

// JWKS verifies tokens against the API server's published signing keys, without asking it about
// each token: it goes on while the API server is away. It implements identity.Verifier.
type JWKS struct {
	verifier
	client rest.Interface
	made   time.Time

	mu      sync.Mutex // guards what follows
	keys    keySet
	issuers []string
	fetched time.Time     // when keys were last fetched
	tried   time.Time     // when that was last begun
	flight  chan struct{} // closed when the fetch under way ends; nil when there is none
}

var _ identity.Verifier = (*JWKS)(nil)

// NewJWKS checks cfg. It fetches nothing until Run, or until the first token comes.
func NewJWKS(cfg Config) (*JWKS, error) {
	v, err := newVerifier(cfg, newTurns(runtime.GOMAXPROCS(0), 0)) // to verify a signature
	if err != nil {
		return nil, err
	}
	core, err := corev1client.NewForConfig(cfg.REST)
	if err != nil {
		return nil, fmt.Errorf("making a client for the key set: %w", err)
	}
	return &JWKS{verifier: v, client: core.RESTClient(), issuers: cfg.Issuers, made: time.Now()}, nil
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
	if err := c.checkIssuer(issuers); err != nil {
		return identity.Pod{}, err
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
