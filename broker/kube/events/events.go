// Package events writes Kubernetes Events on pods, which kubectl describe shows: to a user why a pod has no credentials, to
// a cluster admin why a broker cannot do its work.
//
// It guarantees: no caller waits for the API server; memory and the queue are bounded; one namespace cannot use up the limit
// of all; an Event that was not written is counted. It is best effort, so an Event can be missing. It does not decide which
// pods are refused.
package events

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	eventsv1client "k8s.io/client-go/kubernetes/typed/events/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// Reasons and the controller of the Events.
const (
	// reasonRefused is the reason of an Event on a pod that the broker refuses.
	reasonRefused = "CredentialsRefused"
	// reasonShadowed is the reason of an Event on a pod in which something takes precedence over its role.
	reasonShadowed = "CredentialsShadowed"
	// reasonUnavailable is the reason of an Event on a pod that gets no credentials because its broker is impaired.
	reasonUnavailable = "CredentialsUnavailable"
	// ReasonBudget is the reason of an Event on a broker's own pod: --sts-rate is too low for its sessions.
	ReasonBudget = "STSBudgetShort"
	// ReasonIdentity is the reason of an Event on a broker's own pod: it is not ready, because STS has not confirmed its
	// identity.
	ReasonIdentity = "AWSIdentityUnconfirmed"
	// ReasonConfirmed is the reason of the Event when STS has confirmed it.
	ReasonConfirmed = "AWSIdentityConfirmed"
	// ReasonImpaired is the reason of an Event on a broker's own pod: it cannot do its work.
	ReasonImpaired = "BrokerImpaired"
	// ReasonRecovered is the reason of the Event when it can again.
	ReasonRecovered = "BrokerRecovered"
	// controller is the reporting controller of all Events.
	controller = "credence-iam.github.io/broker"
)

// kind is what Events of one reason have in common.
type kind struct {
	action string // of the broker
	// quiet is the minimum time between two equal Events on one pod; 0: the caller limits them.
	quiet  time.Duration
	normal bool // it is no warning
}

var kinds = map[string]kind{
	reasonRefused:     {"GetCredentials", refusedQuiet, false},
	reasonUnavailable: {"GetCredentials", refusedQuiet, false},
	reasonShadowed:    {"GetCredentials", shadowedQuiet, false},
	ReasonBudget:      {"RenewSessions", refusedQuiet, false},
	ReasonIdentity:    {"ConfirmIdentity", refusedQuiet, false},
	ReasonConfirmed:   {"ConfirmIdentity", 0, true},
	ReasonImpaired:    {"GetCredentials", 0, false},
	ReasonRecovered:   {"GetCredentials", 0, true},
}

const (
	// refusedQuiet is the minimum time between two Events for the same refusal of the same pod. An API server keeps an Event
	// as long by default, so that there is always one.
	refusedQuiet = time.Hour
	// shadowedQuiet is the minimum time between two Events for the warnings of one pod. They do not change while the pod
	// exists.
	shadowedQuiet = 24 * time.Hour
	// maxSeen bounds the remembered Events, at about 200 bytes each.
	maxSeen = 20_000
	// maxQueue bounds the Events that wait to be written. At perSecond they take a minute and a half.
	maxQueue = 500
	// perSecond, above burst, limits the load that all pods together put on the API server and etcd.
	perSecond, burst = 5, 50
	// namespacePerSecond, above namespaceBurst, leaves room for other namespaces when one has a thousand pods with the same
	// mistake. Twenty of them show it as well.
	namespacePerSecond, namespaceBurst = 0.2, 20
	// outagesPerSecond, above outagesBurst, limits Events on pods without credentials while the broker is impaired. All pods
	// have the same cause, and the Events of refusals matter more.
	outagesPerSecond, outagesBurst = 0.5, 20
	// maxLimiters bounds the remembered limiters. When it is reached, unused ones are forgotten: they would be full anyway.
	maxLimiters = 1000
	// maxNote, maxName and maxInstance are the API's own limits.
	maxNote, maxName, maxInstance = 1024, 253, 128
	// writeTimeout bounds one write.
	writeTimeout = 5 * time.Second
)

// Recorder writes Events. Its methods return at once; Run writes. They may be called concurrently.
type Recorder struct {
	client   eventsv1client.EventsGetter
	instance string
	log      *slog.Logger
	all      *rate.Limiter
	outages  *rate.Limiter // used under mu
	queue    chan event

	mu       sync.Mutex
	seen     map[eventKey]series      // guarded by mu
	limiters map[string]*rate.Limiter // :: namespace → its limit; guarded by mu
	stats    Stats                    // guarded by mu
}

// eventKey is equal for Events of which one is enough.
type eventKey struct {
	uid    string
	reason credential.Reason
	text   uint64 // hash of the note
}

// series is what the Recorder remembers of equal Events.
type series struct {
	until time.Time // when the next one may be written
	since time.Time // of the first one
	count int       // including those that were not written
}

// event is an Event that waits to be written.
type event struct {
	eventKey
	pod    policy.Pod
	reason string
	note   string
	at     time.Time
	since  time.Time // when it happened first
	count  int       // how often it happened
}

// Stats counts Events since the start.
type Stats struct {
	// Queued is the number of Events that wait now.
	Queued int
	// Written counts those that the API server stored.
	Written uint64
	// Suppressed counts those that repeat an earlier Event.
	Suppressed uint64
	// Dropped counts those that found the queue full, were above a limit, or could not be written.
	Dropped uint64
}

// New returns a Recorder. instance is the name of this broker, for example of its pod. All arguments are required.
func New(config *rest.Config, instance string, log *slog.Logger) (*Recorder, error) {
	if config == nil || instance == "" || log == nil {
		return nil, errors.New("a REST configuration, the name of this broker and a Logger are required")
	}
	config = rest.CopyConfig(config)
	config.QPS = -1 // perSecond is the limit.
	client, err := eventsv1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client for Events: %w", err)
	}
	return &Recorder{
		client: client, instance: clip.Bytes(instance, maxInstance), log: log,
		all: rate.NewLimiter(perSecond, burst), outages: rate.NewLimiter(outagesPerSecond, outagesBurst), queue: make(chan event, maxQueue),
		seen: make(map[eventKey]series), limiters: make(map[string]*rate.Limiter),
	}, nil
}

// Refused queues an Event on the pod, if the refusal is new and a user must fix it.
func (e *Recorder) Refused(pod policy.Pod, err *credential.Error) {
	// An unavailable dependency recovers without a user. An unauthenticated caller has no pod to notify, except for a token
	// with another audience: the broker calls Refused only if it knows that token's pod.
	if err == nil || pod.UID == "" ||
		!errors.Is(err, credential.ErrDenied) && !errors.Is(err, credential.ErrInvalid) && err.Reason != credential.ReasonTokenAudience {
		return
	}
	e.enqueue(event{pod: pod, reason: reasonRefused, eventKey: eventKey{reason: err.Reason}, note: string(err.Reason) + ": " + err.Message})
}

// Unavailable queues an Event on the pod: it gets no credentials because of err, which lasts. A cluster admin must fix it.
func (e *Recorder) Unavailable(pod policy.Pod, err *credential.Error) {
	if err == nil || pod.UID == "" {
		return
	}
	e.enqueue(event{pod: pod, reason: reasonUnavailable, eventKey: eventKey{reason: err.Reason}, note: string(err.Reason) + ": " + err.Message})
}

// Shadowed queues an Event on the pod with the warnings of its admission, which say what takes precedence over its role.
func (e *Recorder) Shadowed(pod policy.Pod, warnings string) {
	if warnings == "" || pod.UID == "" {
		return
	}
	e.enqueue(event{
		pod: pod, reason: reasonShadowed, eventKey: eventKey{reason: credential.ReasonShadowed},
		note: "at its admission, the webhook warned: " + clip.Line(warnings, maxNote),
	})
}

// Own queues an Event on the broker's own pod. The reason is one of this package, and its cause was seen count times from
// since; 0: once, now.
func (e *Recorder) Own(pod policy.Pod, reason, note string, since time.Time, count int) {
	e.enqueue(event{pod: pod, reason: reason, note: note, since: since, count: count})
}

func (e *Recorder) enqueue(queued event) {
	now := time.Now()
	text := fnv.New64a()
	_, _ = text.Write([]byte(queued.reason + queued.note)) // never fails
	queued.eventKey = eventKey{queued.pod.UID, queued.eventKey.reason, text.Sum64()}
	queued.at, queued.note = now, clip.Bytes(queued.note, maxNote)
	queued.pod = policy.Pod{Namespace: queued.pod.Namespace, Name: queued.pod.Name, UID: queued.pod.UID} // without its annotations
	quiet := kinds[queued.reason].quiet
	e.mu.Lock()
	defer e.mu.Unlock()
	was, ok := e.seen[queued.eventKey]
	if ok {
		was.count++
		e.seen[queued.eventKey] = was
		if now.Before(was.until) {
			e.stats.Suppressed++
			return
		}
		queued.since, queued.count = was.since, was.count
	} else if quiet > 0 {
		queued.since, queued.count = now, 1
	}
	if !e.canRemember(now) || !e.allow(queued, now) {
		if queued.reason == reasonUnavailable {
			e.stats.Suppressed++ // Other pods and the broker's own pod have one for the same cause.
		} else {
			e.stats.Dropped++
		}
		return
	}
	select {
	case e.queue <- queued:
		if quiet > 0 {
			e.seen[queued.eventKey] = series{until: now.Add(quiet), since: queued.since, count: queued.count}
		}
	default:
		e.stats.Dropped++
	}
}

// allow reports whether the limits permit the Event now. The caller holds mu.
func (e *Recorder) allow(queued event, now time.Time) bool {
	// Keys with a slash are not valid namespaces: warnings and outages do not use the limit of refusals.
	switch namespace := queued.pod.Namespace; queued.reason {
	case reasonShadowed:
		return e.limiter("/"+namespace).AllowN(now, 1)
	case reasonUnavailable:
		return e.outages.TokensAt(now) >= 1 && e.limiter("//"+namespace).AllowN(now, 1) && e.outages.AllowN(now, 1)
	default:
		return e.limiter(namespace).AllowN(now, 1)
	}
}

// canRemember reports whether seen has room, after it removed expired entries. The caller holds mu.
func (e *Recorder) canRemember(now time.Time) bool {
	if len(e.seen) >= maxSeen {
		maps.DeleteFunc(e.seen, func(_ eventKey, s series) bool { return !now.Before(s.until) })
	}
	return len(e.seen) < maxSeen
}

// limiter returns the namespace's limiter. The caller holds mu.
func (e *Recorder) limiter(namespace string) *rate.Limiter {
	l := e.limiters[namespace]
	if l == nil {
		if len(e.limiters) >= maxLimiters {
			maps.DeleteFunc(e.limiters, func(_ string, l *rate.Limiter) bool { return l.Tokens() >= namespaceBurst })
		}
		if len(e.limiters) >= maxLimiters {
			return rate.NewLimiter(0, 0) // The Events of a thousand namespaces are enough to read.
		}
		l = rate.NewLimiter(namespacePerSecond, namespaceBurst)
		e.limiters[namespace] = l
	}
	return l
}

// Stats returns the counts so far.
func (e *Recorder) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	stats := e.stats
	stats.Queued = len(e.queue)
	return stats
}

// Run writes queued Events until ctx ends. It drops Events that are queued then.
func (e *Recorder) Run(ctx context.Context) error {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case queued := <-e.queue:
			err := e.all.Wait(ctx)
			if err == nil {
				err = e.write(ctx, queued)
			}
			e.mu.Lock()
			if err == nil {
				e.stats.Written++
			} else {
				e.stats.Dropped++
				if was, ok := e.seen[queued.eventKey]; ok {
					was.until = time.Time{} // so that the next one is written
					e.seen[queued.eventKey] = was
				}
			}
			e.mu.Unlock()
			if err != nil && !failing && ctx.Err() == nil { // once per outage
				e.log.WarnContext(ctx, "Could not write an Event on a pod", "namespace", queued.pod.Namespace, "pod", queued.pod.Name, "error", err)
			}
			failing = err != nil
		}
	}
}

func (e *Recorder) write(ctx context.Context, queued event) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	// client-go's recorders name their Events alike: one pod can have many, and another pod can get its name.
	suffix := "." + strconv.FormatInt(queued.at.UnixNano(), 16)
	name := queued.pod.Name[:min(len(queued.pod.Name), maxName-len(suffix))]
	object := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: queued.pod.Namespace, Name: strings.TrimRight(name, ".-") + suffix},
		EventTime:  metav1.NewMicroTime(queued.at), ReportingController: controller, ReportingInstance: e.instance,
		Action: kinds[queued.reason].action, Reason: queued.reason, Type: corev1.EventTypeWarning, Note: queued.note,
		Regarding: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: queued.pod.Namespace, Name: queued.pod.Name, UID: types.UID(queued.pod.UID),
		},
	}
	if kinds[queued.reason].normal {
		object.Type = corev1.EventTypeNormal
	}
	if queued.count > 1 { // The API server refuses a series of one.
		object.EventTime = metav1.NewMicroTime(queued.since)
		object.Series = &eventsv1.EventSeries{Count: int32(min(queued.count, math.MaxInt32)), LastObservedTime: metav1.NewMicroTime(queued.at)}
	}
	if _, err := e.client.Events(queued.pod.Namespace).Create(ctx, object, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("creating an Event: %w", err)
	}
	return nil
}
