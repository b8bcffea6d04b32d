//go:build linux

package deployment

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Selector returns the label selector of the pods of a component: broker or webhook, or a component of cert-manager.
func Selector(component string) string { return "app.kubernetes.io/component=" + component }

// Pods returns the pods of a component of Credence: broker or webhook.
func (d *Deployment) Pods(ctx context.Context, component string) ([]corev1.Pod, error) {
	list, err := d.Client.CoreV1().Pods(Namespace).List(ctx, metav1.ListOptions{LabelSelector: Selector(component)})
	if err != nil {
		return nil, fmt.Errorf("listing the pods of the %s: %w", component, err)
	}
	return list.Items, nil
}

// Served returns the serial numbers of the certificates that the pods of a component serve.
func (d *Deployment) Served(ctx context.Context, component string) (map[string]bool, error) {
	pods, err := d.Pods(ctx, component)
	if err != nil {
		return nil, err
	}
	serials := make(map[string]bool)
	for _, pod := range pods {
		conn, err := d.Cluster.Host().Dial(ctx, "tcp", net.JoinHostPort(pod.Status.PodIP, "9443"))
		if err != nil {
			return nil, err
		}
		// This only reads the certificate. Brokers serve HTTP/2 only, webhooks HTTP/1.1 only.
		client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}) //nolint:gosec // See above.
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

// RenewCertificate makes cert-manager renew the certificate of a component immediately, as cmctl renew does.
func (d *Deployment) RenewCertificate(ctx context.Context, component string) error {
	patch := fmt.Appendf(nil, `{"status":{"conditions":[{"type":"Issuing","status":"True","reason":"ManuallyTriggered","message":"a test","lastTransitionTime":%q}]}}`,
		time.Now().UTC().Format(time.RFC3339))
	return d.Client.Discovery().RESTClient().Patch(types.MergePatchType).
		AbsPath("/apis/cert-manager.io/v1/namespaces", Namespace, "certificates", "credence-"+component, "status").Body(patch).Do(ctx).Error()
}
