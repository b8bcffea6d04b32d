//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// TestBrokerUnavailableForMinutes stops all brokers until after the time at which sidecars renew their sessions. No running
// pod fails, and the sidecars renew when the brokers are back.
//
// A sidecar that is killed meanwhile loses its session. Its pod becomes ready after the start timeout, without crash
// loops. Like all tests that stop or replace a part of Credence, it does not run in parallel.
func TestBrokerUnavailableForMinutes(t *testing.T) {
	ns := d.Namespace(t)
	const count = 3
	short := map[string]string{roleKey: bucket, durationKey: "15m"}
	for i := range count {
		kubetest.Create(t, d.Client, ns, d.App("app-"+strconv.Itoa(i), short, "watch", "1h"))
	}
	kubetest.Create(t, d.Client, ns, paused("killed", map[string]string{roleKey: bucket, startTimeoutKey: "20s"}))
	for i := range count {
		kubetest.AwaitReady(t, d.Client, ns, "app-"+strconv.Itoa(i))
	}
	victim := kubetest.AwaitReady(t, d.Client, ns, "killed")

	start := stop(t, "broker")
	kill(t, sidecarProcess(t, victim))
	waiting := startWithoutBroker(t, ns)
	await.Until(t, "the pod whose sidecar was killed is ready again, without a broker", func() error {
		pod, err := get(t.Context(), ns, "killed")
		if err != nil {
			return err
		}
		s := kubetest.Status(t, pod, stack.SidecarName)
		if s.State.Waiting != nil && s.State.Waiting.Reason == "CrashLoopBackOff" {
			return await.Never{Err: errors.New("its sidecar is in CrashLoopBackOff")}
		}
		err = kubetest.Ready(pod)
		if err == nil && s.RestartCount != 1 {
			err = fmt.Errorf("its sidecar was restarted %d times", s.RestartCount)
		}
		return err
	})
	for i := range count {
		name := "app-" + strconv.Itoa(i)
		await.Until(t, "the sidecar of "+name+" could not renew its session", func() error {
			if output := kubetest.Logs(t, d.Client, ns, name, stack.SidecarName); !strings.Contains(output, "WARN") {
				return fmt.Errorf("it logged:\n%s", output)
			}
			return nil
		})
	}
	before := make([]int, count)
	for i := range count {
		before[i] = keys(t, ns, "app-"+strconv.Itoa(i))
	}
	start()
	for _, name := range waiting {
		kubetest.AwaitEnd(t, d.Client, ns, name)
	}
	for i := range count {
		name := "app-" + strconv.Itoa(i)
		await.Until(t, name+" has renewed its session", func() error {
			pod, err := get(t.Context(), ns, name)
			if err != nil {
				return err
			}
			if s := kubetest.Status(t, pod, "app"); s.RestartCount != 0 {
				return await.Never{Err: fmt.Errorf("its application has failed: %s", kubetest.States(pod))}
			}
			if now := keys(t, ns, name); now <= before[i] {
				return fmt.Errorf("it has seen %d access keys", now)
			}
			return nil
		})
	}
}

// startWithoutBroker creates pods while no broker runs. It returns those whose application waits for a broker because of
// their start timeout.
func startWithoutBroker(t *testing.T, ns string) (waiting []string) {
	t.Helper()
	for name, timeout := range map[string]string{"for-ever": "0", "five-minutes": "5m"} {
		kubetest.Create(t, d.Client, ns, deployment.Once(d.App(name, map[string]string{roleKey: bucket, startTimeoutKey: timeout}, "whoami")))
		waiting = append(waiting, name)
	}
	brief := paused("ten-seconds", map[string]string{roleKey: bucket, startTimeoutKey: "10s"})
	kubetest.Create(t, d.Client, ns, brief)
	kubetest.AwaitReady(t, d.Client, ns, brief.Name)
	if output := kubetest.Logs(t, d.Client, ns, brief.Name, stack.SidecarName); !strings.Contains(output, messageUnavailable) {
		t.Errorf("a sidecar without credentials logged:\n%s", output)
	}
	for _, name := range waiting {
		pod, err := get(t.Context(), ns, name)
		if err != nil {
			t.Fatal(err)
		}
		if s := kubetest.Status(t, pod, "app"); s.State.Waiting == nil || s.RestartCount != 0 {
			t.Errorf("the application of %s did not wait for credentials: %s", name, kubetest.States(pod))
		}
	}
	return waiting
}
