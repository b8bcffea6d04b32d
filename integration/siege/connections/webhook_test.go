package connections

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/webhook"
	"github.com/credence-iam/credence/webhook/inject"
)

// namespaces has a namespace of every name, which is not opted in.
type namespaces struct{}

func (namespaces) Namespace(_ context.Context, name string) (policy.Namespace, error) {
	return policy.Namespace{Name: name}, nil
}

func (n namespaces) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	return n.Namespace(ctx, name)
}

// startWebhook starts a webhook on a TCP port of loopback, and returns it with its clients' TLS configuration.
func startWebhook(t *testing.T) (*webhook.Server, *counted, *tls.Config) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	must(err)
	injector, err := inject.New(inject.Config{Keys: keys, Image: "registry.example/credence-sidecar:v1", Broker: "broker:9443", Settings: inject.DefaultSettings()})
	must(err)
	base, err := credential.BaseOf("aws", "123456789012")
	must(err)
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	must(err)
	ca := certstest.NewCA(t)
	certFile, keyFile := ca.Leaf("webhook").WriteTo(t.TempDir())
	pair, err := certs.NewKeyPair(certFile, keyFile, nil)
	must(err)
	roots, err := certs.NewRoots(ca.WriteTo(t.TempDir()), nil)
	must(err)
	server, err := webhook.New(webhook.Config{Injector: injector, Rules: rules, Namespaces: namespaces{}, KeyPair: pair, DrainDelay: time.Millisecond})
	must(err)
	l := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Logf("the webhook closed attacking connections: %v", err)
		}
	})
	return server, l, certs.ClientConfig(roots, "webhook")
}

// apiServer is an API server's client, from an address: it keeps up to 25 idle connections for 90 s.
func apiServer(t *testing.T, source string, cfg *tls.Config) *http.Client {
	t.Helper()
	transport := &http.Transport{
		TLSClientConfig: cfg, DialContext: from(source).DialContext, MaxIdleConnsPerHost: 25, IdleConnTimeout: 90 * time.Second,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func reviewOnce(ctx context.Context, client *http.Client, l *counted) error {
	const review = `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","operation":"CREATE",` +
		`"kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},"namespace":"shop",` +
		`"object":{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"c","image":"i"}]}}}}`
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+l.Addr().String()+"/mutate", strings.NewReader(review))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != http.StatusOK || !strings.Contains(string(text), `"allowed":true`)) {
		err = fmt.Errorf("the webhook responds %s: %s", response.Status, text)
	}
	return err
}

// TestMemoryOfWebhookConnections measures the memory of one connection without reviews, in each known attack.
func TestMemoryOfWebhookConnections(t *testing.T) {
	for _, step := range []string{
		"silence after the handshake", "an idle connection", "a head without end", "a large head without end", "many headers without end",
		"a body that does not come", "a ClientHello without end", "a long ClientHello without end",
	} {
		t.Run(step, func(t *testing.T) {
			s, l, _ := startWebhook(t)
			checkMemory(t, l, "http/1.1", step, s.Connections, webhook.HeldPerConnection)
		})
	}
}

// TestReviewsBesideAttackers checks that an API server's reviews succeed, over open and over new connections, while four
// addresses hold as many connections as they can.
func TestReviewsBesideAttackers(t *testing.T) {
	for step, connections := range map[string]int{ // of each address
		"silence after the handshake": 150,
		"an idle connection":          150,
		"a head without end":          150,
		"a body without end":          150,
		"connecting again":            8,
	} {
		t.Run(step, func(t *testing.T) {
			s, l, cfg := startWebhook(t)
			open := apiServer(t, "127.0.0.6", cfg)
			if err := reviewOnce(t.Context(), open, l); err != nil {
				t.Fatal(err)
			}
			a := startAttack(t, l, "http/1.1", step, attackers, connections)
			until(t, func() bool {
				state := s.Connections()
				return state.Closed[connlimit.Crowded]+uint64(state.Waiting) > 0 || connections == 8 && a.Opened() > 100
			})
			for range 10 {
				var running sync.WaitGroup
				for range 8 {
					running.Go(func() {
						if err := reviewOnce(t.Context(), open, l); err != nil {
							t.Errorf("a review: %v", err)
						}
					})
				}
				running.Wait()
				if err := reviewOnce(t.Context(), apiServer(t, "127.0.0.7", cfg), l); err != nil {
					t.Errorf("a review over a new connection: %v", err)
				}
			}
			t.Logf("the webhook: %+v", s.Connections())
		})
	}
}
