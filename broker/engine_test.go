package broker_test

import (
	"cmp"
	"context"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

const (
	account = "123456789012"
	life    = time.Hour
)

func arnOf(role string) string { return "arn:aws:iam::" + account + ":role/" + role }

// engine is a whole broker without its sockets: the policy and the cache of the program, and pods that the test makes. It runs
// in a synctest bubble, so a day takes a second.
type engine struct {
	t        *testing.T
	sts      *ststest.Server // nil if the source is another one
	broker   *broker.Broker
	sessions *cache.Cache[policy.Grant]
	prefetch *broker.Prefetch
	keys     policy.Keys

	mu      sync.Mutex
	pods    map[string]policy.Pod // :: NAMESPACE/NAME → live pod; guarded by mu
	warned  []string              // reported, as POD: WARNINGS; guarded by mu
	refused []*credential.Error   // reported; guarded by mu

	unavailable []string // reported, as POD: REASON; guarded by mu
}

// newEngine returns an engine that calls an STS over HTTP as the program does.
func newEngine(t *testing.T, stsConfig ststest.Config, cacheConfig cache.Config[policy.Grant]) *engine {
	t.Helper()
	server, err := ststest.StartInMemory(t.Context(), stsConfig)
	fatal(t, err)
	keyID, secret := server.Keys()
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": keyID, "AWS_SECRET_ACCESS_KEY": secret.Reveal(), "AWS_SESSION_TOKEN": "",
		"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true",
	} {
		t.Setenv(name, value)
	}
	source, err := assume.New(t.Context(), assume.Config{Region: "eu-central-1", Endpoint: server.URL(), Dial: server.Dial})
	fatal(t, err)
	t.Cleanup(server.Close)
	cacheConfig.Source = source
	e := newEngineOn(t, cacheConfig)
	e.sts = server
	return e
}

// newEngineOn returns an engine with the configured source. It runs until the test ends.
func newEngineOn(t *testing.T, cacheConfig cache.Config[policy.Grant]) *engine {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	cacheConfig.Logger = log
	e := &engine{t: t, pods: make(map[string]policy.Pod)}
	impairments, err := broker.NewImpairments(broker.ImpairmentsConfig{
		Impaired: func(broker.Impairment) {}, Recovered: func(broker.Impairment) {}, Logger: log,
	})
	fatal(t, err)
	cacheConfig.Source = impairments.Source(cacheConfig.Source)
	e.sessions, err = cache.New(cacheConfig)
	fatal(t, err)
	e.keys, err = policy.NewKeys(policy.DefaultPrefix)
	fatal(t, err)
	base, err := credential.BaseOf("aws", account)
	fatal(t, err)
	rules, err := policy.New(policy.Config{Keys: e.keys, Base: base})
	fatal(t, err)
	decisions, err := audit.New(audit.Config{Writer: io.Discard, Logger: log})
	fatal(t, err)
	e.broker, err = broker.New(broker.Config{
		Verifier: e, Binder: e, Rules: rules, Sessions: e.sessions, Audit: decisions, Logger: log,
		Observers: []broker.Observer{broker.ReportTo(e, func(identity.Pod) bool { return false }, impairments)},
	})
	fatal(t, err)
	e.prefetch, err = broker.NewPrefetch(broker.PrefetchConfig{Lookup: e.lookup, Sessions: e.sessions, Logger: log})
	fatal(t, err)

	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, run := range []func(context.Context) error{
		e.sessions.Run, func(ctx context.Context) error { return e.prefetch.Run(ctx, rules) }, decisions.Run, impairments.Run,
	} {
		running.Go(func() { _ = run(ctx) })
	}
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return e
}

// Refused implements [broker.Events].
func (e *engine) Refused(_ policy.Pod, refusal *credential.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refused = append(e.refused, refusal)
}

// Unavailable implements [broker.Events].
func (e *engine) Unavailable(pod policy.Pod, failure *credential.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unavailable = append(e.unavailable, pod.Name+": "+string(failure.Reason))
}

// Shadowed implements [broker.Events].
func (e *engine) Shadowed(pod policy.Pod, warnings string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.warned = append(e.warned, pod.Name+": "+warnings)
}

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pod starts a pod with annotations given as key, value, ….
func (e *engine) pod(namespace, name string, annotations ...string) string {
	all := map[string]string{}
	for pair := range slices.Chunk(annotations, 2) {
		all[policy.DefaultPrefix+"/"+pair[0]] = pair[1]
	}
	pod := policy.Pod{Namespace: namespace, Name: name, UID: "uid of " + namespace + "/" + name, ServiceAccount: "default", Request: e.keys.Request(all)}
	key := namespace + "/" + name
	e.mu.Lock()
	e.pods[key] = pod
	e.mu.Unlock()
	e.prefetch.Changed(key)
	return key
}

// end removes a pod, as the watch does when it is gone.
func (e *engine) end(key string) {
	e.mu.Lock()
	delete(e.pods, key)
	e.mu.Unlock()
	e.prefetch.Changed(key)
}

func (e *engine) lookup(key string) (policy.Pod, policy.Namespace, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	pod, ok := e.pods[key]
	return pod, policy.Namespace{
		Name:        pod.Namespace,
		Labels:      map[string]string{policy.DefaultPrefix + "/" + string(policy.Inject): policy.Enabled},
		Annotations: map[string]string{policy.DefaultPrefix + "/" + string(policy.Permitted): ".*"},
	}, ok
}

// Verify implements identity.Verifier: a pod's token is its key.
func (e *engine) Verify(_ context.Context, token identity.UnverifiedToken) (identity.Pod, error) {
	namespace, name, _ := strings.Cut(token.Reveal(), "/")
	return identity.Pod{Namespace: namespace, Name: name}, nil
}

// Bind implements broker.Binder.
func (e *engine) Bind(_ context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	pod, ns, ok := e.lookup(id.String())
	if !ok {
		return pod, ns, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "pod %s is gone", id)
	}
	return pod, ns, nil
}

// get calls as the sidecar of a pod does.
func (e *engine) get(ctx context.Context, key string) (*brokerpb.GetCredentialsResponse, error) {
	ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", "Bearer "+key))
	answer, err := e.broker.GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
	if err != nil {
		return nil, brokerpb.FromError(err)
	}
	return answer, nil
}

// mustGet is get for a pod that must get a valid session.
func (e *engine) mustGet(key string) *brokerpb.GetCredentialsResponse {
	e.t.Helper()
	answer, err := e.get(e.t.Context(), key)
	if err != nil {
		e.t.Errorf("pod %s gets no session: %v", key, err)
		return nil
	}
	if left := time.Until(answer.GetExpiration().AsTime()); left <= 0 {
		e.t.Errorf("pod %s gets a session that expired %s ago", key, -left)
	}
	return answer
}

// assumed returns the number of AssumeRole calls.
func (e *engine) assumed() int { return e.sts.Count("AssumeRole", "") }

// plainSTS responds after a delay, and records when it was called. Tens of thousands of calls cost little, if a test does not
// need the wire.
type plainSTS struct {
	latency time.Duration

	mu    sync.Mutex
	calls []time.Time // guarded by mu
}

// Credential implements credential.Source.
func (s *plainSTS) Credential(ctx context.Context, g policy.Grant) (credential.Credential, error) {
	s.mu.Lock()
	s.calls = append(s.calls, time.Now())
	s.mu.Unlock()
	select {
	case <-time.After(s.latency):
		return session(ctx, g)
	case <-ctx.Done():
		return credential.Credential{}, ctx.Err()
	}
}

func (s *plainSTS) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.calls)
}

// perSecond returns how many calls began in the busiest second.
func (s *plainSTS) perSecond() (busiest int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := 0
	for i, at := range s.calls {
		for at.Sub(s.calls[first]) >= time.Second {
			first++
		}
		busiest = max(busiest, i-first+1)
	}
	return busiest
}

// allowed is how many calls may begin within a second: the rate and a full burst.
func allowed(cfg cache.Config[policy.Grant]) int {
	return int(cmp.Or(cfg.Rate, cache.DefaultRate)) + cmp.Or(cfg.Concurrency, 64)
}
