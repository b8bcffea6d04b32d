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

// TestBindChecksTheIdentity: of a verified token's pod, service account and namespace each must be there as the token
// names it. It is the same whether the watches bring them or the API server is read.
func TestBindChecksTheIdentity(t *testing.T) {
	for name, behind := range map[string]bool{"by the watch": false, "by live reads": true} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, w *world) {
				w.namespace("early") // something to list
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
				w.become("evicted", corev1.PodFailed)
				w.become("completed", corev1.PodSucceeded)
				w.become("running", corev1.PodRunning)
				w.become("pending", corev1.PodPending)
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
					{"one that runs", podOf("shop", "running", "u-running"), ""},
					{"one that has yet to run", podOf("shop", "pending", "u-pending"), ""},
					{"one with the name of a deleted one", podOf("shop", "again", "u-again"), ""},
					{"the deleted one", podOf("shop", "again", "u-first"), credential.ReasonPodNotFound},
					{"one of another UID", podOf("shop", "cart-1", "u-other"), credential.ReasonPodNotFound},
					{"one of another name", podOf("shop", "cart-2", "u-cart-1"), credential.ReasonPodNotFound},
					{"one of another namespace", podOf("early", "cart-1", "u-cart-1"), credential.ReasonPodNotFound},
					{"one without UID", podOf("shop", "cart-1", ""), credential.ReasonPodNotFound},
					{"an evicted one", podOf("shop", "evicted", "u-evicted"), credential.ReasonPodFinished},
					{"a completed one", podOf("shop", "completed", "u-completed"), credential.ReasonPodFinished},
					{"one without the label", podOf("shop", "bare", "u-bare"), credential.ReasonPodNotInjected},
					{"one whose label says no", podOf("shop", "opted-out", "u-opted-out"), credential.ReasonPodNotInjected},
					{"one whose service account was made again", identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-cart-1", ServiceAccount: "reborn", ServiceAccountUID: "s-8"}, credential.ReasonServiceAccountGone},
					{"one whose service account is gone", identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-cart-1", ServiceAccount: "gone", ServiceAccountUID: "s-1"}, credential.ReasonServiceAccountGone},
					{"one of a namespace that is not labelled", podOf("closed", "cart-1", "u-cart-1"), credential.ReasonNamespaceNotOpted},
					{"one of a namespace whose label is misspelt", podOf("misspelt", "cart-1", "u-cart-1"), credential.ReasonNamespaceNotOpted},
					{"one of a namespace that is not there", podOf("nowhere", "cart-1", "u-cart-1"), credential.ReasonNamespaceNotFound},
				} {
					pod, ns, err := d.Bind(t.Context(), tt.id)
					if got := credential.ReasonOf(err); got != tt.want {
						t.Errorf("%s is answered %q (%v), want %q", tt.name, got, err, tt.want)
					}
					if err != nil && (pod.UID != "" || pod.Request != nil || ns.Name != "") {
						t.Errorf("%s is refused with %+v of %+v beside it", tt.name, pod, ns)
					}
					if err == nil && (pod.Namespace != tt.id.Namespace || pod.Name != tt.id.Name || pod.UID != tt.id.UID || pod.ServiceAccount != tt.id.ServiceAccount ||
						ns.Name != tt.id.Namespace || roleOf(pod) != tt.id.Name) {
						t.Errorf("%s is bound to %+v of %+v", tt.name, pod, ns)
					}
					if known := tt.want == "" && !behind; d.Expects(tt.id) != known && tt.want != credential.ReasonNamespaceNotOpted {
						t.Errorf("the watches expect %s: %t", tt.name, !known)
					}
					time.Sleep(10 * time.Second) // for the next live reads
				}
			})
		})
	}
}

// Finished pods leave the watch, so that their sessions are not renewed and they cost no memory.
func TestFinishedPodsLeaveTheWatch(t *testing.T) {
	both(t, func(t *testing.T, w *world) {
		w.namespace("shop")
		for _, pod := range []string{"completed-before", "evicted-before", "completed", "evicted", "lives"} {
			w.pod(pod, "u-"+pod, pod)
		}
		w.become("completed-before", corev1.PodSucceeded)
		w.become("evicted-before", corev1.PodFailed)
		d := watchWorld(t, w)
		time.Sleep(time.Second)
		want := []string{"shop/completed", "shop/evicted", "shop/lives"}
		if got := slices.Sorted(slices.Values(d.Pods())); !slices.Equal(got, want) {
			t.Errorf("the watch has %q at first, want %q", got, want)
		}
		w.become("completed", corev1.PodSucceeded)
		w.become("evicted", corev1.PodFailed)
		w.become("lives", corev1.PodRunning)
		time.Sleep(time.Second)
		if got := d.Pods(); !slices.Equal(got, []string{"shop/lives"}) {
			t.Errorf("the watch has %q after two have finished", got)
		}
		if _, _, ok := d.Pod("shop/evicted"); ok {
			t.Error("an evicted pod is known as one that needs credentials")
		}
	})
}

// A namespace is labelled a moment before its first pod: the API server's word counts, not the lack of news.
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
			t.Errorf("a pod of a namespace that was labelled a moment ago is answered %v", err)
		}
	})
}

// That a namespace is not opted in is asked once in a while, not for each of its pods: the reads are there for others.
func TestNamespacesThatAreNotOptedInAreRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.streams = true
		w.namespace("shop")
		w.edit("namespaces", "/shop", func(m *metav1.PartialObjectMetadata) { delete(m.Labels, optInLabel) })
		d := watchWorld(t, w)
		time.Sleep(time.Second)
		ask := func() {
			t.Helper()
			if _, _, err := d.Bind(t.Context(), podOf("shop", "cart-1", "u-1")); credential.ReasonOf(err) != credential.ReasonNamespaceNotOpted {
				t.Errorf("answered %v", err)
			}
		}
		for range 200 {
			ask()
		}
		if n := w.reads.Load(); n != 1 {
			t.Errorf("200 calls made %d reads of the namespace", n)
		}
		time.Sleep(5 * time.Second)
		ask()
		if n := w.reads.Load(); n != 2 {
			t.Errorf("five seconds later there were %d reads", n)
		}
	})
}

// The first caller that waits for a read may leave: the others get the result.
func TestFirstToLeaveDoesNotEndTheRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.streams = true
		w.namespace("shop")
		d := watchWorld(t, w)
		time.Sleep(time.Second)
		w.behind.Store(true)
		w.pod("late", "u-1", "late")
		// The watch is waited for two seconds; the read takes 10 ms.
		first, leave := context.WithTimeout(t.Context(), 2*time.Second+5*time.Millisecond)
		defer leave()
		var all sync.WaitGroup
		all.Go(func() {
			if _, _, err := d.Bind(first, podOf("shop", "late", "u-1")); credential.ReasonOf(err) != credential.ReasonAPIServerAway {
				t.Errorf("who leaves is answered %v", err)
			}
		})
		time.Sleep(time.Millisecond)
		for range 10 {
			all.Go(func() {
				if _, _, err := d.Bind(t.Context(), podOf("shop", "late", "u-1")); err != nil {
					t.Errorf("who stays is answered %v", err)
				}
			})
		}
		all.Wait()
		if n := w.reads.Load(); n != 1 {
			t.Errorf("%d reads were made of one pod", n)
		}
	})
}
