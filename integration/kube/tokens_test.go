//go:build unix

package kube_test

import (
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/integration/cluster"
)

// Package cluster names these files.
const (
	privateFile = "service-account.key"
	publicFile  = "service-account.pub"
)

// signingKey returns the API server's key.
func signingKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	file, err := os.ReadFile(filepath.Join(control.Run().Dir(), privateFile))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(file)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*rsa.PrivateKey)
}

func encoded(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // the maps have strings and numbers only
	}
	return base64.RawURLEncoding.EncodeToString(text)
}

func decoded(t *testing.T, part string) map[string]any {
	t.Helper()
	text, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func sign(t *testing.T, key *rsa.PrivateKey, signed string) string {
	t.Helper()
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// forge changes the header and claims of a token and signs it with that key. With the API server's key, nobody can
// distinguish it from a token of the API server.
func forge(t *testing.T, key *rsa.PrivateKey, token string, change func(header, claims map[string]any)) string {
	t.Helper()
	parts := strings.Split(token, ".")
	header, claims := decoded(t, parts[0]), decoded(t, parts[1])
	change(header, claims)
	return sign(t, key, encoded(header)+"."+encoded(claims))
}

// row is the result for one kind of token: of each verifier, and of Bind if a verifier accepts the token.
type row struct{ jwks, tokenReview, bind string }

const accepted = "accepted"

// documented returns the decision table of docs/tokens.md. If the two modes differ, the page has the reason.
func documented(t *testing.T) map[string]row {
	t.Helper()
	page, err := os.ReadFile("../../docs/tokens.md")
	if err != nil {
		t.Fatal(err)
	}
	table := make(map[string]row)
	for line := range strings.Lines(string(page)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if len(cells) != 5 || !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| a token") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		bare := func(cell string) string { return strings.Trim(strings.TrimPrefix(cell, "–"), "`") }
		r := row{bare(cells[1]), bare(cells[2]), bare(cells[3])}
		table[cells[0]] = r
		if differs := r.jwks != r.tokenReview; differs != (cells[4] != "") {
			t.Errorf("a token %s: the two modes differ: %t, and the page's reason is %q", cells[0], differs, cells[4])
		}
	}
	return table
}

// TestDecisionTable shows that the table of docs/tokens.md is what the verifiers and Bind do on a real API server.
func TestDecisionTable(t *testing.T) {
	t.Parallel()
	want, ns, key := documented(t), namespace(t), signingKey(t)
	d := startDirectory(t, control.Config())
	live := pod(t, ns, "live", nil)
	good := podToken(t, live)
	parts := strings.Split(good, ".")
	none := func(_, _ map[string]any) {}
	claim := func(name string, value any) string {
		return forge(t, key, good, func(_, c map[string]any) {
			if c[name] = value; value == nil {
				delete(c, name)
			}
		})
	}
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tokens := map[string]string{
		"of a running pod":                              good,
		"made again with the API server's key":          forge(t, key, good, none),
		"expired":                                       claim("exp", time.Now().Add(-time.Hour).Unix()),
		"expired a moment ago":                          claim("exp", time.Now().Unix()),
		"without expiry":                                claim("exp", nil),
		"valid from 55 seconds ahead":                   claim("nbf", time.Now().Add(55*time.Second).Unix()),
		"not valid for another hour":                    claim("nbf", time.Now().Add(time.Hour).Unix()),
		"made in another hour":                          claim("iat", time.Now().Add(time.Hour).Unix()),
		"of a life of 25 hours":                         claim("exp", int64(decoded(t, parts[1])["iat"].(float64))+int64((25*time.Hour).Seconds())),
		"of a life of ten years":                        token(t, ns, "app", 10*365*24*time.Hour, podRef(live), audience),
		"for another audience":                          token(t, ns, "app", time.Hour, podRef(live), "another-audience"),
		"for the API server":                            token(t, ns, "app", time.Hour, podRef(live)),
		"without audience":                              claim("aud", nil),
		"of another issuer":                             claim("iss", "https://elsewhere.example"),
		"of the API server's second issuer":             claim("iss", secondIssuer),
		"of the second issuer, with both in `--issuer`": claim("iss", secondIssuer),
		"with another signature":                        strings.Join([]string{parts[0], parts[1], strings.Split(forge(t, stranger, good, none), ".")[2]}, "."),
		"with another payload":                          strings.Join([]string{parts[0], strings.Split(claim("jti", "x"), ".")[1], parts[2]}, "."),
		"with another header":                           encoded(map[string]any{"alg": "RS256", "kid": decoded(t, parts[0])["kid"], "typ": "JWT"}) + "." + parts[1] + "." + parts[2],
		"unsigned (`alg: none`)":                        encoded(map[string]any{"alg": "none", "typ": "JWT"}) + "." + parts[1] + ".",
		"signed with the public key (`HS256`)":          hmacWithPublicKey(t, parts),
		"signed with a stranger's key":                  forge(t, stranger, good, none),
		"signed with a stranger's key under a new id":   forge(t, stranger, good, func(h, _ map[string]any) { h["kid"] = "stranger" }),
		"bound to nothing":                              token(t, ns, "app", time.Hour, nil, audience),
		"longer than 16 KiB":                            claim("padding", strings.Repeat("x", identity.MaxTokenBytes)),
		"that is none":                                  "not-a-token",
	}

	secret, err := client.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "bound"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tokens["bound to a Secret"] = token(t, ns, "app", time.Hour, &authenticationv1.BoundObjectReference{Kind: "Secret", APIVersion: "v1", Name: secret.Name, UID: secret.UID}, audience)
	node, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "decision-table"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if minor, err := control.Minor(); err != nil {
		t.Fatal(err)
	} else if minor >= 31 {
		tokens["bound to a node"] = token(t, ns, "app", time.Hour, &authenticationv1.BoundObjectReference{Kind: "Node", APIVersion: "v1", Name: node.Name, UID: node.UID}, audience)
	} else {
		t.Logf("without the token that is bound to a node: Kubernetes 1.%d issues none", minor)
		delete(want, "bound to a node")
	}
	tokens["from a Secret (without expiry or audience)"] = legacyToken(t, ns)

	tokens["of a pod that was not injected"] = podToken(t, pod(t, ns, "plain", func(p *corev1.Pod) { p.Labels = nil }))
	finished := pod(t, ns, "finished", nil)
	tokens["of a pod that has finished"] = podToken(t, finished)
	finish(t, finished)
	// A pod on a node exists until the kubelet reports its end. This node has no kubelet.
	placed := func(p *corev1.Pod) { p.Spec.NodeName = node.Name }
	stuck := pod(t, ns, "stuck", placed)
	tokens["of a pod that should have ended over a minute ago"] = podToken(t, stuck)
	terminate(t, stuck, 1)
	ending := pod(t, ns, "ending", placed)
	tokens["of a pod that terminates"] = podToken(t, ending)
	gone := pod(t, ns, "gone", nil)
	tokens["of a deleted pod"] = podToken(t, gone)
	remove(t, gone)
	again := pod(t, ns, "again", nil)
	tokens["of a pod that was deleted and made again"] = podToken(t, again)
	remove(t, again)
	pod(t, ns, "again", nil)
	for name, row := range map[string]string{"doomed": "of a deleted service account", "reborn": "of a service account that was deleted and made again"} {
		account(t, ns, name)
		p := pod(t, ns, name, func(p *corev1.Pod) { p.Spec.ServiceAccountName = name })
		tokens[row] = podToken(t, p)
		if err := client.CoreV1().ServiceAccounts(ns).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	account(t, ns, "reborn")
	other := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "not-opted-in"}}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), other, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	account(t, other.Name, "app")
	tokens["of a pod in a namespace that is not opted in"] = podToken(t, pod(t, other.Name, "app", nil))

	if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(tokens))); diff != "" {
		t.Fatalf("the rows of the table and the tried tokens (- want, + tried):\n%s", diff)
	}
	// Kubernetes accepts a token for 60 s after its pod should have ended.
	if stuck, err = client.CoreV1().Pods(ns).Get(t.Context(), stuck.Name, metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Until(stuck.DeletionTimestamp.Add(61 * time.Second)))
	terminate(t, ending, 300)
	tokens["valid from 55 seconds ahead"] = claim("nbf", time.Now().Add(55*time.Second).Unix()) // a minute has passed

	got := make(map[string]row)
	review := newTokenReview(t, control.Config())
	for name, text := range tokens {
		// Each token has its own verifier, because a verifier requests unknown keys only once in ten seconds.
		jwks := newJWKS(t, control.Config())
		if strings.Contains(name, "--issuer") {
			jwks = newJWKS(t, control.Config(), cluster.Issuer, secondIssuer)
		}
		var r row
		var ids []identity.Pod
		for v, into := range map[identity.Verifier]*string{jwks: &r.jwks, review: &r.tokenReview} {
			id, err := v.Verify(t.Context(), identity.NewUnverifiedToken(text))
			if *into = outcome(err); err == nil {
				ids = append(ids, id)
			} else if id != (identity.Pod{}) || strings.Contains(err.Error(), text) {
				t.Errorf("a token %s is refused with the identity %v and the error %q", name, id, err)
			}
		}
		for _, id := range ids {
			if id != ids[0] {
				t.Errorf("a token %s: the verifiers return %+v and %+v", name, ids[0], id)
			}
		}
		if len(ids) > 0 {
			_, _, err := d.Bind(t.Context(), ids[0])
			r.bind = outcome(err)
		}
		got[name] = r
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(row{})); diff != "" {
		t.Errorf("the decision table (- docs/tokens.md, + got):\n%s", diff)
	}
}

// terminate deletes a pod with a grace period in seconds.
func terminate(t *testing.T, p *corev1.Pod, grace int64) {
	t.Helper()
	if err := client.CoreV1().Pods(p.Namespace).Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
		t.Fatal(err)
	}
}

// finish reports that a pod has succeeded, as a kubelet does.
func finish(t *testing.T, p *corev1.Pod) {
	t.Helper()
	if _, err := client.CoreV1().Pods(p.Namespace).Patch(t.Context(), p.Name, types.MergePatchType,
		[]byte(`{"status":{"phase":"Succeeded"}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
}

func hmacWithPublicKey(t *testing.T, parts []string) string {
	t.Helper()
	public, err := os.ReadFile(filepath.Join(control.Run().Dir(), publicFile))
	if err != nil {
		t.Fatal(err)
	}
	signed := encoded(map[string]any{"alg": "HS256", "kid": decoded(t, parts[0])["kid"]}) + "." + parts[1]
	mac := hmac.New(sha256.New, public)
	mac.Write([]byte(signed))
	return signed + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// legacyToken returns a token in a Secret, which never expires.
func legacyToken(t *testing.T, ns string) string {
	t.Helper()
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "legacy", Annotations: map[string]string{corev1.ServiceAccountNameKey: "app"}},
		Type:       corev1.SecretTypeServiceAccountToken,
	}
	if _, err := client.CoreV1().Secrets(ns).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the controller manager has written a token into the Secret", func() bool {
		var err error
		secret, err = client.CoreV1().Secrets(ns).Get(t.Context(), "legacy", metav1.GetOptions{})
		return err == nil && len(secret.Data[corev1.ServiceAccountTokenKey]) > 0
	})
	return string(secret.Data[corev1.ServiceAccountTokenKey])
}
