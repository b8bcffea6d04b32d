package trust

import (
	"context"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// Times of the election, which are Kubernetes' own. A leader that dies is followed by another within
// leaseTime and a retry, and a pod whose namespace is labelled meanwhile waits that long: kubelets try to
// mount a missing ConfigMap again and again.
const (
	leaseTime     = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
)

// campaign leads whenever this replica is elected, until ctx ends.
func (t *Trust) campaign(ctx context.Context) {
	for ctx.Err() == nil {
		t.runForLeader(ctx)
	}
}

// runForLeader waits to be elected, leads, and returns when the lead is lost or ctx ends. Then publishing ends
// first and the Lease is given up second, so that no two replicas publish.
func (t *Trust) runForLeader(ctx context.Context) {
	election, resign := context.WithCancel(context.WithoutCancel(ctx))
	defer resign()
	publishing := make(chan struct{}, 1) // full while this replica publishes, and while it must not begin to
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
		t.cfg.Logger.ErrorContext(ctx, "Electing a leader is impossible", "error", err) // The times above are wrong.
		<-ctx.Done()
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		elector.Run(election)
	}()
	select {
	case <-ended: // the lead was lost
	case <-ctx.Done():
	}
	publishing <- struct{}{}
	resign()
	<-ended
	<-publishing // for a callback that comes late, and finds that it is over
}
