//go:build linux

package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
)

// served returns the serial numbers of the certificates that the pods of a component serve.
func served(ctx context.Context, component string) (map[string]bool, error) {
	pods, err := podsOf(ctx, component)
	if err != nil {
		return nil, err
	}
	serials := make(map[string]bool)
	for _, pod := range pods {
		conn, err := world.Host().Dial(ctx, "tcp", net.JoinHostPort(pod.Status.PodIP, "9443"))
		if err != nil {
			return nil, err
		}
		// This only reads the certificate. Brokers serve HTTP/2 only, webhooks HTTP/1.1 only.
		client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
		err = client.HandshakeContext(ctx)
		if err == nil {
			serials[client.ConnectionState().PeerCertificates[0].SerialNumber.String()] = true
		}
		if err := errors.Join(err, conn.Close()); err != nil {
			return nil, err
		}
	}
	return serials, nil
}

// renew makes cert-manager renew a certificate immediately, as cmctl renew does.
func renew(t *testing.T, name string) {
	t.Helper()
	patch := fmt.Appendf(nil, `{"status":{"conditions":[{"type":"Issuing","status":"True","reason":"ManuallyTriggered","message":"a test","lastTransitionTime":%q}]}}`,
		time.Now().UTC().Format(time.RFC3339))
	err := d.Client.Discovery().RESTClient().Patch(types.MergePatchType).
		AbsPath("/apis/cert-manager.io/v1/namespaces", deployment.Namespace, "certificates", name, "status").Body(patch).Do(t.Context()).Error()
	if err != nil {
		t.Fatal(err)
	}
}

// TestCertificatesAreRenewedWhilePodsRun renews the certificates of the broker and the webhook while pods run and are
// created. No call fails.
func TestCertificatesAreRenewedWhilePodsRun(t *testing.T) {
	ns := namespace(t)
	create(t, ns, caller(t, app("app", annotated(), "watch", "1h")))
	awaitReady(t, ns, "app")
	for _, component := range []string{"broker", "webhook"} {
		before, err := served(t.Context(), component)
		if err != nil || len(before) != 1 {
			t.Fatalf("the %ss serve %v, %v: want one certificate", component, before, err)
		}
		renew(t, "credence-"+component)
		await.Until(t, "each "+component+" serves the new certificate", func() error {
			// The API server can call webhooks with either certificate.
			if _, err := tryDry(t, ns, app("next", annotated(), "whoami")); err != nil {
				return await.Never{Err: fmt.Errorf("a pod was refused: %w", err)}
			}
			now, err := served(t.Context(), component)
			if err != nil {
				return err
			}
			for serial := range before {
				if now[serial] || len(now) != 1 {
					return fmt.Errorf("they serve %d certificates, the old one among them: %v", len(now), now[serial])
				}
			}
			return nil
		})
	}
	calm(t, ns, "app")
}
