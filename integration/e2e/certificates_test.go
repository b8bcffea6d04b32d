//go:build linux

package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/deployment"
)

// caller adds a container to the pod that asks the broker as the pod's sidecar does, many times a second.
func caller(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	key, err := policy.Pod{Request: keys.Request(pod.Annotations)}.RoutingKey()
	if err != nil {
		t.Fatal(err)
	}
	const volume, path = "caller", "/identity"
	c := container("caller")
	c.Image = callerImage
	c.VolumeMounts = []corev1.VolumeMount{{Name: volume, MountPath: path}}
	c.Env = []corev1.EnvVar{
		{Name: "CREDENCE_BROKER", Value: "credence-broker." + deployment.Namespace + ".svc:9443"},
		{Name: "CREDENCE_ROUTING_KEY", Value: string(key)},
		{Name: "CREDENCE_TOKEN_FILE", Value: path + "/token"},
		{Name: "CREDENCE_ROOTS_FILE", Value: path + "/roots.pem"},
	}
	pod.Spec.Containers = append(pod.Spec.Containers, c)
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: volume, VolumeSource: corev1.VolumeSource{
		Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "credence-broker", ExpirationSeconds: new(int64(3600)), Path: "token"}},
			{ConfigMap: &corev1.ConfigMapProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: "credence-trust"},
				Items:                []corev1.KeyToPath{{Key: "roots.pem", Path: "roots.pem"}},
			}},
		}},
	}})
	return pod
}

// calm checks that nothing in the pod of that name has noticed anything since it began, and that its caller
// still calls.
func calm(t *testing.T, namespace, name string) {
	t.Helper()
	before := strings.Count(logs(t, namespace, name, "caller"), "calls ")
	eventually(t, "the caller goes on", func(ctx context.Context) error {
		if now := strings.Count(logs(t, namespace, name, "caller"), "calls "); now <= before {
			return fmt.Errorf("it has written %d lines", now)
		}
		return nil
	})
	if said := logs(t, namespace, name, "caller"); strings.Contains(said, "FAILED") {
		t.Errorf("calls of the broker have failed:\n%s", said)
	}
	pod, err := get(t.Context(), namespace, name)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"app", "caller", sidecarName} {
		if s := status(t, pod, c); s.RestartCount != 0 {
			t.Errorf("container %s has failed: %s", c, states(pod))
		}
	}
}

// served returns the serial numbers of the certificates that each pod of a component serves.
func served(ctx context.Context, component string) (map[string]bool, error) {
	pods, err := d.Client.CoreV1().Pods(deployment.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
	if err != nil {
		return nil, err
	}
	serials := make(map[string]bool)
	for _, pod := range pods.Items {
		conn, err := world.Host().Dial(ctx, "tcp", net.JoinHostPort(pod.Status.PodIP, "9443"))
		if err != nil {
			return nil, err
		}
		// Whom it trusts is not the question here. Brokers speak HTTP/2 only, webhooks HTTP/1.1 only.
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

// renew has cert-manager renew a certificate at once, as cmctl renew does.
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

// cert-manager renews the certificates of broker and webhook while pods run and are made. No call fails.
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
		eventually(t, "each "+component+" serves the new certificate", func(ctx context.Context) error {
			// The API server, too, goes on calling webhooks of both certificates.
			if _, err := d.Client.CoreV1().Pods(ns).Create(ctx, app("asked", annotated(), "whoami"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
				return fatalError{fmt.Errorf("a pod was refused: %w", err)}
			}
			now, err := served(ctx, component)
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
