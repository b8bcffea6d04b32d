//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"os"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
)

// soak skips a test that takes longer than all others together, unless "make soak" runs it.
func soak(t *testing.T) {
	t.Helper()
	if os.Getenv(variable) != "soak" {
		t.Skip("it takes many minutes; make soak runs it")
	}
}

// TestSoakCAIsReplaced deletes the CA. cert-manager issues another one with a new key, and new certificates. No call fails:
// the broker publishes the new root next to the old one, and brokers serve their old certificates until pods have it.
func TestSoakCAIsReplaced(t *testing.T) {
	soak(t)
	ns := namespace(t)
	create(t, ns, caller(t, app("app", annotated(), "watch", "1h")))
	awaitReady(t, ns, "app")
	before, err := served(t.Context(), "broker")
	if err != nil || len(before) != 1 {
		t.Fatalf("the brokers serve %v, %v: want one certificate", before, err)
	}
	secrets := d.Client.CoreV1().Secrets(deployment.Namespace)
	old, err := secrets.Get(t.Context(), "credence-ca", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := secrets.Delete(t.Context(), old.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "there is a new CA", func() error {
		now, err := secrets.Get(t.Context(), old.Name, metav1.GetOptions{})
		if err == nil && (len(now.Data["tls.key"]) == 0 || string(now.Data["tls.key"]) == string(old.Data["tls.key"])) {
			err = errors.New("it has the old key")
		}
		return err
	})
	renew(t, "credence-broker")
	renew(t, "credence-webhook")
	await.Until(t, "each broker serves a certificate of the new CA", func() error {
		now, err := served(t.Context(), "broker")
		if err != nil {
			return err
		}
		if len(now) != 1 || now[first(before)] {
			return fmt.Errorf("they serve %d certificates, the old one among them: %v", len(now), now[first(before)])
		}
		return nil
	})
	calm(t, ns, "app")
	create(t, ns, once(app("after", annotated(), "whoami")))
	awaitEnd(t, ns, "after")
}

func first(set map[string]bool) string {
	for key := range set {
		return key
	}
	return ""
}
