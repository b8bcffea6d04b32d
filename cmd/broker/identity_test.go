package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube/events"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
)

// starting is a starting broker, with the parts of its readiness that depend on AWS: the real STS client with an STS double, the
// real cache, and Events in an API server that accepts nothing else.
type starting struct {
	t      *testing.T
	sts    *ststest.Server
	keys   string // the file with the broker's credentials
	parts  parts
	checks []admin.Check
	check  *identityCheck
	noBase bool
	logged *buffer
	events *eventServer
}

// start starts it with wrong keys, in a synctest bubble. If compatible is set, its STS has no GetCallerIdentity.
func start(t *testing.T, compatible bool, pods int, prepare func(s *starting)) *starting {
	t.Helper()
	server, err := ststest.StartInMemory(t.Context(), ststest.Config{})
	processtest.Must(t, err)
	s := &starting{t: t, sts: server, keys: filepath.Join(t.TempDir(), "credentials"), logged: new(buffer), events: new(eventServer)}
	if compatible {
		server.SetIdentity(ststest.Behavior{Fault: &ststest.Fault{Code: "InvalidParameterValue", Message: "Unsupported action GetCallerIdentity"}})
	}
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SESSION_TOKEN": "", "AWS_PROFILE": "",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": s.keys, "AWS_EC2_METADATA_DISABLED": "true",
	} {
		t.Setenv(name, value)
	}
	s.setKeys("AKIAWRONG", "wrong-secret")
	prepare(s)
	log := slog.New(slog.NewJSONHandler(s.logged, nil))
	source, err := assume.New(t.Context(), assume.Config{Region: "eu-central-1", Endpoint: server.URL(), Dial: server.Dial, Logger: log})
	processtest.Must(t, err)
	recorder, err := events.New(&rest.Config{Host: "http://api.invalid", Transport: s.events}, "broker-1", log)
	processtest.Must(t, err)
	self := policy.Pod{Namespace: "credence", Name: "broker-1", UID: "u-1"}
	impaired, err := newImpairments(source, recorder, self, log)
	processtest.Must(t, err)
	sessions, err := cache.New(cache.Config[policy.Grant]{Source: impaired.Source(source), Logger: log})
	processtest.Must(t, err)
	s.parts = parts{log: log, self: self, sts: source, sessions: sessions, events: recorder, impaired: impaired}
	began := time.Now()
	s.checks, s.check = s.parts.readiness(nil, nil)
	s.checks = slices.DeleteFunc(s.checks, func(c admin.Check) bool { return c.Name != "AWS identity" }) // All others need a cluster.
	s.check.deciding = func() bool { return !s.noBase }
	s.check.warm = func() bool {
		done, active := sessions.Progress()
		return done == active || time.Since(began) >= maxWarmTime
	}
	for i := range pods {
		processtest.Must(t, sessions.Retain(grantOf(t, fmt.Sprint("role-", i)), "shop"))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{
		sessions.Run, recorder.Run,
		func(ctx context.Context) error { source.AwaitIdentity(ctx, log); return nil },
		func(ctx context.Context) error { return s.parts.watchAWS(ctx, s.check) },
	} {
		running.Go(func() { _ = run(ctx) })
	}
	t.Cleanup(func() { cancel(); running.Wait(); server.Close() })
	return s
}

func (s *starting) setKeys(id, secret string) {
	processtest.Must(s.t, os.WriteFile(s.keys, fmt.Appendf(nil, "[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", id, secret), 0o600))
}

// rightKeys replaces the wrong keys, as a cluster admin does.
func (s *starting) rightKeys() {
	id, secret := s.sts.Keys()
	s.setKeys(id, secret.Reveal())
}

// ready returns the response of /readyz.
func (s *starting) ready() (ok bool, text string) {
	synctest.Wait()
	w := httptest.NewRecorder()
	admin.Handler(nil, s.checks...).ServeHTTP(w, httptest.NewRequestWithContext(s.t.Context(), http.MethodGet, "/readyz", nil))
	return w.Code == http.StatusOK, w.Body.String()
}

func (s *starting) want(what string, want bool, words ...string) {
	s.t.Helper()
	ok, text := s.ready()
	if ok != want {
		s.t.Errorf("%s: ready is %v, want %v: %s", what, ok, want, text)
	}
	for _, w := range words {
		if !strings.Contains(text, w) {
			s.t.Errorf("%s: /readyz does not have %q: %s", what, w, text)
		}
	}
	if strings.Contains(text, "wrong-secret") || strings.Contains(s.logged.String(), "wrong-secret") {
		s.t.Errorf("%s: a secret is in /readyz or the log", what)
	}
}

// buffer is a log that tests read while the broker writes it.
type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// eventServer is an API server that accepts Events.
type eventServer struct {
	mu    sync.Mutex
	taken []eventsv1.Event
}

func (e *eventServer) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	var event eventsv1.Event
	if _, _, err := scheme.Codecs.UniversalDeserializer().Decode(body, nil, &event); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.taken = append(e.taken, event)
	return &http.Response{StatusCode: http.StatusCreated, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(`{"kind":"Event","apiVersion":"events.k8s.io/v1"}`))}, nil
}

// notes returns the notes of the Events so far of a reason, which must be on the broker's own pod.
func (e *eventServer) notes(t *testing.T, reason string) (all []string) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, event := range e.taken {
		normal := event.Reason == events.ReasonConfirmed || event.Reason == events.ReasonRecovered
		if (event.Type == "Normal") != normal || event.Regarding.Name != "broker-1" || event.Regarding.UID != "u-1" || event.Namespace != "credence" || event.Action == "" {
			t.Errorf("an Event is %+v", event)
		}
		if strings.Contains(event.Note, "wrong-secret") {
			t.Error("an Event has a secret")
		}
		if event.Reason == reason {
			all = append(all, event.Note)
		}
	}
	return all
}

func grantOf(t *testing.T, role string) policy.Grant {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	processtest.Must(t, err)
	base, err := credential.BaseOf("aws", "123456789012")
	processtest.Must(t, err)
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	processtest.Must(t, err)
	g, err := rules.Grant(policy.Pod{Namespace: "shop", Name: "p", UID: "u", Request: keys.Request(map[string]string{keys.Name(policy.Role): role})}, policy.Namespace{
		Name: "shop", Labels: map[string]string{keys.Name(policy.Inject): policy.Enabled}, Annotations: map[string]string{keys.Name(policy.Permitted): ".*"},
	})
	processtest.Must(t, err)
	return g
}

// A broker with wrong keys does not become ready, so it replaces no broker that works. It reports why in /readyz, in the log and
// in an Event.
func TestBrokerWithWrongKeysIsNotReady(t *testing.T) {
	for name, pods := range map[string]int{"no pods": 0, "with pods": 3} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, false, pods, func(*starting) {})
				time.Sleep(10 * time.Minute)
				const problem = "(InvalidClientTokenId): their access key does not exist or is inactive"
				s.want("wrong keys", false, problem, "Secret")
				notes := s.events.notes(t, events.ReasonIdentity)
				if len(notes) != 1 || !strings.Contains(notes[0], problem) || !strings.Contains(notes[0], "not ready") {
					t.Errorf("the Events have %q, want one with the problem", notes)
				}
				if !strings.Contains(s.logged.String(), problem) {
					t.Errorf("the log does not have %q:\n%.2000s", problem, s.logged)
				}
				// Another problem gets another Event. A lasting problem gets a new Event when the first has expired.
				id, _ := s.sts.Keys()
				s.setKeys(id, "wrong-secret")
				time.Sleep(2 * time.Minute)
				s.want("a wrong secret", false, "(SignatureDoesNotMatch)")
				time.Sleep(time.Hour)
				if notes := s.events.notes(t, events.ReasonIdentity); len(notes) != 3 || !strings.Contains(notes[1], "SignatureDoesNotMatch") || notes[2] != notes[1] {
					t.Errorf("after an hour the Events have %q", notes)
				}
				s.rightKeys()
				time.Sleep(2 * time.Minute)
				s.want("corrected", true)
				if notes := s.events.notes(t, events.ReasonConfirmed); len(notes) != 1 {
					t.Errorf("the Events have %q, want one that the identity is confirmed", notes)
				}
			})
		})
	}
}

// A broker that starts in an outage of STS is not ready, so the other brokers serve. It becomes ready as soon as STS responds.
func TestRestartInAnOutage(t *testing.T) {
	for name, outage := range map[string]ststest.Outage{"failing": ststest.Failing, "unreachable": ststest.Refusing} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, false, 2, func(s *starting) {
					s.rightKeys()
					s.sts.SetOutage(outage)
				})
				time.Sleep(time.Hour)
				s.want("in the outage", false, "STS")
				if notes := s.events.notes(t, events.ReasonIdentity); len(notes) == 0 {
					t.Error("no Event has the reason")
				}
				s.sts.SetOutage(ststest.NoOutage)
				time.Sleep(10 * time.Second)
				s.want("after it", true)
			})
		})
	}
}

// A lost call at the start makes no Event.
func TestShortTroubleIsNotReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, false, 0, func(s *starting) {
			s.rightKeys()
			s.sts.SetOutage(ststest.Failing)
		})
		time.Sleep(identityInterval + 500*time.Millisecond) // The next call comes within 8 s.
		s.want("in the outage", false, "STS")
		s.sts.SetOutage(ststest.NoOutage)
		time.Sleep(time.Minute)
		s.want("after it", true)
		if notes := s.events.notes(t, events.ReasonIdentity); len(notes) != 0 {
			t.Errorf("the Events have %q", notes)
		}
	})
}

// A ready broker whose keys stop to work, or whose STS does, has an Event with the cause and the fix, and one at the end.
func TestImpairedBroker(t *testing.T) {
	for name, tt := range map[string]struct {
		fail func(s *starting)
		want []string // words of the note
	}{
		"keys": {func(s *starting) { s.setKeys("AKIAWRONG", "wrong-secret") }, []string{
			"BROKER_CREDENTIALS: AWS refuses the broker's own credentials (InvalidClientTokenId): their access key does not exist", "a cluster admin must fix this",
		}},
		"failing":     {func(s *starting) { s.sts.SetOutage(ststest.Failing) }, []string{"STS_UNAVAILABLE: STS fails (", "do not restart brokers"}},
		"unreachable": {func(s *starting) { s.sts.SetOutage(ststest.Refusing) }, []string{"STS_UNAVAILABLE: the broker cannot reach STS; it keeps trying; check egress, DNS"}},
		"throttling": {func(s *starting) {
			s.sts.SetDefault(ststest.Behavior{Fault: &ststest.Fault{Code: "Throttling", Message: "Rate exceeded", Status: http.StatusBadRequest}})
		}, []string{"STS_THROTTLED: STS throttles this account", "--sts-rate"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, false, 2, (*starting).rightKeys)
				time.Sleep(time.Minute)
				tt.fail(s)
				time.Sleep(40 * time.Minute) // The renewals are due after 30.
				notes := s.events.notes(t, events.ReasonImpaired)
				if len(notes) != 1 {
					t.Fatalf("the Events have %q, want one", notes)
				}
				for _, words := range append(tt.want, "kubectl -n credence logs broker-1") {
					if !strings.Contains(notes[0], words) {
						t.Errorf("the Event does not have %q: %s", words, notes[0])
					}
				}
				if e := s.events.last(); e.Series == nil || e.Series.Count < 2 || !e.EventTime.Before(&e.Series.LastObservedTime) {
					t.Errorf("the Event is not a series: %+v", e)
				}
				time.Sleep(2 * time.Hour)
				if notes := s.events.notes(t, events.ReasonImpaired); len(notes) < 2 || len(notes) > 3 {
					t.Errorf("two hours later the Events have %q, want one more each hour", notes)
				}
				if notes := s.events.notes(t, events.ReasonRecovered); len(notes) != 0 {
					t.Errorf("before it has recovered, an Event has %q", notes)
				}
				s.sts.SetOutage(ststest.NoOutage)
				s.sts.SetDefault(ststest.Behavior{})
				s.rightKeys()
				time.Sleep(40 * time.Minute)
				notes = s.events.notes(t, events.ReasonRecovered)
				reason, _, _ := strings.Cut(tt.want[0], ":")
				if len(notes) != 1 || !strings.HasPrefix(notes[0], reason+" has ended after ") {
					t.Errorf("after the recovery the Events have %q, want one with %s", notes, reason)
				}
				s.want("still", true)
			})
		})
	}
}

// A broker whose pods have tokens for another audience has an Event that names both audiences and a pod.
func TestBrokerWithAnotherAudience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, false, 0, (*starting).rightKeys)
		observe := broker.ReportTo(s.parts.events, func(identity.Pod) bool { return true }, s.parts.impaired)
		for range 3 {
			time.Sleep(time.Minute)
			observe(t.Context(), broker.Call{Err: &credential.Error{
				Kind: credential.ErrUnauthenticated, Reason: credential.ReasonTokenAudience, Message: "the token is made for audience \"a\"",
				Cause: &identity.OtherAudienceError{Pod: identity.Pod{Namespace: "credence", Name: "broker-1", UID: "u-1"}},
			}})
		}
		time.Sleep(time.Minute)
		const want = `TOKEN_AUDIENCE: pod credence/broker-1: the token is made for audience "a"; each failure: kubectl -n credence logs broker-1`
		if notes := s.events.notes(t, events.ReasonImpaired); len(notes) != 1 || notes[0] != want {
			t.Errorf("the Events have %q, want %s", notes, want)
		}
		if notes := s.events.notes(t, "CredentialsRefused"); len(notes) != 1 {
			t.Errorf("the Events on the pod have %q, want one", notes)
		}
	})
}

// last returns the last Event.
func (e *eventServer) last() eventsv1.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.taken[len(e.taken)-1]
}

// A ready broker stays ready if STS or the broker's keys fail later.
func TestOutageLeavesReadyBrokersReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, false, 2, (*starting).rightKeys)
		time.Sleep(time.Second)
		s.want("at first", true)
		for _, outage := range []ststest.Outage{ststest.Failing, ststest.Refusing, ststest.NoOutage} {
			s.sts.SetOutage(outage)
			s.setKeys("AKIAWRONG", "wrong-secret")
			time.Sleep(90 * time.Minute) // Every session has expired.
			s.want("when no session is left", true)
		}
		if notes := s.events.notes(t, events.ReasonIdentity); len(notes) != 0 {
			t.Errorf("the Events have %q", notes)
		}
	})
}

// A service without GetCallerIdentity, such as MinIO, cannot confirm the broker's identity. A session confirms it.
func TestServiceWithoutGetCallerIdentity(t *testing.T) {
	t.Run("a first installation has no pods", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, true, 0, (*starting).rightKeys)
			time.Sleep(2 * time.Second)
			s.want("without pods", true)
			s.setKeys("AKIAWRONG", "wrong-secret")
			s.sts.SetOutage(ststest.Failing)
			processtest.Must(t, s.parts.sessions.Retain(grantOf(t, "role"), "shop"))
			time.Sleep(time.Hour)
			s.want("when it was ready once", true)
		})
	})
	t.Run("with pods", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, true, 2, (*starting).rightKeys)
			time.Sleep(2 * time.Second)
			s.want("with pods", true)
		})
	})
	t.Run("without a base ARN", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, true, 0, func(s *starting) { s.rightKeys(); s.noBase = true })
			time.Sleep(time.Minute)
			s.want("without a base ARN", false, "--base-arn")
		})
	})
	t.Run("all roles are refused", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, true, 2, func(s *starting) {
				s.rightKeys()
				s.sts.SetDefault(ststest.Behavior{Fault: &ststest.Fault{Code: "AccessDenied", Message: "Access Denied.", Status: http.StatusForbidden}})
			})
			time.Sleep(maxWarmTime)
			s.want("refused", true)
		})
	})
	t.Run("wrong keys", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, true, 2, func(*starting) {})
			time.Sleep(5 * time.Minute)
			s.want("wrong keys", false, "none of 2 sessions could be fetched", "--sts-endpoint")
			if notes := s.events.notes(t, events.ReasonIdentity); len(notes) != 1 {
				t.Errorf("the Events have %q", notes)
			}
			s.rightKeys()
			time.Sleep(2 * time.Minute)
			s.want("corrected", true)
		})
	})
}

// If STS does not respond to GetCallerIdentity, but returns a session for a role that pods request, the broker is ready.
func TestSessionProvesIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, false, 1, func(s *starting) {
			s.rightKeys()
			s.sts.SetIdentity(ststest.Behavior{Fault: ststest.Unavailable()})
		})
		time.Sleep(2 * time.Second)
		s.want("with a session", true)
	})
}

// The program with wrong keys is alive, is not ready, and writes an Event on its own pod.
func TestProgramWithWrongKeysIsNotReady(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.env = []string{"AWS_ACCESS_KEY_ID=AKIAWRONG", "POD_UID=u-1"}
	b := w.launch("--base-arn=arn:aws:iam::123456789012:role/")
	b.Await(t, "it waits for AWS to know it, and for nothing else", func() bool {
		_, text := b.get(b.admin, "/readyz")
		return strings.HasPrefix(text, "AWS identity: AWS refuses the broker's own credentials (InvalidClientTokenId)") && strings.Count(text, "\n") == 1
	})
	b.Await(t, "there is an Event on its own pod", func() bool {
		for _, name := range w.api.Names(&eventsv1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "credence"}}) {
			e := &eventsv1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "credence", Name: name}}
			if w.api.Load(e) && e.Reason == events.ReasonIdentity && e.Regarding.UID == "u-1" && strings.Contains(e.Note, "InvalidClientTokenId") {
				return true
			}
		}
		return false
	})
	b.Logged(t, "This broker is not ready, STS has not confirmed its identity")
	if code, _ := b.get(b.admin, "/healthz"); code != http.StatusOK || b.ready() {
		t.Errorf("/healthz returns %d, and ready is %v", code, b.ready())
	}
}
