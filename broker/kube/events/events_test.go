package events_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/kube/events"
	"github.com/credence-iam/credence/broker/policy"
)

// eventServer is an API server that stores Events.
type eventServer struct {
	*apitest.Network

	mu     sync.Mutex
	stored []eventsv1.Event // guarded by mu
}

func (w *eventServer) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	var e eventsv1.Event
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil || r.Method != http.MethodPost ||
		r.URL.Path != "/apis/events.k8s.io/v1/namespaces/"+e.Namespace+"/events" {
		rw.WriteHeader(http.StatusBadRequest)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stored = append(w.stored, e)
	rw.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(rw).Encode(e)
}

func (w *eventServer) events() []eventsv1.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stored
}

func startEvents(t *testing.T) (*events.Recorder, *eventServer) {
	t.Helper()
	w := new(eventServer)
	w.Network = apitest.Serve(t, w)
	e, err := events.New(w.Config(), "broker-1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(stop)
	go func() { _ = e.Run(ctx) }()
	return e, w
}

func refusedPod(namespace string, i int) policy.Pod {
	return policy.Pod{Namespace: namespace, Name: fmt.Sprint("p-", i), UID: fmt.Sprint(namespace, "-u-", i)}
}

var notPermitted = credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted, "role x is not permitted")

func TestEventsOnBrokers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, w := startEvents(t)
		for range 2 {
			e.Own(refusedPod("credence", 1), events.ReasonBudget, "too many sessions", time.Time{}, 0)
			e.Own(refusedPod("credence", 1), events.ReasonIdentity, "wrong keys", time.Time{}, 0)
		}
		e.Own(refusedPod("credence", 1), events.ReasonConfirmed, "known", time.Time{}, 0)
		since := time.Now()
		time.Sleep(time.Minute)
		for range 2 {
			e.Own(refusedPod("credence", 1), events.ReasonImpaired, "wrong keys", since, 7)
			e.Own(refusedPod("credence", 1), events.ReasonRecovered, "over", time.Time{}, 0)
		}
		e.Refused(refusedPod("credence", 1), notPermitted)
		synctest.Wait()
		var got []string
		for _, event := range w.events() {
			line := event.Type + " " + event.Reason + "/" + event.Action + ": " + event.Note
			if s := event.Series; s != nil {
				line += fmt.Sprintf(" (x%d over %v)", s.Count, s.LastObservedTime.Sub(event.EventTime.Time))
			}
			got = append(got, line)
		}
		want := []string{
			"Warning STSBudgetShort/RenewSessions: too many sessions",
			"Warning AWSIdentityUnconfirmed/ConfirmIdentity: wrong keys",
			"Normal AWSIdentityConfirmed/ConfirmIdentity: known",
			"Warning BrokerImpaired/GetCredentials: wrong keys (x7 over 1m0s)",
			"Normal BrokerRecovered/GetCredentials: over",
			"Warning BrokerImpaired/GetCredentials: wrong keys (x7 over 1m0s)",
			"Normal BrokerRecovered/GetCredentials: over",
			"Warning CredentialsRefused/GetCredentials: ROLE_NOT_PERMITTED: role x is not permitted",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("Events (- want, + got):\n%s", diff)
		}
	})
}

// TestWarningsAreAnEvent: the webhook's warnings become one Event per pod, on one line. They do not use the limit of refusals.
func TestWarningsAreAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, w := startEvents(t)
		pod := refusedPod("shop", 1)
		const text = "container \"a\" has AWS_PROFILE\ncontainer \"b\" has it\x1b[2J\u202e too"
		e.Shadowed(pod, "")
		e.Shadowed(policy.Pod{Namespace: "shop", Name: "p"}, text) // without a UID
		for range 10 {
			e.Shadowed(pod, text)
			time.Sleep(time.Hour)
		}
		got := w.events()
		if len(got) != 1 {
			t.Fatalf("%d Events were written, want 1", len(got))
		}
		const want = "at its admission, the webhook warned: container \"a\" has AWS_PROFILE;container \"b\" has it?[2J? too"
		if g := got[0]; g.Reason != "CredentialsShadowed" || g.Type != "Warning" || g.Action != "GetCredentials" || g.Note != want || string(g.Regarding.UID) != pod.UID {
			t.Errorf("the Event is %+v", g)
		}
		for i := range 1000 {
			e.Shadowed(refusedPod("shop", i), strings.Repeat("x", 256<<10))
		}
		e.Refused(pod, notPermitted)
		time.Sleep(time.Minute)
		refusals := 0
		for _, event := range w.events() {
			if len(event.Note) > 1024 {
				t.Errorf("a note has %d bytes, want at most 1024", len(event.Note))
			}
			if event.Reason == "CredentialsRefused" {
				refusals++
			}
		}
		if n := len(w.events()); refusals != 1 || n > 2+20 {
			t.Errorf("after many warnings there are %d Events, want at most 22, and %d refusals, want 1", n, refusals)
		}
	})
}

func TestWhichRefusalsBecomeEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, w := startEvents(t)
		pod := refusedPod("shop", 1)
		for _, err := range []*credential.Error{
			notPermitted,
			credential.Errorf(credential.ErrInvalid, credential.ReasonRoleInvalid, "%s", strings.Repeat("é", 2000)),
			notPermitted,
			nil,
			credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSThrottled, "later"),
			credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenInvalid, "bad token"),
			credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenAudience, "set --audience"),
			credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "gone"),
		} {
			e.Refused(pod, err)
		}
		e.Refused(policy.Pod{Namespace: "shop", Name: "p"}, notPermitted) // without a UID
		synctest.Wait()
		got := w.events()
		if len(got) != 3 || got[2].Note != "TOKEN_AUDIENCE: set --audience" || !strings.HasPrefix(got[0].Note, "ROLE_NOT_PERMITTED: role x") || !strings.HasPrefix(got[1].Note, "ROLE_INVALID: é") {
			t.Fatalf("%d Events were written, want two refusals and the audience: %v", len(got), got)
		}
		if n := len(got[1].Note); n > 1024 || n < 1000 || !utf8.ValidString(got[1].Note) {
			t.Errorf("a long message became a note of %d bytes, valid UTF-8: %t", n, utf8.ValidString(got[1].Note))
		}
		if diff := cmp.Diff(events.Stats{Written: 3, Suppressed: 1}, e.Stats()); diff != "" {
			t.Errorf("the counts (- want, + got):\n%s", diff)
		}
		// After an hour the API server may have deleted the Event.
		time.Sleep(time.Hour)
		e.Refused(pod, notPermitted)
		synctest.Wait()
		if n := len(w.events()); n != 4 {
			t.Errorf("an hour later there are %d Events, want 4", n)
		}
		// It counts the refusal that was not written, too.
		if s := w.events()[3].Series; s == nil || s.Count != 3 || s.LastObservedTime.Sub(w.events()[3].EventTime.Time) != time.Hour {
			t.Errorf("an hour later the Event is the series %+v, want 3 in an hour", s)
		}
		if regarding := w.events()[3].Regarding; string(regarding.UID) != pod.UID || regarding.Kind != "Pod" || regarding.Name != pod.Name {
			t.Errorf("the Event regards %+v", regarding)
		}
	})
}

func TestOneNamespaceDoesNotTakeAllEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, w := startEvents(t)
		for i := range 1000 {
			e.Refused(refusedPod("shop", i), notPermitted)
		}
		e.Refused(refusedPod("bank", 1), notPermitted)
		time.Sleep(time.Second)
		of := make(map[string]int)
		for _, event := range w.events() {
			of[event.Namespace]++
		}
		if of["shop"] != 20 || of["bank"] != 1 {
			t.Errorf("the Events of each namespace are %v, want 20 in shop and 1 in bank", of)
		}
		if got := e.Stats(); got.Dropped != 980 || got.Written != 21 {
			t.Errorf("the counts are %+v", got)
		}
	})
}

// TestOutagesLeaveRoomForRefusals: thousands of pods without credentials for one cause have few Events, and these are not
// counted as dropped, because no alert should fire for them.
func TestOutagesLeaveRoomForRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, w := startEvents(t)
		throttled := credential.Errorf(credential.ErrUnavailable, credential.ReasonSTSThrottled, "STS throttles this account")
		e.Unavailable(policy.Pod{Namespace: "shop", Name: "p"}, throttled) // without a UID
		e.Unavailable(refusedPod("shop", 1), nil)
		for minute := range 10 {
			for i := range 5000 {
				e.Unavailable(refusedPod(fmt.Sprint("ns-", i%50), i), throttled)
			}
			e.Refused(refusedPod("ns-1", minute), notPermitted)
			time.Sleep(time.Minute)
		}
		of := make(map[string]int)
		for _, event := range w.events() {
			of[event.Reason]++
			if event.Reason == "CredentialsUnavailable" && (event.Type != "Warning" || event.Note != "STS_THROTTLED: STS throttles this account") {
				t.Fatalf("an Event is %+v", event)
			}
		}
		if of["CredentialsRefused"] != 10 || of["CredentialsUnavailable"] < 20 || of["CredentialsUnavailable"] > 20+9*20 {
			t.Errorf("the Events of each reason are %v, want 10 refusals and 20 to 200 others", of)
		}
		if got := e.Stats(); got.Dropped != 0 {
			t.Errorf("the counts are %+v, want 0 dropped", got)
		}
	})
}

func TestEventsAreRateLimitedOverall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, w := startEvents(t)
		for i := range 900 {
			e.Refused(refusedPod(fmt.Sprint("ns-", i), 1), notPermitted)
		}
		time.Sleep(10*time.Second + 10*time.Millisecond)
		if n := len(w.events()); n < 90 || n > 101 {
			t.Errorf("in ten seconds %d Events were written, want 50 and 5 a second", n)
		}
		time.Sleep(5 * time.Minute)
		got := e.Stats()
		if got.Written+got.Dropped != 900 || got.Dropped < 300 {
			t.Errorf("the counts are %+v, want 900 in total and some 350 dropped, as the queue has 500", got)
		}
	})
}

func TestEventsAreWrittenAfterAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, w := startEvents(t)
		w.SetDown(true)
		e.Refused(refusedPod("shop", 1), notPermitted)
		time.Sleep(time.Minute)
		if got := e.Stats(); got.Dropped != 1 {
			t.Fatalf("without the API server the counts are %+v, want 1 dropped", got)
		}
		w.SetDown(false)
		e.Refused(refusedPod("shop", 1), notPermitted)
		synctest.Wait()
		if got := e.Stats(); got.Written != 1 || got.Suppressed != 0 {
			t.Errorf("after the outage the counts are %+v, want 1 written", got)
		}
	})
}

func TestNewNeedsAName(t *testing.T) {
	if _, err := events.New(&rest.Config{}, "", slog.New(slog.DiscardHandler)); err == nil {
		t.Error("New accepted an empty name of the broker")
	}
}
