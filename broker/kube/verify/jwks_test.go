package verify_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/kube/verify"
)

const (
	issuer   = "https://kubernetes.default.svc"
	audience = "credence-broker"
)

// apiServer publishes keys as an API server does.
type apiServer struct {
	network *apitest.Network
	fetches atomic.Int64 // of the key set

	mu       sync.Mutex
	keys     []json.RawMessage // guarded by mu
	noIssuer atomic.Bool       // refuses its discovery document
	takes    atomic.Int64      // nanoseconds until it sends the key set
}

func startAPIServer(t *testing.T, keys ...signer) (*apiServer, *rest.Config) {
	t.Helper()
	s := new(apiServer)
	s.publish(keys...)
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		if s.noIssuer.Load() {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"issuer": issuer})
	})
	mux.HandleFunc("/openid/v1/jwks", func(w http.ResponseWriter, _ *http.Request) {
		s.fetches.Add(1)
		time.Sleep(time.Duration(s.takes.Load()))
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = json.NewEncoder(w).Encode(map[string]any{"keys": s.keys})
	})
	s.network = apitest.Serve(t, mux)
	return s, s.network.Config()
}

func withCancel(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithCancel(t.Context())
}

func (s *apiServer) publish(keys ...signer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = nil
	for _, k := range keys {
		text, err := json.Marshal(jose.JSONWebKey{Key: k.key.Public(), KeyID: k.id, Algorithm: string(jose.ES256), Use: "sig"})
		if err != nil {
			panic(err) // a fresh key
		}
		s.keys = append(s.keys, text)
	}
}

// add publishes one more entry of any form.
func (s *apiServer) add(entry json.RawMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = append(s.keys, entry)
}

// signer is a signing key of the API server.
type signer struct {
	id  string
	key *ecdsa.PrivateKey
}

func newSigner(t testing.TB, id string) signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer{id, key}
}

// token returns a signed token of a pod, after change has changed its claims.
func (s signer) token(t testing.TB, change func(claims map[string]any)) identity.UnverifiedToken {
	t.Helper()
	claims := map[string]any{
		"iss": issuer, "aud": []string{audience}, "sub": "system:serviceaccount:shop:cart",
		"iat": time.Now().Unix(), "nbf": time.Now().Unix(), "exp": time.Now().Add(24 * time.Hour).Unix(),
		"kubernetes.io": map[string]any{
			"namespace": "shop", "pod": map[string]string{"name": "cart-1", "uid": "u-1"},
			"serviceaccount": map[string]string{"name": "cart", "uid": "s-1"},
		},
	}
	if change != nil {
		change(claims)
	}
	jws, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: s.key, KeyID: s.id}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := jwt.Signed(jws).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return identity.NewUnverifiedToken(text)
}

func newVerifier(t testing.TB, config *rest.Config, issuers ...string) *verify.JWKS {
	t.Helper()
	v, err := verify.NewJWKS(verify.Config{REST: config, Audience: audience, Issuers: issuers, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func wantReason(t *testing.T, v identity.Verifier, token identity.UnverifiedToken, want credential.Reason) {
	t.Helper()
	id, err := v.Verify(t.Context(), token)
	if got := credential.ReasonOf(err); got != want {
		t.Errorf("reason %q, want %q: %v", got, want, err)
	}
	if (err == nil) != (id != identity.Pod{}) {
		t.Errorf("returned both pod %v and error %v", id, err)
	}
	if err != nil && token.Reveal() != "" && strings.Contains(err.Error(), token.Reveal()) {
		t.Errorf("the error contains the token: %v", err)
	}
}

func TestVerifyClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key, other := newSigner(t, "a"), newSigner(t, "a")
		_, config := startAPIServer(t, key)
		v := newVerifier(t, config)
		now := time.Now()
		set := func(claim string, value any) func(map[string]any) {
			return func(c map[string]any) { c[claim] = value }
		}
		in := func(object string, value any) func(map[string]any) {
			return func(c map[string]any) { c["kubernetes.io"].(map[string]any)[object] = value }
		}
		tests := []struct {
			name  string
			token identity.UnverifiedToken
			want  credential.Reason
		}{
			{"good", key.token(t, nil), ""},
			{"one audience as a string", key.token(t, set("aud", audience)), ""},
			{"audience among others", key.token(t, set("aud", []string{"x", audience})), ""},
			{"the maximum lifetime", key.token(t, set("exp", now.Add(25*time.Hour).Unix())), ""},
			{"none", identity.UnverifiedToken{}, credential.ReasonTokenMissing},
			{"too long", identity.NewUnverifiedToken(strings.Repeat("a", identity.MaxTokenBytes+1)), credential.ReasonTokenInvalid},
			{"signed by another key with our key ID", other.token(t, nil), credential.ReasonTokenInvalid},
			{"expired this second", key.token(t, set("exp", now.Unix())), credential.ReasonTokenExpired},
			{"no expiry", key.token(t, func(c map[string]any) { delete(c, "exp") }), credential.ReasonTokenInvalid},
			{"long-lived", key.token(t, set("exp", now.Add(25*time.Hour+time.Second).Unix())), credential.ReasonTokenLongLived},
			{"ten years", key.token(t, set("exp", now.AddDate(10, 0, 0).Unix())), credential.ReasonTokenLongLived},
			{"no audience", key.token(t, func(c map[string]any) { delete(c, "aud") }), credential.ReasonTokenAudience},
			{"audience of another type", key.token(t, set("aud", 7)), credential.ReasonTokenInvalid},
			{"other audience", key.token(t, set("aud", "x")), credential.ReasonTokenAudience},
			{"other issuer", key.token(t, set("iss", "https://elsewhere.example")), credential.ReasonTokenIssuer},
			{"no pod", key.token(t, in("pod", nil)), credential.ReasonTokenNotPodBound},
			{"pod without UID", key.token(t, in("pod", map[string]string{"name": "cart-1"})), credential.ReasonTokenNotPodBound},
			{"no service account", key.token(t, in("serviceaccount", nil)), credential.ReasonTokenNotPodBound},
			{"other subject", key.token(t, set("sub", "system:serviceaccount:shop:other")), credential.ReasonTokenInvalid},
			{"a pod name that is too long", key.token(t, in("pod", map[string]string{"name": strings.Repeat("a", 254), "uid": "u-1"})), credential.ReasonTokenInvalid},
			{"a namespace that is too long", key.token(t, func(c map[string]any) {
				long := strings.Repeat("a", 64)
				c["kubernetes.io"].(map[string]any)["namespace"], c["sub"] = long, "system:serviceaccount:"+long+":cart"
			}), credential.ReasonTokenInvalid},
			{"subject of another namespace", key.token(t, set("sub", "system:serviceaccount:bank:cart")), credential.ReasonTokenInvalid},
		}
		for _, tt := range tests {
			wantReason(t, v, tt.token, tt.want)
			if t.Failed() {
				t.Fatalf("the token was %q", tt.name) // no subtests inside a bubble
			}
		}
		time.Sleep(11 * time.Second) // until the keys may be fetched again
		wantReason(t, v, newSigner(t, "z").token(t, nil), credential.ReasonTokenInvalid)
		id, err := v.Verify(t.Context(), tests[0].token)
		want := identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", ServiceAccountUID: "s-1"}
		if err != nil || id != want {
			t.Errorf("the good token is of pod %+v (error %v), want %+v", id, err, want)
		}
	})
}

// modes runs test for both verifiers. newVerifier makes one whose API server accepts the tokens that key signs.
func modes(t *testing.T, key signer, test func(t *testing.T, newVerifier func(maxLife time.Duration) identity.Verifier)) {
	t.Run("jwks", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, config := startAPIServer(t, key)
			test(t, func(maxLife time.Duration) identity.Verifier {
				v, err := verify.NewJWKS(verify.Config{REST: config, Audience: audience, MaxLife: maxLife, Logger: slog.New(slog.DiscardHandler)})
				if err != nil {
					t.Fatal(err)
				}
				return v
			})
		})
	})
	t.Run("tokenreview", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, config := startReviewer(t)
			test(t, func(maxLife time.Duration) identity.Verifier {
				v, err := verify.NewTokenReview(verify.Config{REST: config, Audience: audience, MaxLife: maxLife, Logger: slog.New(slog.DiscardHandler)})
				if err != nil {
					t.Fatal(err)
				}
				return v
			})
		})
	})
}

// TestClockThatIsBehind: the broker tolerates a clock that is behind by a minute. Beyond that, the token is not valid yet by
// the broker's clock. That clock may be wrong, so the caller is asked to retry, here or at another broker.
func TestClockThatIsBehind(t *testing.T) {
	key := newSigner(t, "a")
	modes(t, key, func(t *testing.T, newVerifier func(time.Duration) identity.Verifier) {
		v := newVerifier(0)
		for _, tt := range []struct {
			nbf, iat time.Duration
			retry    time.Duration // 0: accepted
		}{
			{25 * time.Second, 25 * time.Second, 0},
			{time.Minute, time.Minute, 0},
			{61 * time.Second, 61 * time.Second, time.Second},
			{110 * time.Second, 110 * time.Second, 50 * time.Second},
			{0, 110 * time.Second, 50 * time.Second},
			{110 * time.Second, 0, 50 * time.Second},
			{3 * time.Hour, 3 * time.Hour, time.Minute},
		} {
			now := time.Now()
			token := key.token(t, func(c map[string]any) {
				c["nbf"], c["iat"], c["exp"] = now.Add(tt.nbf).Unix(), now.Add(tt.iat).Unix(), now.Add(tt.nbf+24*time.Hour).Unix()
			})
			_, err := v.Verify(t.Context(), token)
			if tt.retry == 0 {
				if err != nil {
					t.Errorf("a token with nbf %s and iat %s ahead: error %v", tt.nbf, tt.iat, err)
				}
				continue
			}
			e, ok := errors.AsType[*credential.Error](err)
			if !ok || e.Reason != credential.ReasonTokenEarly || !errors.Is(err, credential.ErrUnavailable) || e.RetryAfter != tt.retry {
				t.Errorf("a token with nbf %s and iat %s ahead: error %v (%+v), want a retry after %s", tt.nbf, tt.iat, err, e, tt.retry)
			}
			time.Sleep(max(tt.nbf, tt.iat) - time.Minute)
			wantReason(t, v, token, "")
		}
	})
}

func TestExpiryIsStrict(t *testing.T) {
	key := newSigner(t, "a")
	modes(t, key, func(t *testing.T, newVerifier func(time.Duration) identity.Verifier) {
		v := newVerifier(0)
		token := key.token(t, func(c map[string]any) { c["exp"] = time.Now().Add(time.Hour).Unix() })
		time.Sleep(time.Hour - time.Second)
		wantReason(t, v, token, "")
		time.Sleep(time.Second)
		wantReason(t, v, token, credential.ReasonTokenExpired)
	})
}

// TestLifeOfTokensIsBounded: a token with a lifetime of years is refused, whichever claims say when it began.
func TestLifeOfTokensIsBounded(t *testing.T) {
	key := newSigner(t, "a")
	modes(t, key, func(t *testing.T, newVerifier func(time.Duration) identity.Verifier) {
		now := time.Now()
		lives := func(life time.Duration, without ...string) identity.UnverifiedToken {
			return key.token(t, func(c map[string]any) {
				c["exp"] = now.Add(life).Unix()
				for _, claim := range without {
					delete(c, claim)
				}
			})
		}
		short := newVerifier(2 * time.Hour)
		for _, without := range [][]string{nil, {"nbf"}, {"iat"}, {"nbf", "iat"}} {
			wantReason(t, newVerifier(0), lives(25*time.Hour, without...), "")
			wantReason(t, newVerifier(0), lives(25*time.Hour+time.Second, without...), credential.ReasonTokenLongLived)
			wantReason(t, newVerifier(0), lives(10*365*24*time.Hour, without...), credential.ReasonTokenLongLived)
			wantReason(t, short, lives(2*time.Hour, without...), "")
			wantReason(t, short, lives(3*time.Hour, without...), credential.ReasonTokenLongLived)
		}
		// The full lifetime counts, not the time left.
		long := lives(10 * 24 * time.Hour)
		time.Sleep(10*24*time.Hour - time.Minute)
		wantReason(t, short, long, credential.ReasonTokenLongLived)
		// A clock that is behind does not make the lifetime longer.
		wantReason(t, short, key.token(t, func(c map[string]any) {
			c["nbf"], c["iat"] = time.Now().Add(time.Minute).Unix(), time.Now().Add(time.Minute).Unix()
			c["exp"] = time.Now().Add(2*time.Hour + time.Minute).Unix()
		}), "")
	})
}

func TestKeysAreFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, replacement := newSigner(t, "old"), newSigner(t, "new")
		server, config := startAPIServer(t, old)
		v := newVerifier(t, config)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = v.Run(ctx) }()
		synctest.Wait()
		if !v.Ready() || v.Age() != 0 {
			t.Fatalf("the keys were not fetched at the start: Ready is %t, Age is %s", v.Ready(), v.Age())
		}
		for range 60 {
			if time.Sleep(10 * time.Second); v.Age() > 10*time.Minute {
				t.Fatalf("the keys are %s old, want at most 10 minutes", v.Age())
			}
		}
		wantReason(t, v, old.token(t, nil), "")

		// The first token of a new key makes the broker fetch that key.
		time.Sleep(time.Minute)
		server.publish(old, replacement)
		wantReason(t, v, replacement.token(t, nil), "")

		// A removed key loses its trust within ten minutes, even if no token uses it.
		server.publish(replacement)
		time.Sleep(10 * time.Minute)
		wantReason(t, v, old.token(t, nil), credential.ReasonTokenInvalid)

		// While the API server is unavailable, known keys stay trusted without a time limit.
		server.network.SetDown(true)
		time.Sleep(3 * time.Hour)
		wantReason(t, v, replacement.token(t, nil), "")
		if age := v.Age(); age < 3*time.Hour-10*time.Minute {
			t.Errorf("after three hours without the API server Age is %s", age)
		}
		// An unknown key may be new, so the token is not at fault.
		wantReason(t, v, newSigner(t, "newest").token(t, nil), credential.ReasonAPIServerUnavailable)
	})
}

// TestKeysAreFollowedWithoutDiscovery: a removed key loses its trust even if the fetch of the issuer fails.
func TestKeysAreFollowedWithoutDiscovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old, replacement := newSigner(t, "old"), newSigner(t, "new")
		server, config := startAPIServer(t, old)
		v := newVerifier(t, config)
		wantReason(t, v, old.token(t, nil), "")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = v.Run(ctx) }()
		server.noIssuer.Store(true)
		server.publish(replacement)
		time.Sleep(10 * time.Minute)
		wantReason(t, v, old.token(t, nil), credential.ReasonTokenInvalid)
		wantReason(t, v, replacement.token(t, nil), "")
	})
}

func TestUnknownKeysDoNotFloodTheAPIServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		server, config := startAPIServer(t, key)
		v := newVerifier(t, config)
		wantReason(t, v, key.token(t, nil), "")
		before := server.fetches.Load()
		var flood sync.WaitGroup
		for range 10 {
			for i := range 50 {
				forged := newSigner(t, fmt.Sprint("forged-", i)).token(t, nil)
				flood.Go(func() {
					if id, err := v.Verify(t.Context(), forged); err == nil {
						t.Errorf("a forged token was accepted for %v", id)
					}
				})
			}
			time.Sleep(2 * time.Second)
		}
		flood.Wait()
		// 20 s allow one fetch in 10 s each.
		if n := server.fetches.Load() - before; n > 2 {
			t.Errorf("500 unknown key IDs in 20 s caused %d fetches of the key set, want at most 2", n)
		}
	})
}

func TestWithoutKeysCallersRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		server, config := startAPIServer(t, key)
		server.network.SetDown(true)
		v := newVerifier(t, config)
		wantReason(t, v, key.token(t, nil), credential.ReasonAPIServerUnavailable)
		server.network.SetDown(false)
		time.Sleep(11 * time.Second)
		wantReason(t, v, key.token(t, nil), "")
	})
}

func TestConfiguredIssuersReplaceTheClusters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		_, config := startAPIServer(t, key)
		v := newVerifier(t, config, "https://one.example", "https://two.example")
		wantReason(t, v, key.token(t, func(c map[string]any) { c["iss"] = "https://two.example" }), "")
		wantReason(t, v, key.token(t, nil), credential.ReasonTokenIssuer)
	})
}

func TestNewJWKSNeedsAnAudience(t *testing.T) {
	_, err := verify.NewJWKS(verify.Config{REST: &rest.Config{}, Logger: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "--audience") {
		t.Errorf("got error %v, want one that names --audience", err)
	}
}
