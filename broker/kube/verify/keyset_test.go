package verify_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube/verify"
)

// lines is a log that a test reads.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// count returns the number of lines that contain text.
func (l *lines) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func newLoggedVerifier(t *testing.T, config *rest.Config) (*verify.JWKS, *lines) {
	t.Helper()
	log := new(lines)
	v, err := verify.NewJWKS(verify.Config{REST: config, Audience: audience, Logger: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	return v, log
}

// strangeKeys are entries of a key set with unknown key types, and malformed ones.
var strangeKeys = []string{
	`{"kty":"AKP","alg":"ML-DSA-65","kid":"post-quantum","use":"sig","pub":"AAAA"}`,
	`{"kty":"EC","crv":"secp256k1","kid":"bitcoin","x":"YMd4ckBj2qSdAhhD7jTiOLgdrHNIwE2yzNLXgTfu5ZU","y":"YMd4ckBj2qSdAhhD7jTiOLgdrHNIwE2yzNLXgTfu5ZU"}`,
	`{"kty":"EC","crv":"P-256","kid":"off-curve","x":"AQ","y":"AQ"}`,
	`{"kty":"OKP","crv":"Ed25519","kid":"edwards","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`,
	`{"kty":"oct","kid":"shared","k":"c2VjcmV0"}`,
	`{"kty":"RSA","kid":"no-modulus","e":"AQAB"}`,
	`{"kty":"RSA","kid":"bad-base64","n":"!","e":"AQAB"}`,
	`{"kid":"no-kty"}`,
	`{"kty":5,"kid":"kty-is-a-number"}`,
	`7`, `"text"`, `null`, `[]`, `{}`,
}

func entry(t *testing.T, key jose.JSONWebKey) json.RawMessage {
	t.Helper()
	text, err := json.Marshal(key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestUnknownKindsOfKeys: the broker ignores and logs an unknown key once, and keeps the other keys (RFC 7517, section 5).
func TestUnknownKindsOfKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, first, second, bare := newSigner(t, "old"), newSigner(t, "twice"), newSigner(t, "twice"), newSigner(t, "")
		encrypts, rsaPSS := newSigner(t, "encrypts"), newSigner(t, "other-algorithm")
		server, config := startAPIServer(t, old, first)
		for _, k := range strangeKeys {
			server.add(json.RawMessage(k))
		}
		server.add(entry(t, jose.JSONWebKey{Key: encrypts.key.Public(), KeyID: encrypts.id, Use: "enc"}))
		server.add(entry(t, jose.JSONWebKey{Key: rsaPSS.key.Public(), KeyID: rsaPSS.id, Algorithm: "PS256"}))
		server.add(entry(t, jose.JSONWebKey{Key: second.key.Public(), KeyID: second.id}))
		server.add(entry(t, jose.JSONWebKey{Key: bare.key.Public()}))
		v, log := newLoggedVerifier(t, config)
		ctx, stop := withCancel(t)
		defer stop()
		go func() { _ = v.Run(ctx) }()
		synctest.Wait()
		for _, s := range []signer{old, first, second, bare} {
			if wantReason(t, v, s.token(t, nil), ""); t.Failed() {
				t.Fatalf("a token of key %q is refused when unknown keys are published too", s.id)
			}
		}
		// The token is not at fault if the broker cannot use a published key.
		for _, id := range []string{"post-quantum", "bitcoin", "no-modulus", "encrypts", "other-algorithm"} {
			time.Sleep(11 * time.Second)
			_, err := v.Verify(t.Context(), newSigner(t, id).token(t, nil))
			if credential.ReasonOf(err) != credential.ReasonTokenKey || !strings.Contains(fmt.Sprint(err), id) {
				t.Errorf("a token of key %q: error %v", id, err)
			}
		}
		time.Sleep(time.Hour)
		const ignored = "Ignored a token-signing key"
		if n := log.count(ignored); n != len(strangeKeys)+2 {
			t.Errorf("%d keys were logged as ignored in an hour, want %d", n, len(strangeKeys)+2)
		}
		if n := log.count("alg=ML-DSA-65"); n != 1 {
			t.Errorf("the algorithm of an unknown key is in %d log lines, want 1", n)
		}

		// A removed key is no longer trusted, even if the new document has an unknown key.
		server.publish(first)
		server.add(json.RawMessage(strangeKeys[0]))
		time.Sleep(10 * time.Minute)
		wantReason(t, v, old.token(t, nil), credential.ReasonTokenInvalid)
		wantReason(t, v, second.token(t, nil), credential.ReasonTokenInvalid)
		wantReason(t, v, first.token(t, nil), "")
	})
}

func TestNoUsableKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		server, config := startAPIServer(t, key)
		v, _ := newLoggedVerifier(t, config)
		wantReason(t, v, key.token(t, nil), "")
		ctx, stop := withCancel(t)
		defer stop()
		go func() { _ = v.Run(ctx) }()
		server.publish()
		server.add(json.RawMessage(strangeKeys[0]))
		server.add(json.RawMessage(strangeKeys[1]))
		time.Sleep(10 * time.Minute)
		_, err := v.Verify(t.Context(), key.token(t, nil))
		if credential.ReasonOf(err) != credential.ReasonTokenKey {
			t.Errorf("with unknown keys only, a token causes error %v", err)
		}
		for _, text := range []string{`kty "AKP" alg "ML-DSA-65"`, `crv "secp256k1"`, "P-256"} {
			if !strings.Contains(fmt.Sprint(err), text) {
				t.Errorf("the error %q does not contain %q", err, text)
			}
		}
		if v.Ready() {
			t.Error("Ready is true without a usable key")
		}
		server.publish(key)
		time.Sleep(21 * time.Second)
		wantReason(t, v, key.token(t, nil), "")
	})
}

func TestKeySetIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key, last := newSigner(t, "a"), newSigner(t, "last")
		server, config := startAPIServer(t, key)
		for i := range 300 {
			server.add(json.RawMessage(fmt.Sprintf(`{"kty":"AKP","kid":"%d"}`, i)))
		}
		server.add(entry(t, jose.JSONWebKey{Key: last.key.Public(), KeyID: last.id}))
		v, log := newLoggedVerifier(t, config)
		ctx, stop := withCancel(t)
		defer stop()
		go func() { _ = v.Run(ctx) }()
		time.Sleep(time.Hour)
		wantReason(t, v, key.token(t, nil), "")
		wantReason(t, v, last.token(t, nil), credential.ReasonTokenInvalid)
		if n, above := log.count("Ignored a token-signing key that"), log.count("above the limit"); n != 255 || above != 1 {
			t.Errorf("of 302 keys %d were logged as ignored, want 255; %d lines say that the limit was exceeded, want 1", n, above)
		}
		// The broker refuses a document above the limit, and keeps its keys.
		server.publish(newSigner(t, "other"))
		server.add(json.RawMessage(`{"padding":"` + strings.Repeat("x", 1<<20) + `"}`))
		time.Sleep(20 * time.Minute)
		wantReason(t, v, key.token(t, nil), "")
		if log.count("more than 1048576 bytes") == 0 {
			t.Error("a document of more than 1 MiB was not logged")
		}
	})
}

// TestNoIssuerIsAcceptedWhileItIsUnknown: until the broker knows the issuer, it accepts no token and asks callers to retry.
func TestNoIssuerIsAcceptedWhileItIsUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		server, config := startAPIServer(t, key)
		server.noIssuer.Store(true)
		v := newVerifier(t, config)
		ctx, stop := withCancel(t)
		defer stop()
		go func() { _ = v.Run(ctx) }()
		synctest.Wait()
		for _, name := range []string{issuer, "https://elsewhere.example", ""} {
			wantReason(t, v, key.token(t, func(c map[string]any) { c["iss"] = name }), credential.ReasonAPIServerUnavailable)
		}
		if v.Ready() {
			t.Error("Ready is true without an issuer")
		}
		server.noIssuer.Store(false)
		time.Sleep(11 * time.Second)
		wantReason(t, v, key.token(t, nil), "")
	})
}

// TestFirstToLeaveDoesNotEndTheFetchOfKeys: if the first caller gives up, the other callers still get the keys.
func TestFirstToLeaveDoesNotEndTheFetchOfKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		server, config := startAPIServer(t, key)
		server.takes.Store(int64(2 * time.Second))
		v := newVerifier(t, config)
		first, leave := context.WithTimeout(t.Context(), time.Second)
		defer leave()
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := v.Verify(first, key.token(t, nil)); credential.ReasonOf(err) != credential.ReasonAPIServerUnavailable {
				t.Errorf("the caller that gives up gets error %v", err)
			}
		})
		synctest.Wait()
		for range 10 {
			all.Go(func() { wantReason(t, v, key.token(t, nil), "") })
		}
		all.Wait()
		if n := server.fetches.Load(); n != 1 {
			t.Errorf("the key set was fetched %d times, want 1", n)
		}
	})
}
