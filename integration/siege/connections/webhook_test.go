package connections

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
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

// namespaces has one for every name, which is not opted in.
type namespaces struct{}

func (namespaces) Namespace(_ context.Context, name string) (policy.Namespace, error) {
	return policy.Namespace{Name: name}, nil
}

func (n namespaces) Latest(ctx context.Context, name string) (policy.Namespace, error) {
	return n.Namespace(ctx, name)
}

// startWebhook starts a webhook on a TCP port of loopback, and returns it with what clients need.
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
			t.Logf("attacks were cut off: %v", err)
		}
	})
	return server, l, certs.ClientConfig(roots, "webhook")
}

// apiServer is a client from an address as an API server is one: it keeps up to 25 idle connections, for 90 s.
func apiServer(t *testing.T, source string, cfg *tls.Config) *http.Client {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	transport := &http.Transport{
		TLSClientConfig: cfg, DialContext: dialer.DialContext, MaxIdleConnsPerHost: 25, IdleConnTimeout: 90 * time.Second,
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
		err = fmt.Errorf("answered %s: %s", response.Status, text)
	}
	return err
}

var webhookAttacks = []string{
	"silence after the handshake", "an idle connection", "a head without end", "a large head without end", "many headers without end",
	"a body that does not come", "a ClientHello without end", "a long ClientHello without end",
}

// TestMemoryOfWebhookConnections measures what one connection holds besides reviews, in each attack that is known.
func TestMemoryOfWebhookConnections(t *testing.T) {
	for _, name := range webhookAttacks {
		t.Run(name, func(t *testing.T) {
			s, l, _ := startWebhook(t)
			alpn := "http/1.1"
			if strings.Contains(name, "ClientHello") {
				alpn = ""
			}
			refused := func() bool { return s.Connections().Closed[connlimit.Flood] > 0 }
			got := perConnection(t, l, alpn, name, 48, refused)
			t.Logf("%d bytes a connection; 0: the webhook closes such connections", got)
			if got > allowance(webhook.HeldPerConnection) {
				t.Errorf("a connection holds %d bytes of a webhook; its bounds are made for %d", got, webhook.HeldPerConnection)
			}
		})
	}
}

// TestWebhookLimits: what clients can make a webhook hold, all bounds together, is a quarter of the memory that it has.
func TestWebhookLimits(t *testing.T) {
	if limit := memoryLimit(t, "webhook"); webhook.MaxHeldUnauthenticated > limit/4 {
		t.Errorf("clients can make a webhook hold %d bytes; a quarter of its memory limit is %d", webhook.MaxHeldUnauthenticated, limit/4)
	}
}

// TestReviewsBesideAttackers: while four addresses hold as many connections as they can, an API server's reviews are
// answered, over connections that it keeps and new ones.
func TestReviewsBesideAttackers(t *testing.T) {
	for _, name := range []string{"silence after the handshake", "an idle connection", "a head without end", "a body without end", "connecting again"} {
		t.Run(name, func(t *testing.T) {
			s, l, cfg := startWebhook(t)
			kept := apiServer(t, "127.0.0.6", cfg)
			if err := reviewOnce(t.Context(), kept, l); err != nil {
				t.Fatal(err)
			}
			n := 150
			if name == "connecting again" {
				n = 8
			}
			a := startAttack(t, l.Addr().String(), "http/1.1", name, fourAddresses, n)
			until(t, func() bool {
				return s.Connections().Closed[connlimit.Crowded]+uint64(s.Connections().Waiting) > 0 || n == 8 && a.Opened() > 100
			})
			for range 10 {
				var running sync.WaitGroup
				for range 8 {
					running.Go(func() {
						if err := reviewOnce(t.Context(), kept, l); err != nil {
							t.Errorf("a review: %v", err)
						}
					})
				}
				running.Wait()
				if err := reviewOnce(t.Context(), apiServer(t, "127.0.0.7", cfg), l); err != nil {
					t.Errorf("a review over a new connection: %v", err)
				}
			}
			t.Logf("the webhook's state is %+v", s.Connections())
		})
	}
}
