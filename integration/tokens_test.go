//go:build unix

package integration

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/stack"
)

// resign changes the claims of a token and signs it again with the cluster's own key, for what the
// TokenRequest API does not give: it has no token that has expired, nor one of another issuer.
func resign(t *testing.T, token string, change func(claims map[string]any)) string {
	t.Helper()
	parts := strings.Split(token, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := json.Unmarshal(payload, &claims); err != nil {
		t.Fatal(err)
	}
	change(claims)
	if payload, err = json.Marshal(claims); err != nil {
		t.Fatal(err)
	}
	signed := parts[0] + "." + base64.RawURLEncoding.EncodeToString(payload)
	file, err := os.ReadFile(filepath.Join(control.Run().Dir(), "service-account.key"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(file)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key.(*rsa.PrivateKey), crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func TestBrokerRefusesTokens(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	pod := create(t, ns, "app", map[string]string{roleKey: "cart"})
	good := token(t, pod)
	if lease, err := ask(t, good); err != nil || lease.Role.String() != arn("cart") {
		t.Fatalf("the token that all others are made from was answered %s, %v", lease.Role, err)
	}
	if lease, err := ask(t, resign(t, good, func(map[string]any) {})); err != nil || lease.AccessKeyID == "" {
		t.Fatalf("the same token, signed again, was answered %v: the tests below would prove nothing", err)
	}
	audience := func(audience string) string {
		text, err := credence.Token(t.Context(), pod, audience, stack.TokenSeconds)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	tampered := func() string {
		parts := strings.Split(good, ".")
		payload, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err != nil {
			t.Fatal(err)
		}
		parts[1] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(payload), `"app"`, `"apq"`, 1)))
		return strings.Join(parts, ".")
	}
	unsigned := func() string {
		parts := strings.Split(good, ".")
		return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + parts[1] + "."
	}
	tests := []struct {
		name   string
		token  string
		reason credential.Reason
	}{
		{"expired", resign(t, good, func(c map[string]any) { c["exp"] = time.Now().Add(-time.Second).Unix() }), credential.ReasonTokenExpired},
		{"that never expires", resign(t, good, func(c map[string]any) { delete(c, "exp") }), credential.ReasonTokenInvalid},
		{"not valid yet", resign(t, good, func(c map[string]any) { c["nbf"] = time.Now().Add(time.Hour).Unix() }), credential.ReasonTokenEarly},
		{"valid for ten years", resign(t, good, func(c map[string]any) { c["exp"] = time.Now().AddDate(10, 0, 0).Unix() }), credential.ReasonTokenLongLived},
		{"for another audience", audience("somebody-else"), credential.ReasonTokenAudience},
		{"for the API server", audience(""), credential.ReasonTokenAudience},
		{"of another issuer", resign(t, good, func(c map[string]any) { c["iss"] = "https://elsewhere.example" }), credential.ReasonTokenIssuer},
		{"tampered with", tampered(), credential.ReasonTokenInvalid},
		{"unsigned", unsigned(), credential.ReasonTokenInvalid},
		{"bound to no pod", resign(t, good, func(c map[string]any) { delete(c["kubernetes.io"].(map[string]any), "pod") }), credential.ReasonTokenNotPodBound},
		{"that is none", "not-a-token", credential.ReasonTokenInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			lease, err := ask(t, tt.token)
			refused(t, lease, err, tt.reason)
		})
	}
}

func TestBrokerRefusesDeletedAndRecreatedPods(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	annotations := map[string]string{roleKey: "cart"}
	first := create(t, ns, "app", annotations)
	old := token(t, first)
	if _, err := ask(t, old); err != nil {
		t.Fatal(err)
	}
	remove(t, first)
	lease, err := ask(t, old)
	refused(t, lease, err, credential.ReasonPodNotFound)

	second := create(t, ns, "app", annotations)
	lease, err = ask(t, old)
	refused(t, lease, err, credential.ReasonPodNotFound)
	if _, err := ask(t, token(t, second)); err != nil {
		t.Errorf("the new pod itself: %v", err)
	}
}

func TestBrokerRefusesPodsOfANamespaceThatIsNoLongerLabelled(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	text := token(t, create(t, ns, "app", map[string]string{roleKey: "cart"}))
	if _, err := ask(t, text); err != nil {
		t.Fatal(err)
	}
	namespaces := credence.Client.CoreV1().Namespaces()
	object, err := namespaces.Get(t.Context(), ns, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	delete(object.Labels, injectLabel)
	if _, err := namespaces.Update(t.Context(), object, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	// The broker learns of it through a watch, a moment later.
	var lease credential.Lease
	for range 100 {
		if lease, err = ask(t, text); err != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	refused(t, lease, err, credential.ReasonNamespaceNotOpted)
}

func TestBrokerRefusesPodsThatWereNotInjected(t *testing.T) {
	t.Parallel()
	// The namespace is opted in after the pod was made.
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "late-opt-in", Annotations: map[string]string{permittedKey: ".*"}}}
	if err := credence.MakeNamespace(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	text := token(t, create(t, ns.Name, "app", map[string]string{roleKey: "cart"}))
	object, err := credence.Client.CoreV1().Namespaces().Get(t.Context(), ns.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	object.Labels[injectLabel] = "enabled"
	if _, err := credence.Client.CoreV1().Namespaces().Update(t.Context(), object, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	lease, err := ask(t, text)
	refused(t, lease, err, credential.ReasonPodNotInjected)
}

func TestServiceAccountRecreatedUnderThePod(t *testing.T) {
	t.Parallel()
	ns := namespace(t, ".*")
	accounts := credence.Client.CoreV1().ServiceAccounts(ns)
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "cart"}}
	if _, err := accounts.Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod := stack.Pod("app", map[string]string{roleKey: "cart"})
	pod.Spec.ServiceAccountName = account.Name
	created, err := credence.Client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	text := token(t, created)
	if _, err := ask(t, text); err != nil {
		t.Fatal(err)
	}
	if err := accounts.Delete(t.Context(), account.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := accounts.Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var lease credential.Lease
	for range 100 { // until the broker's watch has brought it
		if lease, err = ask(t, text); err != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	refused(t, lease, err, credential.ReasonServiceAccountGone)
}
