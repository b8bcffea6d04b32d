//go:build linux

package e2e

import (
	"fmt"
	"testing"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
)

// TestCertificatesAreRenewedWhilePodsRun renews the certificates of the broker and the webhook while pods run and are
// created. No call fails.
func TestCertificatesAreRenewedWhilePodsRun(t *testing.T) {
	ns := d.Namespace(t)
	kubetest.Create(t, d.Client, ns, caller(t, d.App("app", annotated(), "watch", "1h")))
	kubetest.AwaitReady(t, d.Client, ns, "app")
	components := []string{"broker", "webhook"}
	before := map[string]map[string]bool{}
	for _, component := range components {
		var err error
		if before[component], err = d.Served(t.Context(), component); err != nil || len(before[component]) != 1 {
			t.Fatalf("the %ss serve %v, %v: want one certificate", component, before[component], err)
		}
	}
	for _, component := range components {
		if err := d.RenewCertificate(t.Context(), component); err != nil {
			t.Fatal(err)
		}
	}
	for _, component := range components {
		await.Until(t, "each "+component+" serves the new certificate", func() error {
			// The API server can call webhooks with either certificate.
			if _, err := kubetest.Dry(t, d.Client, ns, d.App("next", annotated(), "whoami")); err != nil {
				return await.Never{Err: fmt.Errorf("a pod was refused: %w", err)}
			}
			now, err := d.Served(t.Context(), component)
			if err != nil {
				return err
			}
			for serial := range before[component] {
				if now[serial] || len(now) != 1 {
					return fmt.Errorf("they serve %d certificates, the old one among them: %v", len(now), now[serial])
				}
			}
			return nil
		})
	}
	calm(t, ns, "app")
}
