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

	"github.com/credence-iam/credence/integration/deployment"
)

// A flood makes annotated pods at a steady pace, whatever has become of those before, as the controllers of a
// cluster do together.
type flood struct {
	made   atomic.Int64 // injected
	lost   atomic.Int64
	ending atomic.Bool  // a webhook is
	met    atomic.Int64 // were made meanwhile

	mu    sync.Mutex
	first error // of those that were lost
}

const (
	floodPace = time.Second / 50
	// floodWidth bounds how many are under way. Of more, the machine would have too little for the webhook.
	floodWidth = 100
	// floodStored is the share that is stored, one of so many. The others are dry runs, which admission does not
	// tell from these.
	floodStored = 10
)

// run makes pods until ctx ends, and returns when the last is answered.
func (f *flood) run(ctx context.Context, namespace string) {
	var underWay sync.WaitGroup
	defer underWay.Wait()
	places := make(chan struct{}, floodWidth)
	pace := time.NewTicker(floodPace)
	defer pace.Stop()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
		places <- struct{}{}
		underWay.Go(func() {
			defer func() { <-places }()
			f.make(context.WithoutCancel(ctx), namespace, n) // what has begun is answered
		})
	}
}

func (f *flood) make(ctx context.Context, namespace string, n int) {
	met := f.ending.Load()
	pod := app("flood-"+strconv.Itoa(n), annotated(), "whoami")
	pod.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "example.com/never"}} // no node is to run it
	options := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	if n%floodStored == 0 {
		options.DryRun = nil
	}
	stored, err := d.Client.CoreV1().Pods(namespace).Create(ctx, pod, options)
	if err == nil && (len(stored.Spec.InitContainers) != 1 || stored.Spec.InitContainers[0].Name != sidecarName) {
		err = fmt.Errorf("pod %s was let through with init containers %v", pod.Name, stored.Spec.InitContainers)
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
	f.made.Add(1)
	if met {
		f.met.Add(1)
	}
}

// watch keeps ending until ctx ends.
func (f *flood) watch(ctx context.Context) {
	for sleep(ctx) == nil {
		if _, ending, err := webhooks(ctx); err == nil {
			f.ending.Store(ending)
		}
	}
}

// webhooks returns the UIDs of the webhook's pods, and whether one of them is ending.
func webhooks(ctx context.Context) (uids map[types.UID]bool, ending bool, err error) {
	pods, err := d.Client.CoreV1().Pods(deployment.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=webhook"})
	if err != nil {
		return nil, false, err
	}
	uids = make(map[types.UID]bool)
	for _, pod := range pods.Items {
		uids[pod.UID] = true
		ending = ending || pod.DeletionTimestamp != nil
	}
	return uids, ending, nil
}

// No pod is lost while the webhooks are replaced and many are made: none is refused, and each has its sidecar, whether
// the ending webhook was asked, to which the API server has connections, or a new one.
func TestRolloutLosesNoAdmission(t *testing.T) {
	for name, replace := range map[string]func(context.Context) error{
		"restarted": func(ctx context.Context) error {
			_, err := d.Run(ctx, "", d.Kubectl, "rollout", "restart", "deployment/credence-webhook", "--namespace="+deployment.Namespace)
			return err
		},
		"upgraded": func(ctx context.Context) error {
			return d.Upgrade(ctx, `--set=webhook.podAnnotations.example\.com/generation=two`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ns := namespace(t)
			old, _, err := webhooks(t.Context())
			if err != nil || len(old) != 2 {
				t.Fatalf("there are %d webhooks, want 2 (%v)", len(old), err)
			}
			var f flood
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var ended sync.WaitGroup
			began := time.Now()
			ended.Go(func() { f.run(ctx, ns) })
			ended.Go(func() { f.watch(ctx) })
			eventually(t, "the API server has connections to the old webhooks", func(context.Context) error {
				if n := f.made.Load() + f.lost.Load(); n < 100 {
					return fmt.Errorf("%d pods were made", n)
				}
				return nil
			})
			before := f.made.Load()
			if err := replace(t.Context()); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the webhooks are new ones", func(ctx context.Context) error {
				now, _, err := webhooks(ctx)
				for uid := range now {
					if old[uid] {
						err = errors.New("an old one is there")
					}
				}
				return err
			})
			during := f.made.Load() - before
			stop()
			ended.Wait()
			t.Logf("%d pods were made, %.1f a second; %d while webhooks were replaced, %d while one was ending",
				f.made.Load(), float64(f.made.Load()+f.lost.Load())/time.Since(began).Seconds(), during, f.met.Load())
			if n := f.lost.Load(); n > 0 {
				t.Errorf("%d pods were lost, the first: %v", n, f.first)
			}
			// Two webhooks end, each for the 5 s in which it still accepts: some 500 pods at the full pace. On a
			// machine that makes a fifth of them, nothing is shown.
			if n := f.met.Load(); n < 100 {
				t.Errorf("%d pods were made while a webhook was ending, want at least 100: too few to meet it", n)
			}
		})
	}
}
