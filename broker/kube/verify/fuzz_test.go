package verify_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

// FuzzToken presents arbitrary text. Only the token that the key signed is accepted, and errors stay short.
func FuzzToken(f *testing.F) {
	key := newSigner(f, "a")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/jwks") {
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.key.Public(), KeyID: key.id, Algorithm: string(jose.ES256), Use: "sig"}}})
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"issuer": issuer})
	}))
	f.Cleanup(server.Close)
	v := newVerifier(f, &rest.Config{Host: server.URL})
	valid := key.token(f, nil).Reveal()
	want, err := v.Verify(f.Context(), identity.NewUnverifiedToken(valid)) // fetches the keys
	if err != nil {
		f.Fatal(err)
	}
	parts := strings.Split(valid, ".")
	part := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	for _, seed := range []string{
		valid, "", ".", "..", "...", parts[0] + "." + parts[1] + ".", parts[0] + ".." + parts[2], valid + ".", " " + valid, valid + "=", valid + "\n",
		part(`{"alg":"none"}`) + "." + parts[1] + ".", part(`{"alg":"HS256","kid":"a"}`) + "." + parts[1] + "." + parts[2],
		part(`{"alg":"ES256","kid":"a","b64":false,"crit":["b64"]}`) + "." + parts[1] + "." + parts[2],
		part(`{"alg":"ES256","kid":"a","jwk":{}}`) + "." + parts[1] + "." + parts[2],
		parts[0] + "." + part(`{"iss":"`+issuer+`","aud":"`+audience+`","exp":99999999999}`) + "." + parts[2],
		`{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` + parts[2] + `"}`,
		strings.Repeat("a", identity.MaxTokenBytes+1),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id, err := v.Verify(t.Context(), identity.NewUnverifiedToken(text))
		switch {
		case err == nil && (id != want || !sameToken(text, valid)):
			t.Errorf("%q was accepted as %+v", text, id)
		case err != nil && id != (identity.Pod{}):
			t.Errorf("%q was refused, and %+v was returned with the error", text, id)
		case err != nil && credential.ReasonOf(err) == credential.ReasonInternal:
			t.Errorf("%q was refused without a reason: %v", text, err)
		case err != nil && len(err.Error()) > 2000:
			t.Errorf("the refusal of %q has %d bytes", text, len(err.Error()))
		}
	})
}

// sameToken reports whether two texts have the same signed bytes and the same signature. Base64 allows several spellings of
// the last letter of a signature.
func sameToken(a, b string) bool {
	split := func(s string) (string, string) {
		at := strings.LastIndex(s, ".")
		if at < 0 {
			return s, ""
		}
		signature, _ := base64.RawURLEncoding.DecodeString(s[at+1:])
		return s[:at], string(signature)
	}
	signedA, signatureA := split(a)
	signedB, signatureB := split(b)
	return signedA == signedB && signatureA == signatureB
}
