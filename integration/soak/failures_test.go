//go:build linux

package soak

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
)

// A failure is one section of docs/reliability.md.
type failure struct {
	name  string // of the test and in make soak FAILURE=NAME
	title string // what fails
	does  string // what the test does
	means string // why pods notice what they notice, and what to do
	// allowed is the application that may have errors, and why says why. Empty: none may.
	allowed, why string
	// do makes the failure happen, and returns when all is repaired.
	do func(*testing.T)
}

// forbidden returns the errors of applications that are not allowed.
func (f failure) forbidden(r result) []string {
	return slices.DeleteFunc(slices.Collect(maps.Keys(r.Errors)), func(text string) bool {
		return f.allowed != "" && strings.HasPrefix(text, f.allowed+": ")
	})
}

// TestFailures makes each failure happen, and records the result.
func TestFailures(t *testing.T) {
	if !enabled() {
		t.Skip("it takes more than an hour and needs root; make soak runs it")
	}
	version, err := d.Client.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range failures {
		t.Run(f.name, func(t *testing.T) {
			healthy(t)
			alerts, err := startPrometheus(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer alerts.Stop(0)
			before := calls()
			from := time.Now()
			f.do(t)
			settle(t)
			to := time.Now()
			r, unreachable := seen.result(from, to)
			r.Date, r.Commit, r.Kubernetes, r.Session = from.UTC().Format(time.DateOnly), product, version.GitVersion, session.String()
			r.Seconds, r.Calls = int(to.Sub(from).Seconds()), calls()-before
			if r.Firing, err = alertsIn(t.Context(), alerts, "firing", 0, from, to); err != nil {
				t.Fatal(err)
			}
			// While a session is fetched, an alert can be pending for a moment.
			if r.Pending, err = alertsIn(t.Context(), alerts, "pending", 30*time.Second, from, to); err != nil {
				t.Fatal(err)
			}
			t.Logf("%s\nunreachable: %v\nwaits: %.1f and %.1f", section(f, r), unreachable, r.Known, r.New)
			if forbidden := f.forbidden(r); len(forbidden) > 0 {
				t.Errorf("running pods had errors: %q", forbidden)
			}
			// A new pod waits, and then has credentials.
			if slices.ContainsFunc(r.Problems, func(text string) bool { return strings.Contains(text, "credentials") }) {
				t.Errorf("new pods had no credentials: %q", r.Problems)
			}
			for _, w := range [][]float64{r.Known, r.New} {
				if len(w) == 0 {
					t.Error("no new pod of one kind succeeded")
				}
			}
			if t.Failed() {
				return
			}
			if err := store(f.name, r); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// calls returns the number of calls of all applications.
func calls() (n int) {
	for _, c := range clients {
		n += seen.callsOf(c.name)
	}
	return n
}

// settle waits until a new pod of each kind has succeeded and each application has called again, and checks that no
// application was restarted.
func settle(t *testing.T) {
	t.Helper()
	repaired := time.Now()
	before := map[string]int{}
	for _, c := range clients {
		before[c.name] = seen.callsOf(c.name)
	}
	await.Until(t, "new pods succeed after the failure", func() error { return seen.newPods(repaired) })
	for _, c := range clients {
		await.Until(t, "application "+c.name+" calls", func() error {
			if seen.callsOf(c.name) <= before[c.name] {
				return errors.New("no call since the failure")
			}
			return nil
		})
		pod, err := d.Client.CoreV1().Pods(loadNamespace).Get(t.Context(), c.name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range pod.Status.ContainerStatuses {
			if s.RestartCount > 0 {
				t.Errorf("application %s was restarted", c.name)
			}
		}
	}
}

// healthy waits until the nodes are ready and all Deployments have their replicas.
func healthy(t *testing.T) {
	t.Helper()
	await.Until(t, "the cluster is healthy", func() error {
		nodes, err := d.Client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, n := range nodes.Items {
			for _, c := range n.Status.Conditions {
				if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
					return fmt.Errorf("node %s: %s", n.Name, c.Message)
				}
			}
		}
		all, err := d.Client.AppsV1().Deployments("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, x := range all.Items {
			if x.Status.AvailableReplicas != *x.Spec.Replicas || x.Status.Replicas != *x.Spec.Replicas || x.Status.ObservedGeneration < x.Generation {
				return fmt.Errorf("deployment %s has %d of %d replicas", x.Name, x.Status.AvailableReplicas, *x.Spec.Replicas)
			}
		}
		return nil
	})
}
