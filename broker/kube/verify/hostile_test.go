package verify_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

// payload returns a pod's claims as JSON. replace has pairs: a text in the claims, and its replacement.
func payload(replace ...string) string {
	now := time.Now().Unix()
	text := fmt.Sprintf(`{"aud":["%s"],"exp":%d,"iat":%d,"iss":"%s","jti":"j","kubernetes.io":{"namespace":"shop","node":{"name":"n","uid":"n-1"},`+
		`"pod":{"name":"cart-1","uid":"u-1"},"serviceaccount":{"name":"cart","uid":"s-1"}},"nbf":%d,"sub":"system:serviceaccount:shop:cart"}`,
		audience, now+3600, now, issuer, now)
	return strings.NewReplacer(replace...).Replace(text)
}

// signed returns a token with text as its payload.
func (s signer) signed(t *testing.T, text string) identity.UnverifiedToken {
	t.Helper()
	jws, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: s.key, KeyID: s.id}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := jws.Sign([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	compact, err := signature.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return identity.NewUnverifiedToken(compact)
}

// TestClaimsOfOtherForms signs claims of unusual forms: numbers that are not times, and values of other types. None makes a
// token valid, or valid for longer, although the API server's key signed it.
func TestClaimsOfOtherForms(t *testing.T) {
	key := newSigner(t, "a")
	modes(t, key, func(t *testing.T, newVerifier func(time.Duration) identity.Verifier) {
		v := newVerifier(0)
		now := time.Now().Unix()
		exp, nbf, iat := fmt.Sprintf(`"exp":%d`, now+3600), fmt.Sprintf(`"nbf":%d`, now), fmt.Sprintf(`"iat":%d`, now)
		for _, tt := range []struct {
			name, from, to string
			want           credential.Reason
		}{
			{"good", "", "", ""},
			{"times with a fraction", exp, fmt.Sprintf(`"exp":%d.9`, now+3600), ""},
			{"a fraction of a second left", exp, fmt.Sprintf(`"exp":%d.9`, now), credential.ReasonTokenExpired},
			{"a time with an exponent", exp, fmt.Sprintf(`"exp":%de0`, now+3600), ""},
			{"exp after year 9999", exp, `"exp":1e300`, credential.ReasonTokenInvalid},
			{"exp of 2^63", exp, `"exp":9223372036854775808`, credential.ReasonTokenInvalid},
			{"exp of 2^62-1024", exp, `"exp":4611686018427386880`, credential.ReasonTokenLongLived},
			{"exp of -2^62", exp, `"exp":-4611686018427386880`, credential.ReasonTokenExpired},
			{"exp of 1e999", exp, `"exp":1e999`, credential.ReasonTokenInvalid},
			{"exp as text", exp, fmt.Sprintf(`"exp":"%d"`, now+3600), credential.ReasonTokenInvalid},
			{"exp of null", exp, `"exp":null`, credential.ReasonTokenInvalid},
			{"exp in a list", exp, fmt.Sprintf(`"exp":[%d]`, now+3600), credential.ReasonTokenInvalid},
			{"exp of 0", exp, `"exp":0`, credential.ReasonTokenExpired},
			{"exp below 0", exp, `"exp":-1`, credential.ReasonTokenExpired},
			{"nbf after year 9999", nbf, `"nbf":1e300`, credential.ReasonTokenInvalid},
			{"nbf of 2^62-1024", nbf, `"nbf":4611686018427386880`, credential.ReasonTokenEarly},
			{"iat of 2^62-1024", iat, `"iat":4611686018427386880`, credential.ReasonTokenEarly},
			{"nbf before year 0", nbf, `"nbf":-4611686018427386880`, credential.ReasonTokenLongLived},
			{"nbf of 0", nbf, `"nbf":0`, credential.ReasonTokenLongLived},
			{"iat of 0", iat, `"iat":0`, credential.ReasonTokenLongLived},
			{"nbf as text", nbf, `"nbf":"0"`, credential.ReasonTokenInvalid},
			{"an audience in a list in a list", `["` + audience + `"]`, `[["` + audience + `"]]`, credential.ReasonTokenInvalid},
			{"an audience with a blank", `["` + audience + `"]`, `["` + audience + ` "]`, credential.ReasonTokenAudience},
			{"an audience in capitals", `["` + audience + `"]`, `["` + strings.ToUpper(audience) + `"]`, credential.ReasonTokenAudience},
			{"an audience of null", `["` + audience + `"]`, `null`, credential.ReasonTokenInvalid},
			{"very many audiences", `["` + audience + `"]`, `[` + strings.Repeat(`"",`, 2000) + `"x"]`, credential.ReasonTokenAudience},
			{"a list as pod", `{"name":"cart-1","uid":"u-1"}`, `["cart-1","u-1"]`, credential.ReasonTokenInvalid},
			{"a pod without name", `"name":"cart-1"`, `"name":""`, credential.ReasonTokenNotPodBound},
			{"a longer subject", `shop:cart"}`, `shop:cart:x"}`, credential.ReasonTokenInvalid},
			{"a namespace with a colon", `"namespace":"shop"`, `"namespace":"shop:cart"`, credential.ReasonTokenInvalid},
			{"not an object", "{", "[{", credential.ReasonTokenInvalid},
			{"text after the object", `shop:cart"}`, `shop:cart"}{}`, credential.ReasonTokenInvalid},
		} {
			var replace []string
			if tt.from != "" {
				replace = []string{tt.from, tt.to}
			}
			if wantReason(t, v, key.signed(t, payload(replace...)), tt.want); t.Failed() {
				t.Fatalf("the token was %q", tt.name)
			}
		}
		// Deeply nested claims.
		deep := strings.Repeat("[", 4000)
		wantReason(t, v, key.signed(t, payload(`"j"`, deep+strings.Repeat("]", 4000))), credential.ReasonTokenInvalid)
	})
}

// TestHeadersOfOtherForms changes the header, which names the token's key and algorithm. The verifier trusts none of it.
func TestHeadersOfOtherForms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := newSigner(t, "a")
		server, config := startAPIServer(t, key)
		v := newVerifier(t, config)
		good := key.signed(t, payload())
		wantReason(t, v, good, "")
		parts := strings.Split(good.Reveal(), ".")
		code := base64.RawURLEncoding.EncodeToString
		with := func(header string) identity.UnverifiedToken {
			return identity.NewUnverifiedToken(code([]byte(header)) + "." + parts[1] + "." + parts[2])
		}
		public, err := x509.MarshalPKIXPublicKey(key.key.Public())
		if err != nil {
			t.Fatal(err)
		}
		// An HMAC with the public key as its secret.
		hmacHeader := code([]byte(`{"alg":"HS256","kid":"a"}`)) + "." + parts[1]
		mac := hmac.New(sha256.New, public)
		mac.Write([]byte(hmacHeader))
		// The header contains the token's own key.
		own := newSigner(t, "a")
		jws, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: own.key}, (&jose.SignerOptions{EmbedJWK: true}).WithHeader("kid", "a"))
		if err != nil {
			t.Fatal(err)
		}
		signature, err := jws.Sign([]byte(payload()))
		if err != nil {
			t.Fatal(err)
		}
		embedded, err := signature.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		for name, token := range map[string]identity.UnverifiedToken{
			"none":                       with(`{"alg":"none","kid":"a"}`),
			"none, unsigned":             identity.NewUnverifiedToken(code([]byte(`{"alg":"none","kid":"a"}`)) + "." + parts[1] + "."),
			"None":                       with(`{"alg":"None","kid":"a"}`),
			"HMAC":                       with(`{"alg":"HS256","kid":"a"}`),
			"HMAC with the public key":   identity.NewUnverifiedToken(hmacHeader + "." + code(mac.Sum(nil))),
			"RSA":                        with(`{"alg":"RS256","kid":"a"}`),
			"another curve":              with(`{"alg":"ES512","kid":"a"}`),
			"PSS":                        with(`{"alg":"PS256","kid":"a"}`),
			"no algorithm":               with(`{"kid":"a"}`),
			"two algorithms":             with(`{"alg":"ES256","alg":"none","kid":"a"}`),
			"two key ids":                with(`{"alg":"ES256","kid":"b","kid":"a"}`),
			"a key id that is a number":  with(`{"alg":"ES256","kid":7}`),
			"a key id that is a path":    with(`{"alg":"ES256","kid":"../../etc/passwd"}`),
			"no key id":                  with(`{"alg":"ES256"}`),
			"a long key id":              with(`{"alg":"ES256","kid":"` + strings.Repeat("a", 8000) + `"}`),
			"its own key":                identity.NewUnverifiedToken(embedded),
			"an extension":               with(`{"alg":"ES256","kid":"a","crit":["x"],"x":1}`),
			"a payload without encoding": with(`{"alg":"ES256","kid":"a","crit":["b64"],"b64":false}`),
			"an empty signature":         identity.NewUnverifiedToken(parts[0] + "." + parts[1] + "."),
			"a signature of zeros":       identity.NewUnverifiedToken(parts[0] + "." + parts[1] + "." + code(make([]byte, 64))),
			"four parts":                 identity.NewUnverifiedToken(good.Reveal() + "."),
			"JSON serialization":         identity.NewUnverifiedToken(`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`),
		} {
			time.Sleep(11 * time.Second) // until the key set may be fetched again
			if wantReason(t, v, token, credential.ReasonTokenInvalid); t.Failed() {
				t.Fatalf("the token was %q", name)
			}
		}
		// Many key IDs cause no more requests than one.
		before := server.fetches.Load()
		for i := range 1000 {
			_, _ = v.Verify(t.Context(), with(fmt.Sprintf(`{"alg":"ES256","kid":"%d"}`, i)))
		}
		if n := server.fetches.Load() - before; n > 1 {
			t.Errorf("tokens with 1,000 key IDs caused %d fetches of the keys", n)
		}
		wantReason(t, v, good, "")
	})
}

// FuzzKeySet publishes an arbitrary entry next to a key. The broker does not crash, and the key stays usable.
func FuzzKeySet(f *testing.F) {
	for _, k := range strangeKeys {
		f.Add([]byte(k))
	}
	f.Add([]byte(`{"kty":"RSA","n":"AQ","e":"AQAB","x5c":["!"]}`))
	f.Add([]byte(`{"kty":"EC","crv":"P-256","x":"","y":""}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if !json.Valid(text) {
			t.Skip("the document is not JSON")
		}
		synctest.Test(t, func(t *testing.T) {
			key := newSigner(t, "a")
			server, config := startAPIServer(t, key)
			server.add(text)
			wantReason(t, newVerifier(t, config), key.token(t, nil), "")
		})
	})
}
