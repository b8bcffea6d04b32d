//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// TestDescribeSaysWhyPodsWait shows that "kubectl describe pod" prints why a pod has no credentials, if no broker is reached and
// if the broker is impaired. It stops parts of Credence, so it does not run in parallel.
func TestDescribeSaysWhyPodsWait(t *testing.T) {
	ns := d.Namespace(t)
	start := stop(t, "broker")
	kubetest.Create(t, d.Client, ns, paused("unreachable", map[string]string{roleKey: bucket, startTimeoutKey: "25s"}))
	describes(t, ns, "no credentials yet", "unreachable").has(t,
		"Startup probe failed: credence-sidecar: no credentials yet: BROKER_UNREACHABLE: cannot reach any broker")
	pod := kubetest.AwaitReady(t, d.Client, ns, "unreachable")
	describes(t, ns, "within the start timeout", "unreachable").has(t,
		"no credentials within the start timeout of 25s, so the application starts without them: BROKER_UNREACHABLE: ")
	await.Until(t, "the limit of the kubelet's Events is not used up", func() error {
		list, err := d.Client.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{
			FieldSelector: "involvedObject.uid=" + string(pod.UID) + ",involvedObject.fieldPath=spec.containers{app},reason=Started",
		})
		if err == nil && len(list.Items) == 0 {
			err = errors.New("no Event says that the application was started")
		}
		return err
	})
	if s := kubetest.Status(t, pod, stack.SidecarName); s.RestartCount != 0 {
		t.Errorf("reports have restarted the sidecar: %s", kubetest.States(pod))
	}
	began, app := kubetest.Status(t, pod, stack.SidecarName).State.Running.StartedAt, kubetest.Status(t, pod, "app").State.Running.StartedAt
	t.Logf("the application started %v after the sidecar, whose start timeout is 25s", app.Sub(began.Time))
	start()

	d.STS.SetOutage(ststest.Failing)
	t.Cleanup(func() { d.STS.SetOutage(ststest.NoOutage) })
	kubetest.Create(t, d.Client, ns, paused("waiting", map[string]string{roleKey: "not-cached", startTimeoutKey: "0"}))
	describes(t, ns, "CredentialsUnavailable", "waiting").has(t, "STS_UNAVAILABLE: STS is unavailable; the broker retries by itself")
	const brokers = "-l=app.kubernetes.io/component=broker"
	describes(t, deployment.Namespace, "BrokerImpaired", brokers).has(t, "STS_UNAVAILABLE: STS fails (", "kubectl -n "+deployment.Namespace+" logs credence-broker-")
	d.STS.SetOutage(ststest.NoOutage)
	kubetest.AwaitReady(t, d.Client, ns, "waiting")
	describes(t, deployment.Namespace, "BrokerRecovered", brokers).has(t, "STS_UNAVAILABLE has ended after ")
}

// description is the output of "kubectl describe".
type description string

// describes waits until an Event of the namespace has the text, and returns what "kubectl describe" prints.
func describes(t *testing.T, namespace, text string, args ...string) description {
	t.Helper()
	await.Until(t, fmt.Sprintf("an Event in namespace %s has %q", namespace, text), func() error {
		list, err := d.Client.CoreV1().Events(namespace).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range list.Items {
			if strings.Contains(e.Reason+": "+e.Message, text) {
				return nil
			}
		}
		return fmt.Errorf("none of %d", len(list.Items))
	})
	// By default, kubectl prints no Events of several pods.
	out, err := d.Run(t.Context(), "", d.Kubectl, append([]string{"describe", "pod", "--show-events", "-n", namespace}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return description(out)
}

func (out description) has(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(string(out), text) {
			t.Errorf("kubectl describe does not print %q:\n%s", text, out)
		}
	}
}
