package kube_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

const injectedLabel, optInLabel = policy.DefaultPrefix + "/injected", policy.DefaultPrefix + "/inject"

// roleOf returns the role that the pod requests; empty if its annotations are refused.
func roleOf(pod policy.Pod) string {
	settings, err := pod.Request.Settings()
	if err != nil {
		return ""
	}
	return settings.Role
}

// Bind returns a pod only if the pod, the service account and the namespace of the verified token exist as the token names
// them. The result is the same with watches and with live reads.
func TestBindChecksTheIdentity(t *testing.T) {
	for name, behind := range map[string]bool{"by the watch": false, "by live reads": true} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, w *world) {
				w.namespace("early") // so that the list is not empty
				d := watchWorld(t, w)
				time.Sleep(time.Second)
				w.behind.Store(behind)
				w.namespace("shop")
				w.namespace("closed")
				w.edit("namespaces", "/closed", func(m *metav1.PartialObjectMetadata) { delete(m.Labels, optInLabel) })
				w.namespace("misspelt")
				w.edit("namespaces", "/misspelt", func(m *metav1.PartialObjectMetadata) { m.Labels[optInLabel] = "enable" })
				w.put("ADDED", "serviceaccounts", "shop", "reborn", "s-9", nil)
				for _, pod := range []string{"cart-1", "evicted", "completed", "running", "pending", "bare", "opted-out"} {
					w.pod(pod, "u-"+pod, pod)
				}
				w.setPhase("evicted", corev1.PodFailed)
				w.setPhase("completed", corev1.PodSucceeded)
				w.setPhase("running", corev1.PodRunning)
				w.setPhase("pending", corev1.PodPending)
				w.edit("pods", "shop/bare", func(m *metav1.PartialObjectMetadata) { delete(m.Labels, injectedLabel) })
				w.edit("pods", "shop/opted-out", func(m *metav1.PartialObjectMetadata) { m.Labels[injectedLabel] = "false" })
				w.put("ADDED", "pods", "closed", "cart-1", "u-cart-1", nil)
				w.put("ADDED", "pods", "misspelt", "cart-1", "u-cart-1", nil)
				w.pod("again", "u-first", "again")
				w.put("DELETED", "pods", "shop", "again", "u-first", nil)
				w.pod("again", "u-again", "again")
				for _, tt := range []struct {
					name string
					id   identity.Pod
					want credential.Reason
				}{
					{"a live pod", podOf("shop", "cart-1", "u-cart-1"), ""},
					{"a running pod", podOf("shop", "running", "u-running"), ""},
					{"a pending pod", podOf("shop", "pending", "u-pending"), ""},
					{"a pod with the name of a deleted one", podOf("shop", "again", "u-again"), ""},
					{"the deleted pod", podOf("shop", "again", "u-first"), credential.ReasonPodNotFound},
					{"another UID", podOf("shop", "cart-1", "u-other"), credential.ReasonPodNotFound},
					{"another name", podOf("shop", "cart-2", "u-cart-1"), credential.ReasonPodNotFound},
					{"another namespace", podOf("early", "cart-1", "u-cart-1"), credential.ReasonPodNotFound},
					{"no UID", podOf("shop", "cart-1", ""), credential.ReasonPodNotFound},
					{"an evicted pod", podOf("shop", "evicted", "u-evicted"), credential.ReasonPodFinished},
					{"a completed pod", podOf("shop", "completed", "u-completed"), credential.ReasonPodFinished},
					{"a pod without the label", podOf("shop", "bare", "u-bare"), credential.ReasonPodNotInjected},
					{"a pod with another value of the label", podOf("shop", "opted-out", "u-opted-out"), credential.ReasonPodNotInjected},
					{"a recreated service account", identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-cart-1", ServiceAccount: "reborn", ServiceAccountUID: "s-8"}, credential.ReasonServiceAccountGone},
					{"a deleted service account", identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-cart-1", ServiceAccount: "gone", ServiceAccountUID: "s-1"}, credential.ReasonServiceAccountGone},
					{"a namespace without the label", podOf("closed", "cart-1", "u-cart-1"), credential.ReasonNamespaceNotOpted},
					{"a namespace with a misspelt label", podOf("misspelt", "cart-1", "u-cart-1"), credential.ReasonNamespaceNotOpted},
					{"a namespace that does not exist", podOf("nowhere", "cart-1", "u-cart-1"), credential.ReasonNamespaceNotFound},
				} {
					pod, ns, err := d.Bind(t.Context(), tt.id)
					if got := credential.ReasonOf(err); got != tt.want {
						t.Errorf("%s: %q (%v), want %q", tt.name, got, err, tt.want)
					}
					if err != nil && (pod.UID != "" || pod.Request != nil || ns.Name != "") {
						t.Errorf("%s: the refusal comes with %+v of %+v", tt.name, pod, ns)
					}
					if err == nil && (pod.Namespace != tt.id.Namespace || pod.Name != tt.id.Name || pod.UID != tt.id.UID || pod.ServiceAccount != tt.id.ServiceAccount ||
						ns.Name != tt.id.Namespace || roleOf(pod) != tt.id.Name) {
						t.Errorf("%s: Bind returned %+v of %+v", tt.name, pod, ns)
					}
					if known := tt.want == "" && !behind; d.Expects(tt.id) != known && tt.want != credential.ReasonNamespaceNotOpted {
						t.Errorf("%s: Expects returned %t", tt.name, !known)
					}
					time.Sleep(10 * time.Second) // for the next live reads
				}
			})
		})
	}
}

// Finished pods leave the watch: their sessions are not renewed, and they use no memory.
func TestFinishedPodsLeaveTheWatch(t *testing.T) {
	both(t, func(t *testing.T, w *world) {
		w.namespace("shop")
		for _, pod := range []string{"completed-before", "evicted-before", "completed", "evicted", "lives"} {
			w.pod(pod, "u-"+pod, pod)
		}
		w.setPhase("completed-before", corev1.PodSucceeded)
		w.setPhase("evicted-before", corev1.PodFailed)
		d := watchWorld(t, w)
		time.Sleep(time.Second)
		want := []string{"shop/completed", "shop/evicted", "shop/lives"}
		if got := slices.Sorted(slices.Values(d.Pods())); !slices.Equal(got, want) {
			t.Errorf("at first the watch has %q, want %q", got, want)
		}
		w.setPhase("completed", corev1.PodSucceeded)
		w.setPhase("evicted", corev1.PodFailed)
		w.setPhase("lives", corev1.PodRunning)
		time.Sleep(time.Second)
		if got := d.Pods(); !slices.Equal(got, []string{"shop/lives"}) {
			t.Errorf("after two pods have finished, the watch has %q", got)
		}
		if _, _, ok := d.Pod("shop/evicted"); ok {
			t.Error("the watch has an evicted pod")
		}
	})
}

// Users label a namespace a moment before they create its first pod. Bind reads the namespace if the watch does not have that yet.
func TestNamespaceThatWasLabelledAMomentAgo(t *testing.T) {
	both(t, func(t *testing.T, w *world) {
		w.namespace("shop")
		w.edit("namespaces", "/shop", func(m *metav1.PartialObjectMetadata) { delete(m.Labels, optInLabel) })
		w.pod("cart-1", "u-1", "cart")
		d := watchWorld(t, w)
		time.Sleep(time.Second)
		w.behind.Store(true)
		w.edit("namespaces", "/shop", func(m *metav1.PartialObjectMetadata) { m.Labels[optInLabel] = "enabled" })
		if _, _, err := d.Bind(t.Context(), podOf("shop", "cart-1", "u-1")); err != nil {
			t.Errorf("Bind of a pod of a namespace that was labelled a moment ago returned %v", err)
		}
	})
}

// A namespace that is not opted in is read once in 5 s, not for each of its pods, so that the reads are left for others.
func TestNamespacesThatAreNotOptedInAreRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.streams = true
		w.namespace("shop")
		w.edit("namespaces", "/shop", func(m *metav1.PartialObjectMetadata) { delete(m.Labels, optInLabel) })
		d := watchWorld(t, w)
		time.Sleep(time.Second)
		bind := func() {
			t.Helper()
			if _, _, err := d.Bind(t.Context(), podOf("shop", "cart-1", "u-1")); credential.ReasonOf(err) != credential.ReasonNamespaceNotOpted {
				t.Errorf("Bind returned %v", err)
			}
		}
		for range 200 {
			bind()
		}
		if n := w.reads.Load(); n != 1 {
			t.Errorf("200 calls made %d reads of the namespace", n)
		}
		time.Sleep(5 * time.Second)
		bind()
		if n := w.reads.Load(); n != 2 {
			t.Errorf("five seconds later there were %d reads", n)
		}
	})
}

// If the first caller of a shared read gives up, the others still get its result.
func TestSharedReadOutlivesItsFirstCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.streams = true
		w.namespace("shop")
		d := watchWorld(t, w)
		time.Sleep(time.Second)
		w.behind.Store(true)
		w.pod("late", "u-1", "late")
		// Bind waits for the watch for two seconds. The read takes 10 ms.
		first, leave := context.WithTimeout(t.Context(), 2*time.Second+5*time.Millisecond)
		defer leave()
		var all sync.WaitGroup
		all.Go(func() {
			if _, _, err := d.Bind(first, podOf("shop", "late", "u-1")); credential.ReasonOf(err) != credential.ReasonAPIServerUnavailable {
				t.Errorf("the caller that gives up got %v", err)
			}
		})
		time.Sleep(time.Millisecond)
		for range 10 {
			all.Go(func() {
				if _, _, err := d.Bind(t.Context(), podOf("shop", "late", "u-1")); err != nil {
					t.Errorf("another caller got %v", err)
				}
			})
		}
		all.Wait()
		if n := w.reads.Load(); n != 1 {
			t.Errorf("%d reads of one pod, want 1", n)
		}
	})
}
