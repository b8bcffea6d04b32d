package trust

import (
	"context"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// Times of the election, the same as Kubernetes' own. If a leader crashes, another replica leads within leaseTime and a retry.
// Pods of a namespace that is labeled meanwhile wait that long, because kubelets retry to mount a missing ConfigMap.
const (
	leaseTime     = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
)

// campaign takes part in elections until ctx ends.
func (t *Trust) campaign(ctx context.Context) {
	for ctx.Err() == nil {
		t.runForLeader(ctx)
	}
}

// runForLeader waits until this replica is elected, publishes, and returns when the Lease is lost or ctx ends. It stops
// publishing before it releases the Lease, so that two replicas never publish at once.
func (t *Trust) runForLeader(ctx context.Context) {
	election, resign := context.WithCancel(context.WithoutCancel(ctx))
	defer resign()
	publishing := make(chan struct{}, 1) // full while this replica publishes, or must not start to
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name: Lease,
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: t.cfg.Namespace, Name: Lease},
			Client:     t.leases,
			LockConfig: resourcelock.ResourceLockConfig{Identity: t.cfg.Identity},
		},
		LeaseDuration: leaseTime, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(leading context.Context) {
				publishing <- struct{}{}
				defer func() { <-publishing }()
				leading, stop := context.WithCancel(leading)
				defer stop()
				defer context.AfterFunc(ctx, stop)()
				if ctx.Err() == nil && leading.Err() == nil {
					t.lead(leading)
				}
			},
			OnStoppedLeading: func() {},
		},
	})
	if err != nil {
		t.cfg.Logger.ErrorContext(ctx, "Could not take part in the election of a leader", "error", err) // only if the times above are invalid
		<-ctx.Done()
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		elector.Run(election)
	}()
	select {
	case <-ended: // The Lease was lost.
	case <-ctx.Done():
	}
	publishing <- struct{}{}
	resign()
	<-ended
	<-publishing // lets a late callback run, which finds that ctx has ended
}
