package kube

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
)

const (
	// minPause and maxPause bound the pause between two attempts to watch. client-go's own pause grows to a minute. That is
	// long to miss changes after the API server has recovered, and brokers are few, so they may try more often.
	minPause = 500 * time.Millisecond
	maxPause = 5 * time.Second
	// maxSilence is how long a healthy watch may bring nothing: API servers send a bookmark about once a minute.
	maxSilence = 3 * time.Minute
)

// watched is one metadata-only watch of a resource, with a store of the part of its objects that decisions need.
//
// It is a reflector of client-go that writes to our store. A shared informer keeps the type that it receives, and puts
// every list into queues. With 100,000 pods informers took the broker to 1.1 GB and more at the peak of lists in one piece,
// and to 0.53 GB of streamed lists. This takes it to between 0.18 and 0.23 GB with either (broker_rss_100k_pods_bytes of
// the benchmark).
type watched struct {
	resource string
	client   metadata.Getter
	tweak    func(*metav1.ListOptions) // may be nil

	store
	interning
	freshness
}

func newWatched(client metadata.Interface, resource string, changed *broadcast) *watched {
	return &watched{resource: resource, client: client.Resource(corev1.SchemeGroupVersion.WithResource(resource)), store: newStore(changed)}
}

// run watches until ctx ends.
func (w *watched) run(ctx context.Context) {
	w.record(nil)
	cache.NewReflectorWithOptions(source{w}, &metav1.PartialObjectMetadata{}, sink{w}, cache.ReflectorOptions{
		Name:    "credence/" + w.resource,
		Backoff: &wait.Backoff{Duration: minPause, Cap: maxPause, Steps: 16, Factor: 2, Jitter: 0.5},
	}).RunWithContext(ctx)
}

// reduced returns the part of m to store: the stored object if nothing has changed.
func (w *watched) reduced(m *metav1.PartialObjectMetadata) *object {
	return w.reduce(m, w.get(m.Namespace, m.Name))
}

// freshness tracks when a watch last received something from the API server.
type freshness struct {
	mu          sync.Mutex
	last        time.Time // when the API server last sent something; zero before the first request; guarded by mu
	unavailable bool      // the last request failed; guarded by mu
}

// age returns the time since the API server last sent something; 0 while the watch is healthy.
func (f *freshness) age() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last.IsZero() {
		return 0
	}
	if age := time.Since(f.last); f.unavailable || age > maxSilence {
		return age
	}
	return 0
}

// record records the outcome of a request or an event. A refusal, for example for lack of rights, also stops the watch from
// receiving changes. An expired version does not, because a new list follows immediately.
func (f *freshness) record(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		f.unavailable = true
		return
	}
	f.unavailable, f.last = false, time.Now()
}
