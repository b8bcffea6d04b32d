// Package kube reports to the broker and the webhook which pods are injected, what their namespaces permit, and whether a token
// is genuine. It watches metadata only, stores only what a decision needs, and keeps serving from its cache while the API server
// is unavailable. It decides nothing; package policy does.
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

// broadcast wakes all callers that wait for a change of the watched state.
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

// until waits until condition returns true, for maxWait at most and until ctx ends.
func (b *broadcast) until(ctx context.Context, maxWait time.Duration, condition func() bool) {
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
	ctx, cancel := context.WithTimeout(ctx, maxWait)
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

// Limits of live reads, which read an object from the API server that the watches do not have yet. They are rare. Many callers
// with tokens of dead pods must not overload the API server, and one namespace must not use up the reads of all others.
const (
	liveReadsPerSecond      = 20
	liveReadBurst           = 100
	namespaceReadsPerSecond = 5
	namespaceReadBurst      = 25
	// maxLimiters bounds how many namespaces have a limiter. If it is reached, liveReads drops the limiters that were not used
	// recently, which are full again anyway.
	maxLimiters = 1000
	// liveReadTimeout bounds a read. A healthy API server responds within milliseconds.
	liveReadTimeout = 5 * time.Second
)

// liveReads makes live reads within their limits.
type liveReads struct {
	all    *rate.Limiter
	shared singleflight.Group // one read for all callers that wait for the same object

	made, refused atomic.Uint64

	mu       sync.Mutex
	limiters map[string]*rate.Limiter // :: namespace → its limiter; guarded by mu
}

func newLiveReads() *liveReads {
	return &liveReads{all: rate.NewLimiter(liveReadsPerSecond, liveReadBurst), limiters: make(map[string]*rate.Limiter)}
}

// allow takes one read from the limiter of the namespace and from that of all. It reports whether both had one.
func (l *liveReads) allow(namespace string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	limiter := l.limiters[namespace]
	if limiter == nil {
		if len(l.limiters) >= maxLimiters {
			maps.DeleteFunc(l.limiters, func(_ string, other *rate.Limiter) bool { return other.Tokens() >= namespaceReadBurst })
		}
		if len(l.limiters) >= maxLimiters {
			return false // A thousand namespaces need live reads at once, which is an overload of its own.
		}
		limiter = rate.NewLimiter(namespaceReadsPerSecond, namespaceReadBurst)
		l.limiters[namespace] = limiter
	}
	return limiter.Allow() && l.all.Allow()
}

// readLive reads one object of a namespace, once for all concurrent callers. found is false if it does not exist. Any other
// failure is credential.ErrUnavailable.
func readLive[T any](ctx context.Context, l *liveReads, namespace, what string, read func(context.Context) (T, error)) (value T, found bool, err error) {
	answer := l.shared.DoChan(what, func() (any, error) {
		if !l.allow(namespace) {
			l.refused.Add(1)
			return nil, errTooManyReads
		}
		l.made.Add(1)
		// Not on a caller's context: a caller that gives up must not make the read fail for the others.
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
	message := "cannot read from the Kubernetes API server; try again"
	if errors.Is(err, errTooManyReads) {
		message = "too many pods are unknown at once; try again"
	}
	return value, false, &credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonAPIServerUnavailable, RetryAfter: time.Second,
		Message: message, Cause: fmt.Errorf("reading %s: %w", what, err),
	}
}

var errTooManyReads = errors.New("the limit of live reads is reached")

// run runs the watches until ctx ends.
func run(ctx context.Context, all ...*watched) {
	var running sync.WaitGroup
	for _, w := range all {
		running.Go(func() { w.run(ctx) })
	}
	running.Wait()
}

// clients checks the configuration of a directory or of namespaces, and makes their clients.
func clients(config *rest.Config, keys policy.Keys, log *slog.Logger) (metadata.Interface, corev1client.CoreV1Interface, error) {
	if config == nil || keys.Prefix() == "" || log == nil {
		return nil, nil, errors.New("a REST configuration, annotation keys and a Logger are required")
	}
	config = rest.CopyConfig(config)
	config.QPS = -1 // liveReads limits the reads. client-go's own limit of 5 a second would queue them.
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

// hasPrefix returns a filter for the names of labels and annotations with our prefix.
func hasPrefix(keys policy.Keys) func(name string) bool {
	return func(name string) bool { return strings.HasPrefix(name, keys.Prefix()+"/") }
}
