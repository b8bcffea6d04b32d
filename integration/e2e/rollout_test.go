//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// A flood creates annotated pods at a constant rate, as all controllers of a cluster do together. It does not wait for
// earlier pods.
type flood struct {
	injected    atomic.Int64
	lost        atomic.Int64
	terminating atomic.Bool  // whether a webhook terminates
	meanwhile   atomic.Int64 // injected while a webhook terminated

	mu    sync.Mutex
	first error // of the lost pods; guarded by mu
}

const (
	floodInterval = time.Second / 50
	// floodWidth bounds the concurrent requests. More would leave too little of the machine to the webhook.
	floodWidth = 100
	// One of floodStored pods is stored. The others are dry runs, which admission treats the same.
	floodStored = 10
)

// run creates pods until ctx ends, and returns after the last response.
func (f *flood) run(ctx context.Context, namespace string) {
	var running sync.WaitGroup
	defer running.Wait()
	places := make(chan struct{}, floodWidth)
	ticker := time.NewTicker(floodInterval)
	defer ticker.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		places <- struct{}{}
		running.Go(func() {
			defer func() { <-places }()
			f.create(context.WithoutCancel(ctx), namespace, n)
		})
	}
}

func (f *flood) create(ctx context.Context, namespace string, n int) {
	terminating := f.terminating.Load()
	pod := d.App("flood-"+strconv.Itoa(n), annotated(), "whoami")
	pod.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "example.com/never"}} // no node runs it
	options := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	if n%floodStored == 0 {
		options.DryRun = nil
	}
	stored, err := d.Client.CoreV1().Pods(namespace).Create(ctx, pod, options)
	if err == nil && (len(stored.Spec.InitContainers) != 1 || stored.Spec.InitContainers[0].Name != stack.SidecarName) {
		err = fmt.Errorf("pod %s was admitted with init containers %v", pod.Name, stored.Spec.InitContainers)
	}
	if err != nil {
		f.lost.Add(1)
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.first == nil {
			f.first = err
		}
		return
	}
	f.injected.Add(1)
	if terminating {
		f.meanwhile.Add(1)
	}
}

// watch updates terminating until ctx ends.
func (f *flood) watch(ctx context.Context) {
	for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		if _, terminating, err := webhooks(ctx); err == nil {
			f.terminating.Store(terminating)
		}
	}
}

// webhooks returns the UIDs of the webhook's pods, and whether one of them terminates.
func webhooks(ctx context.Context) (uids map[types.UID]bool, terminating bool, err error) {
	pods, err := d.Pods(ctx, "webhook")
	if err != nil {
		return nil, false, err
	}
	uids = make(map[types.UID]bool)
	for _, pod := range pods {
		uids[pod.UID] = true
		terminating = terminating || pod.DeletionTimestamp != nil
	}
	return uids, terminating, nil
}

// TestRolloutHasNoEffectOnPods replaces the webhooks, or the webhooks and the brokers, while many pods are created. No pod
// is refused or admitted without its sidecar, whether the API server calls the terminating webhook, to which it has
// connections, or a new one. A running pod gets its credentials all the time.
func TestRolloutHasNoEffectOnPods(t *testing.T) {
	for name, replace := range map[string]func(context.Context) error{
		"restarted": func(ctx context.Context) error {
			_, err := d.Run(ctx, "", d.Kubectl, "rollout", "restart", "deployment/credence-webhook", "--namespace="+deployment.Namespace)
			return err
		},
		"upgraded": func(ctx context.Context) error {
			return d.Upgrade(ctx, "--set=logLevel=debug")
		},
	} {
		t.Run(name, func(t *testing.T) {
			ns := d.Namespace(t)
			kubetest.Create(t, d.Client, ns, caller(t, d.App("app", annotated(), "watch", "1h")))
			kubetest.AwaitReady(t, d.Client, ns, "app")
			old, _, err := webhooks(t.Context())
			if err != nil || len(old) != 2 {
				t.Fatalf("there are %d webhooks, want 2 (%v)", len(old), err)
			}
			var f flood
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var ended sync.WaitGroup
			ended.Go(func() { f.run(ctx, ns) })
			ended.Go(func() { f.watch(ctx) })
			await.Until(t, "the API server has connections to the old webhooks", func() error {
				if n := f.injected.Load() + f.lost.Load(); n < 100 {
					return fmt.Errorf("%d pods were created", n)
				}
				return nil
			})
			if err := replace(t.Context()); err != nil {
				t.Fatal(err)
			}
			await.Until(t, "the webhooks are replaced", func() error {
				now, _, err := webhooks(t.Context())
				for uid := range now {
					if old[uid] {
						err = errors.New("an old one exists")
					}
				}
				return err
			})
			stop()
			ended.Wait()
			calm(t, ns, "app")
			if n := f.lost.Load(); n > 0 {
				t.Errorf("%d pods were lost, the first: %v", n, f.first)
			}
			// Two webhooks terminate and accept calls for 5 s each, which is about 500 pods at the full rate. Less than a
			// fifth of them shows nothing.
			if n := f.meanwhile.Load(); n < 100 {
				t.Errorf("%d pods were created while a webhook terminated, want at least 100", n)
			}
		})
	}
}
