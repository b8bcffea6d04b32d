// Package kube is what the broker and the webhook know of the cluster: which pods are injected,
// what their namespaces permit, and whether a service-account token is genuine.
//
// It watches metadata only, keeps of each object no more than a decision needs, and goes on
// answering from what it has while the API server is away. It decides nothing: package policy does.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// broadcast wakes everybody who waits for the watched state to change.
type broadcast struct {
	mu      sync.Mutex
	waiters int           // guarded by mu
	next    chan struct{} // closed at the next change; guarded by mu
}

func newBroadcast() *broadcast { return &broadcast{next: make(chan struct{})} }

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiters > 0 {
		close(b.next)
		b.next = make(chan struct{})
	}
}

// until waits for condition to hold, at most for patience and no longer than ctx.
func (b *broadcast) until(ctx context.Context, patience time.Duration, condition func() bool) {
	if condition() {
		return
	}
	b.mu.Lock()
	b.waiters++
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.waiters--
		b.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		b.mu.Lock()
		next := b.next
		b.mu.Unlock()
		if condition() {
			return
		}
		select {
		case <-next:
		case <-ctx.Done():
			return
		}
	}
}

// Reads that go past the watches to the API server, for what they do not know yet. They are rare, and a flood
// of callers with tokens of dead pods must not become a flood on the API server, nor one namespace's flood
// leave nothing for all others.
const (
	liveReadsPerSecond  = 20
	liveReadBurst       = 100
	shareReadsPerSecond = 5
	shareReadBurst      = 25
	// maxShares bounds how many namespaces' shares are remembered. Should it be reached, those that have not
	// been touched lately are forgotten: theirs is whole again anyway.
	maxShares = 1000
	// liveReadTimeout bounds a read. An API server that answers takes milliseconds.
	liveReadTimeout = 5 * time.Second
)

// liveReads bounds them.
type liveReads struct {
	all     *rate.Limiter
	flights singleflight.Group // so that all who wait for the same thing cost one read

	made, refused atomic.Uint64

	mu     sync.Mutex
	shares map[string]*rate.Limiter // :: namespace → its share; guarded by mu
}

func newLiveReads() *liveReads {
	return &liveReads{all: rate.NewLimiter(liveReadsPerSecond, liveReadBurst), shares: make(map[string]*rate.Limiter)}
}

// allow takes one read from the namespace's share, and from what there is for all.
func (l *liveReads) allow(namespace string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	share := l.shares[namespace]
	if share == nil {
		if len(l.shares) >= maxShares {
			maps.DeleteFunc(l.shares, func(_ string, s *rate.Limiter) bool { return s.Tokens() >= shareReadBurst })
		}
		if len(l.shares) >= maxShares {
			return false // A thousand namespaces ask for what there is not: that is a flood of its own.
		}
		share = rate.NewLimiter(shareReadsPerSecond, shareReadBurst)
		l.shares[namespace] = share
	}
	return share.Allow() && l.all.Allow()
}

// readLive reads one object of a namespace, once for all who ask at that time. found is false when it does not
// exist; any other failure is credential.ErrUnavailable.
func readLive[T any](ctx context.Context, l *liveReads, namespace, what string, read func(context.Context) (T, error)) (value T, found bool, err error) {
	answer := l.flights.DoChan(what, func() (any, error) {
		if !l.allow(namespace) {
			l.refused.Add(1)
			return nil, errTooManyReads
		}
		l.made.Add(1)
		// Not on a caller's context: one who leaves must not make it fail for the others.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), liveReadTimeout)
		defer cancel()
		return read(ctx)
	})
	select {
	case r := <-answer:
		switch {
		case r.Err == nil:
			return r.Val.(T), true, nil
		case apierrors.IsNotFound(r.Err):
			return value, false, nil
		}
		err = r.Err
	case <-ctx.Done():
		err = ctx.Err()
	}
	message := "the Kubernetes API server cannot be asked; ask again"
	if errors.Is(err, errTooManyReads) {
		message = "too many pods are unknown at once; ask again"
	}
	return value, false, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerAway, RetryAfter: time.Second,
		Message: message, Cause: fmt.Errorf("reading %s: %w", what, err),
	}
}

var errTooManyReads = errors.New("the bound of reads past the watches is reached")

// run runs watches until ctx ends.
func run(ctx context.Context, all ...*watched) {
	var running sync.WaitGroup
	for _, w := range all {
		running.Go(func() { w.run(ctx) })
	}
	running.Wait()
}

// clients checks what both kinds of watch need, and makes the clients they use.
func clients(config *rest.Config, keys policy.Keys, log *slog.Logger) (metadata.Interface, corev1client.CoreV1Interface, error) {
	if config == nil || keys.Prefix() == "" || log == nil {
		return nil, nil, errors.New("a REST configuration, annotation keys and a Logger are required")
	}
	config = rest.CopyConfig(config)
	config.QPS = -1 // liveReads bounds the reads; client-go's own limit of 5 a second would queue them.
	watch, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("making a metadata client: %w", err)
	}
	read, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("making a core client: %w", err)
	}
	return watch, read, nil
}

// bears returns a filter for the names of labels and annotations that bear our prefix.
func bears(keys policy.Keys) func(name string) bool {
	return func(name string) bool { return strings.HasPrefix(name, keys.Prefix()+"/") }
}
