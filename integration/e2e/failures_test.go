//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/deployment"
)

// The tests of this file take a part of Credence away, and so run one after the other, before those that run
// side by side.

// scale sets the number of replicas of a Deployment of ours, and returns when it has them and no others.
func scale(t *testing.T, component string, replicas int32) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // it is called in cleaning up, too
	patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas)
	if _, err := d.Client.AppsV1().Deployments(deployment.Namespace).Patch(ctx, "credence-"+component, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		pods, err := d.Client.CoreV1().Pods(deployment.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
		if err != nil {
			t.Fatal(err)
		}
		good := 0
		for _, pod := range pods.Items {
			if pod.DeletionTimestamp == nil && ready(&pod) == nil {
				good++
			}
		}
		if good == int(replicas) && len(pods.Items) == good {
			return
		}
		pause(ctx, t)
	}
}

// away takes all replicas of a component away until the returned function is called, or the test ends.
func away(t *testing.T, component string) (back func()) {
	t.Helper()
	const usual = 2
	t.Cleanup(func() { scale(t, component, usual) })
	scale(t, component, 0)
	return func() { t.Helper(); scale(t, component, usual) }
}

// A broker that is away for minutes, past the time at which sidecars would have renewed their sessions, is
// noticed by no running pod; and when it is back, sessions are renewed.
//
// A sidecar that is killed meanwhile has lost its session. Its pod is not ready until the start timeout has
// passed, and never in a loop of crashes.
func TestBrokerAwayForMinutes(t *testing.T) {
	ns := namespace(t)
	const count = 3
	short := map[string]string{roleKey: bucket, durationKey: "15m"}
	for i := range count {
		create(t, ns, app("app-"+strconv.Itoa(i), short, "watch", "1h"))
	}
	killed := app("killed", map[string]string{roleKey: bucket, startTimeoutKey: "20s"})
	killed.Spec.Containers[0].Image = pauseImage
	create(t, ns, killed)
	for i := range count {
		awaitReady(t, ns, "app-"+strconv.Itoa(i))
	}
	victim := awaitReady(t, ns, "killed")

	back := away(t, "broker")
	kill(t, sidecarProcess(t, victim))
	eventually(t, "the pod whose sidecar was killed is ready again, without a broker", func(ctx context.Context) error {
		pod, err := get(ctx, ns, "killed")
		if err != nil {
			return err
		}
		s := status(t, pod, sidecarName)
		if s.State.Waiting != nil && s.State.Waiting.Reason == "CrashLoopBackOff" {
			return fatalError{errors.New("its sidecar is in CrashLoopBackOff")}
		}
		err = ready(pod)
		if err == nil && s.RestartCount != 1 {
			err = fmt.Errorf("its sidecar was restarted %d times", s.RestartCount)
		}
		return err
	})
	for i := range count {
		name := "app-" + strconv.Itoa(i)
		eventually(t, "the sidecar of "+name+" has asked for a new session in vain", func(context.Context) error {
			if said := logs(t, ns, name, sidecarName); !strings.Contains(said, "WARN") {
				return fmt.Errorf("it said:\n%s", said)
			}
			return nil
		})
	}
	waiting := startWithoutBroker(t, ns)
	before := make([]int, count)
	for i := range count {
		before[i] = keys(t, ns, "app-"+strconv.Itoa(i))
	}
	back()
	for _, name := range waiting {
		awaitEnd(t, ns, name)
	}
	for i := range count {
		name := "app-" + strconv.Itoa(i)
		eventually(t, name+" has renewed its session", func(ctx context.Context) error {
			pod, err := get(ctx, ns, name)
			if err != nil {
				return err
			}
			if s := status(t, pod, "app"); s.RestartCount != 0 {
				return fatalError{fmt.Errorf("its application has failed: %s", states(pod))}
			}
			if now := keys(t, ns, name); now <= before[i] {
				return fmt.Errorf("it has seen %d access keys", now)
			}
			return nil
		})
	}
}

// startWithoutBroker makes pods that start while no broker is there, and returns those whose application must wait
// for one: its start timeout says for how long at most.
func startWithoutBroker(t *testing.T, ns string) (waiting []string) {
	t.Helper()
	for name, timeout := range map[string]string{"for-ever": "0", "two-minutes": "2m"} {
		create(t, ns, once(app(name, map[string]string{roleKey: bucket, startTimeoutKey: timeout}, "whoami")))
		waiting = append(waiting, name)
	}
	brief := app("ten-seconds", map[string]string{roleKey: bucket, startTimeoutKey: "10s"})
	brief.Spec.Containers[0].Image = pauseImage
	create(t, ns, brief)
	awaitReady(t, ns, brief.Name)
	if said := logs(t, ns, brief.Name, sidecarName); !strings.Contains(said, "Could not get credentials") {
		t.Errorf("a sidecar without credentials said:\n%s", said)
	}
	for _, name := range waiting {
		pod, err := get(t.Context(), ns, name)
		if err != nil {
			t.Fatal(err)
		}
		if s := status(t, pod, "app"); s.State.Waiting == nil || s.RestartCount != 0 {
			t.Errorf("the application of %s did not wait for credentials: %s", name, states(pod))
		}
	}
	return waiting
}

// keys counts the access keys that awsclient's watch has seen.
func keys(t *testing.T, namespace, name string) int {
	t.Helper()
	return len(strings.Fields(logs(t, namespace, name, "app")))
}

func pause(ctx context.Context, t *testing.T) {
	t.Helper()
	if err := sleep(ctx); err != nil {
		t.Fatal(err)
	}
}
