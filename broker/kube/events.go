package kube

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

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

// What Events say of themselves.
const (
	// EventReason is the reason of every Event on a pod that is refused.
	EventReason = "CredentialsRefused"
	// ShadowedReason is the reason of the Event on a pod in which something outranks its role.
	ShadowedReason = "CredentialsShadowed"
	// BudgetReason is the reason of the Event on a broker's own pod which may not call STS as often as it must.
	BudgetReason = "STSBudgetShort"
	// IdentityReason is the reason of the Event on a broker's own pod which is not ready, because STS has not confirmed its
	// identity.
	IdentityReason = "AWSIdentityUnconfirmed"
	// EventController is what wrote it.
	EventController = "credence-iam.github.io/broker"
)

// eventActions are what the broker did when it had something to say, by the reason of the Event.
var eventActions = map[string]string{EventReason: "GetCredentials", ShadowedReason: "GetCredentials", BudgetReason: "RenewSessions", IdentityReason: "ConfirmIdentity"}

const (
	// eventQuiet is how long the same refusal of the same pod is not written again: as long as an API server
	// keeps an Event by default, so that there is one to be seen.
	eventQuiet = time.Hour
	// shadowedQuiet is how long the warnings of one pod are not written again. They do not change while the pod lives.
	shadowedQuiet = 24 * time.Hour
	// maxEventsSeen bounds what is remembered for that, at some 150 bytes each.
	maxEventsSeen = 20_000
	// eventQueue bounds what waits to be written. At eventsPerSecond it is a minute and a half.
	eventQueue = 500
	// eventsPerSecond, over eventBurst, bounds what all pods together may cost the API server and its etcd.
	eventsPerSecond, eventBurst = 5, 50
	// namespaceEventsPerSecond, over namespaceEventBurst, leaves something for other namespaces when one has a
	// thousand pods with the same mistake, which twenty of them show as well.
	namespaceEventsPerSecond, namespaceEventBurst = 0.2, 20
	// maxEventNote and maxEventName are the API's own bounds.
	maxEventNote, maxEventName = 1024, 253
	// eventTimeout bounds one write.
	eventTimeout = 5 * time.Second
)

// Events tells whoever describes a pod why it is refused. It is best effort: it never makes a call wait, and
// what it cannot write it counts.
type Events struct {
	client   eventsv1client.EventsGetter
	instance string
	log      *slog.Logger
	all      *rate.Limiter
	queue    chan notice

	mu     sync.Mutex
	seen   map[sighting]time.Time   // :: refusal → when it may be written again; guarded by mu
	shares map[string]*rate.Limiter // :: namespace → what it may write; guarded by mu
	stats  EventStats               // guarded by mu
}

// sighting is what makes one refusal the same as another.
type sighting struct {
	uid    string
	reason credential.Reason
	text   uint64 // a hash of the message: another one is news
}

// notice is an Event to be written.
type notice struct {
	sighting
	pod    policy.Pod
	reason string
	note   string
	at     time.Time
}

// EventStats counts what there was to say since the start.
type EventStats struct {
	// Queued is how many wait to be written now.
	Queued int
	// Written became an Event.
	Written uint64
	// Suppressed are those that there was an Event for already.
	Suppressed uint64
	// Dropped found the queue full, were above a limit, or could not be written.
	Dropped uint64
}

// NewEvents prepares it. instance is the name of this broker, such as its pod's. Nothing is written until Run.
func NewEvents(config *rest.Config, instance string, log *slog.Logger) (*Events, error) {
	if config == nil || instance == "" || log == nil {
		return nil, errors.New("a REST configuration, the name of this broker and a Logger are required")
	}
	config = rest.CopyConfig(config)
	config.QPS = -1 // Ours, below, is the limit.
	client, err := eventsv1client.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client for Events: %w", err)
	}
	return &Events{
		client: client, instance: clip.Bytes(instance, 128), log: log, // 128 is the API's bound
		all: rate.NewLimiter(eventsPerSecond, eventBurst), queue: make(chan notice, eventQueue),
		seen: make(map[sighting]time.Time), shares: make(map[string]*rate.Limiter),
	}, nil
}

// Refused has an Event written on the pod, if the refusal is one that a person must mend and is new. It returns
// at once.
func (e *Events) Refused(pod policy.Pod, err *credential.Error) {
	// An unavailable dependency comes back by itself, and a caller that has proved nothing has no pod to notify. The broker
	// reports a token for another audience only if it knows the token's pod.
	if err == nil || pod.UID == "" ||
		!errors.Is(err, credential.ErrDenied) && !errors.Is(err, credential.ErrInvalid) && err.Reason != credential.ReasonTokenAudience {
		return
	}
	e.queueUp(pod, EventReason, err.Reason, string(err.Reason)+": "+err.Message)
}

// Shadowed has an Event written on the pod, unless it has one already, that repeats the warnings of its admission: what in
// it outranks its role. It returns at once.
func (e *Events) Shadowed(pod policy.Pod, warnings string) {
	if warnings == "" || pod.UID == "" {
		return
	}
	e.queueUp(pod, ShadowedReason, credential.ReasonShadowed, "at its admission, the webhook warned: "+printable(clip.Bytes(warnings, maxEventNote)))
}

// printable returns s on one line, with a mark in place of each character that is not printable: every user who may create
// pods can write s, and terminals show it.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return ';'
		case unicode.IsPrint(r):
			return r
		default:
			return '?'
		}
	}, s)
}

// BudgetShort has an Event with this note written on the broker's own pod.
func (e *Events) BudgetShort(pod policy.Pod, note string) { e.queueUp(pod, BudgetReason, "", note) }

// IdentityUnconfirmed has an Event with this note written on the broker's own pod.
func (e *Events) IdentityUnconfirmed(pod policy.Pod, note string) {
	e.queueUp(pod, IdentityReason, "", note)
}

func (e *Events) queueUp(pod policy.Pod, reason string, why credential.Reason, note string) {
	now := time.Now()
	text := fnv.New64a()
	_, _ = text.Write([]byte(reason + note)) // which never fails
	r := notice{sighting: sighting{pod.UID, why, text.Sum64()}, at: now, reason: reason, note: clip.Bytes(note, maxEventNote)}
	r.pod = policy.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID} // the rest need not be kept
	e.mu.Lock()
	defer e.mu.Unlock()
	if until, ok := e.seen[r.sighting]; ok && now.Before(until) {
		e.stats.Suppressed++
		return
	}
	share := pod.Namespace
	if reason == ShadowedReason {
		share = "/" + share // no namespace has that name: warnings do not use the share of refusals
	}
	if !e.room(now) || !e.share(share).AllowN(now, 1) {
		e.stats.Dropped++
		return
	}
	select {
	case e.queue <- r:
		quiet := eventQuiet
		if reason == ShadowedReason {
			quiet = shadowedQuiet
		}
		e.seen[r.sighting] = now.Add(quiet)
	default:
		e.stats.Dropped++
	}
}

// room reports whether one more refusal can be remembered. The caller holds mu.
func (e *Events) room(now time.Time) bool {
	if len(e.seen) >= maxEventsSeen {
		maps.DeleteFunc(e.seen, func(_ sighting, until time.Time) bool { return !now.Before(until) })
	}
	return len(e.seen) < maxEventsSeen
}

// share is the namespace's limit. The caller holds mu.
func (e *Events) share(namespace string) *rate.Limiter {
	share := e.shares[namespace]
	if share == nil {
		if len(e.shares) >= maxLimiters {
			maps.DeleteFunc(e.shares, func(_ string, s *rate.Limiter) bool { return s.Tokens() >= namespaceEventBurst })
		}
		if len(e.shares) >= maxLimiters {
			return rate.NewLimiter(0, 0) // A thousand namespaces full of refusals have something to be read already.
		}
		share = rate.NewLimiter(namespaceEventsPerSecond, namespaceEventBurst)
		e.shares[namespace] = share
	}
	return share
}

// Stats returns what became of the refusals so far.
func (e *Events) Stats() EventStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	stats := e.stats
	stats.Queued = len(e.queue)
	return stats
}

// Run writes Events until ctx ends. What is queued then is dropped.
func (e *Events) Run(ctx context.Context) error {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case r := <-e.queue:
			err := e.all.Wait(ctx)
			if err == nil {
				err = e.write(ctx, r)
			}
			e.mu.Lock()
			if err == nil {
				e.stats.Written++
			} else {
				e.stats.Dropped++
				delete(e.seen, r.sighting) // the next refusal may be luckier
			}
			e.mu.Unlock()
			if err != nil && !failing && ctx.Err() == nil { // once per outage
				e.log.WarnContext(ctx, "Writing an Event on a pod failed", "namespace", r.pod.Namespace, "pod", r.pod.Name, "error", err)
			}
			failing = err != nil
		}
	}
}

func (e *Events) write(ctx context.Context, r notice) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	// As client-go's recorders name theirs: one pod can have many, and a pod of the same name may follow.
	suffix := "." + strconv.FormatInt(r.at.UnixNano(), 16)
	event := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: r.pod.Namespace, Name: strings.TrimRight(r.pod.Name[:min(len(r.pod.Name), maxEventName-len(suffix))], ".-") + suffix,
		},
		EventTime: metav1.NewMicroTime(r.at), ReportingController: EventController, ReportingInstance: e.instance,
		Action: eventActions[r.reason], Reason: r.reason, Type: corev1.EventTypeWarning, Note: r.note,
		Regarding: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: r.pod.Namespace, Name: r.pod.Name, UID: types.UID(r.pod.UID),
		},
	}
	if _, err := e.client.Events(r.pod.Namespace).Create(ctx, event, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("creating an Event: %w", err)
	}
	return nil
}
