// Package brokertest runs a real broker in memory, for tests of its clients: real gRPC over real TLS, real rules and a
// real cache. The test sets the pods, and the sessions of STS.
package brokertest

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc/test/bufconn"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
)

// Name is the host name that the broker's certificate is for.
const Name = "credence-broker.credence.svc"

// STS is a double of STS: it returns the sessions that the test chooses.
type STS func(ctx context.Context, grant policy.Grant) (credential.Credential, error)

// Credential implements credential.Source.
func (s STS) Credential(ctx context.Context, grant policy.Grant) (credential.Credential, error) {
	return s(ctx, grant)
}

// Pod is a live pod and its token.
type Pod struct {
	Token       string
	Identity    identity.Pod
	Annotations map[string]string
	// Namespace defaults to an opted-in namespace that permits all roles.
	Namespace policy.Namespace
}

// Broker is a running broker. It stops when the test ends.
type Broker struct {
	listener *bufconn.Listener
	served   *broker.Broker
	roots    *certs.Roots
	stop     context.CancelFunc
	ended    chan struct{}
	keys     policy.Keys

	mu     sync.Mutex
	pods   map[string]Pod // :: token → pod; guarded by mu
	panics bool           // guarded by mu
}

// Start starts a broker whose sessions come from sts. It completes role names to roles of account 123456789012. adjust
// may change the configuration.
func Start(t testing.TB, sts STS, audited io.Writer, adjust ...func(*broker.Config, *broker.ServerConfig)) *Broker {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	ca := certstest.NewCA(t)
	certFile, keyFile := ca.Leaf(Name).WriteTo(t.TempDir())
	pair, err := certs.NewKeyPair(certFile, keyFile, log)
	must(t, err)
	roots, err := certs.NewRoots(ca.WriteTo(t.TempDir()), log)
	must(t, err)
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	must(t, err)
	base, err := credential.BaseOf("aws", "123456789012")
	must(t, err)
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	must(t, err)
	sessions, err := cache.New(cache.Config[policy.Grant]{Source: sts, Logger: log})
	must(t, err)
	decisions, err := audit.New(audit.Config{Writer: audited, Logger: log})
	must(t, err)
	b := &Broker{listener: bufconn.Listen(1 << 20), roots: roots, pods: make(map[string]Pod), keys: keys}
	cfg := broker.Config{
		Verifier: b, Binder: b, Rules: rules, Sessions: sessions, Audit: decisions, Region: "eu-central-1", Logger: log,
	}
	server := broker.ServerConfig{Listener: b.listener, TLS: certs.ServerConfig(pair), Ready: func() bool { return true }, Logger: log}
	for _, change := range adjust {
		change(&cfg, &server)
	}
	served, err := broker.New(cfg)
	must(t, err)
	b.served = served

	// As in the program, the server drains before its dependencies stop.
	work, stopWork := context.WithCancel(context.WithoutCancel(t.Context()))
	serving, stop := context.WithCancel(work)
	b.stop, b.ended = stop, make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() { _ = sessions.Run(work) })
	running.Go(func() { _ = decisions.Run(work) })
	go func() {
		defer close(b.ended)
		_ = served.Serve(serving, server)
		stopWork()
		running.Wait()
	}()
	t.Cleanup(func() {
		stop()
		_ = b.listener.Close()
		<-b.ended
	})
	return b
}

// Stop shuts the broker down. The channel is closed when it has stopped.
func (b *Broker) Stop() (ended <-chan struct{}) {
	b.stop()
	return b.ended
}

// Set makes p a live pod: from now on the broker accepts its token.
func (b *Broker) Set(p Pod) {
	if p.Namespace.Name == "" {
		p.Namespace = policy.Namespace{
			Name:        p.Identity.Namespace,
			Labels:      map[string]string{policy.DefaultPrefix + "/" + string(policy.Inject): policy.Enabled},
			Annotations: map[string]string{policy.DefaultPrefix + "/" + string(policy.Permitted): ".*"},
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pods[p.Token] = p
}

// PanicOnBind makes each later call panic inside the broker.
func (b *Broker) PanicOnBind() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.panics = true
}

// Connections returns the statistics of the broker's connections.
func (b *Broker) Connections() connlimit.Stats { return b.served.Connections() }

// Dial connects to the broker. It does not work if adjust has set another listener.
func (b *Broker) Dial(ctx context.Context, _ string) (net.Conn, error) {
	return b.listener.DialContext(ctx)
}

// ClientTLS returns a TLS configuration that trusts the broker.
func (b *Broker) ClientTLS() *tls.Config { return certs.ClientConfig(b.roots, Name) }

// Verify implements identity.Verifier.
func (b *Broker) Verify(_ context.Context, token identity.UnverifiedToken) (identity.Pod, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	pod, ok := b.pods[token.Reveal()]
	if !ok {
		return identity.Pod{}, credential.Errorf(credential.ErrUnauthenticated, credential.ReasonTokenInvalid, "the token is unknown to this test")
	}
	return pod.Identity, nil
}

// Bind implements broker.Binder.
func (b *Broker) Bind(_ context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.panics {
		panic("PanicOnBind was called")
	}
	for _, p := range b.pods {
		if p.Identity == id {
			return policy.Pod{
				Namespace: id.Namespace, Name: id.Name, UID: id.UID, ServiceAccount: id.ServiceAccount, Request: b.keys.Request(p.Annotations),
			}, p.Namespace, nil
		}
	}
	return policy.Pod{}, policy.Namespace{}, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "pod %s does not exist", id)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
