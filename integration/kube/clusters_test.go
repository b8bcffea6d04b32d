//go:build unix

package kube_test

import (
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/kubetest"
)

// TestTokensOfAnotherCluster shows that a pod gets nothing from the broker of another cluster whose tokens have the same
// issuer. Both clusters have a pod of the same name, with the same annotations.
func TestTokensOfAnotherCluster(t *testing.T) {
	t.Parallel()
	// The other cluster also trusts the key of the shared cluster, as clusters do that are made from one set of keys.
	other, err := cluster.Start(t.Context(), cluster.Config{
		APIServerFlags: []string{"--service-account-key-file=" + filepath.Join(control.Run().Dir(), publicFile)},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := other.Stop(); err != nil {
			t.Error(err)
		}
	})
	otherClient, err := kubernetes.NewForConfig(other.Config())
	if err != nil {
		t.Fatal(err)
	}
	here := pod(t, namespace(t), "app", nil)
	there := twin(t, otherClient, here)
	hereToken, thereToken := podToken(t, here), tokenFrom(t, otherClient, there.Namespace, "app", time.Hour, podRef(there), audience)

	for _, c := range []struct {
		name               string
		at                 *cluster.Cluster // whose broker gets the token
		token              string
		jwks, review, bind string
	}{
		{"its own cluster's", control, hereToken, accepted, accepted, accepted},
		{"the other cluster's own", other, thereToken, accepted, accepted, accepted},
		{"another audience", other, token(t, here.Namespace, "app", time.Hour, podRef(here), "credence-here"), "TOKEN_AUDIENCE", "TOKEN_AUDIENCE", ""},
		{"an unknown key", control, thereToken, "TOKEN_INVALID", "TOKEN_INVALID", ""},
		{"a trusted key and the same audience", other, hereToken, accepted, "TOKEN_INVALID", "SERVICE_ACCOUNT_GONE"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id, err := newJWKS(t, c.at.Config()).Verify(t.Context(), identity.NewUnverifiedToken(c.token))
			if got := outcome(err); got != c.jwks {
				t.Errorf("by keys, the token is %s (%v), want %s", got, err, c.jwks)
			}
			if err == nil {
				_, _, err := startDirectory(t, c.at.Config()).Bind(t.Context(), id)
				if got := outcome(err); got != c.bind {
					t.Errorf("binding: %s (%v), want %s", got, err, c.bind)
				}
			}
			_, err = newTokenReview(t, c.at.Config()).Verify(t.Context(), identity.NewUnverifiedToken(c.token))
			if got := outcome(err); got != c.review {
				t.Errorf("by review, the token is %s (%v), want %s", got, err, c.review)
			}
		})
	}
}

// twin creates the namespace, the ServiceAccount and the pod in another cluster.
func twin(t *testing.T, client kubernetes.Interface, of *corev1.Pod) *corev1.Pod {
	t.Helper()
	named := metav1.ObjectMeta{Name: of.Namespace, Labels: map[string]string{injectKey: "enabled"}}
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: named}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: of.Spec.ServiceAccountName}}
	if _, err := client.CoreV1().ServiceAccounts(of.Namespace).Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return kubetest.Create(t, client, of.Namespace, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: of.Name, Labels: of.Labels, Annotations: of.Annotations},
		Spec:       of.Spec,
	})
}
