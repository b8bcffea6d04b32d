package connections

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/brokertest"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/webhook"
)

// session stands in for STS.
func session(context.Context, policy.Grant) (credential.Credential, error) {
	return credential.Credential{
		AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: credential.NewSecret("secret"), SessionToken: credential.NewSecret("token"),
		Expiration: time.Now().Add(time.Hour),
	}, nil
}

// startBroker starts a broker on a TCP port of loopback.
func startBroker(t *testing.T, sts brokertest.STS) (*brokertest.Broker, *counted) {
	t.Helper()
	l := listen(t)
	b := brokertest.Start(t, sts, io.Discard, func(_ *broker.Config, s *broker.ServerConfig) { s.Listener = l })
	return b, l
}

// newCaller makes a pod with this number, and returns its sidecar's client, which calls from 127.0.0.6.
func newCaller(t *testing.T, b *brokertest.Broker, l *counted, number int) *client.Client {
	t.Helper()
	name := fmt.Sprintf("shop-%d", number)
	b.Set(brokertest.Pod{
		Token:       name,
		Identity:    identity.Pod{Namespace: "shop", Name: name, UID: "uid-" + name, ServiceAccount: "default"},
		Annotations: map[string]string{"iam.amazonaws.com/role": "cart"},
	})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(name), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{
		Target: brokertest.Name + ":9443", TLS: b.ClientTLS(), TokenFile: file,
		Lookup: func(context.Context, string, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
		},
		Dial: func(ctx context.Context, _ string) (net.Conn, error) {
			return from("127.0.0.6").DialContext(ctx, "tcp", l.Addr().String())
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// from dials from an address.
func from(address string) *net.Dialer {
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
}

// TestPodBesideAttackers checks that the calls of a pod succeed while four other addresses hold as many connections as
// they can.
func TestPodBesideAttackers(t *testing.T) {
	for step, connections := range map[string]int{ // of each address
		"silence after SETTINGS": 150,
		"an open call":           150,
		"many headers":           150,
		"one byte a time":        150,
		"calls by nobody":        150,
		"connecting again":       8,
		"resets":                 8,
	} {
		t.Run(step, func(t *testing.T) {
			b, l := startBroker(t, session)
			pod := newCaller(t, b, l, 1)
			a := startAttack(t, l, "h2", step, attackers, connections)
			until(t, func() bool {
				return b.Connections().Closed[connlimit.Crowded] > 0 || connections == 8 && a.Opened() > 100
			})
			var longest time.Duration
			for i := range 20 {
				began := time.Now()
				if _, err := pod.Credentials(t.Context()); err != nil {
					t.Fatalf("call %d failed beside %d attacking connections: %v", i, a.Opened(), err)
				}
				longest = max(longest, time.Since(began))
			}
			t.Logf("the longest of 20 calls took %s; attackers opened %d connections; the broker: %+v", longest, a.Opened(), b.Connections())
		})
	}
}

// TestNodeOfPods checks that all pods of a node can start at once, also beside attackers. Some networks hide all pods of a
// node behind one address.
func TestNodeOfPods(t *testing.T) {
	const pods = 250 // Kubernetes supports 110, and some platforms 250
	for name, attacked := range map[string]bool{"alone": false, "beside attackers": true} {
		t.Run(name, func(t *testing.T) {
			b, l := startBroker(t, session)
			node := make([]*client.Client, pods)
			for i := range node {
				node[i] = newCaller(t, b, l, i)
			}
			if attacked {
				startAttack(t, l, "h2", "silence after SETTINGS", attackers, 150)
				until(t, func() bool { return b.Connections().Closed[connlimit.Crowded] > 0 })
			}
			var repeated atomic.Int32
			var running sync.WaitGroup
			for _, pod := range node {
				running.Go(func() {
					for try := 1; ; try++ { // sidecars retry, and this machine may be slow
						_, err := pod.Credentials(t.Context())
						if err == nil {
							return
						}
						if repeated.Add(1); !attacked || try == 20 {
							t.Errorf("a starting pod: %v", err)
							return
						}
						time.Sleep(time.Second)
					}
				})
			}
			running.Wait()
			t.Logf("%d calls were repeated; the broker: %+v", repeated.Load(), b.Connections())
		})
	}
}

// TestColdPods checks that callers that wait for STS do not count as unknown callers: the broker serves more of them than
// there may be unknown callers.
func TestColdPods(t *testing.T) {
	const pods = 600
	release := make(chan struct{})
	b, l := startBroker(t, func(ctx context.Context, g policy.Grant) (credential.Credential, error) {
		<-release
		return session(ctx, g)
	})
	var running sync.WaitGroup
	for i := range pods {
		newCaller(t, b, l, i)
		conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(b.ClientTLS())))
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			defer conn.Close()
			ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", fmt.Sprint("Bearer shop-", i))
			_, err := brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{}, grpc.WaitForReady(true))
			if err != nil {
				t.Errorf("a waiting pod: %v", err)
			}
		})
	}
	until(t, func() bool { return b.Connections().Authenticated == pods })
	close(release)
	running.Wait()
}

// TestFloods checks that the broker closes connections with endless frames long before they cost anything.
func TestFloods(t *testing.T) {
	for _, step := range []string{"PING without end", "SETTINGS without end", "resets", "CONTINUATION without end"} {
		t.Run(step, func(t *testing.T) {
			_, l := startBroker(t, session)
			a := startAttack(t, l, "h2", step, []string{"127.0.0.1"}, 1)
			until(t, func() bool { return a.Opened() > 5 })
			a.Stop()
			if read := l.read.Load() / a.Opened(); read > 64<<10 {
				t.Errorf("the broker reads %d bytes of each connection", read)
			}
		})
	}
}

// TestLimits compares the memory that all limits together allow with the memory limits of the chart. Unknown callers
// can make a server use a quarter, and all callers of a broker three quarters.
func TestLimits(t *testing.T) {
	brokerLimit, webhookLimit, err := stack.ChartMemory()
	if err != nil {
		t.Fatal(err)
	}
	if broker.MaxHeldUnauthenticated > brokerLimit/4 {
		t.Errorf("unknown callers can make a broker use %d bytes; a quarter of its memory limit is %d", broker.MaxHeldUnauthenticated, brokerLimit/4)
	}
	if broker.MaxHeld > brokerLimit/4*3 {
		t.Errorf("all callers can make a broker use %d bytes; three quarters of its memory limit are %d", broker.MaxHeld, brokerLimit/4*3)
	}
	if webhook.MaxHeldUnauthenticated > webhookLimit/4 {
		t.Errorf("clients can make a webhook use %d bytes; a quarter of its memory limit is %d", webhook.MaxHeldUnauthenticated, webhookLimit/4)
	}
}

// TestMemoryOfBrokerConnections measures the memory of one connection before a handler runs, in each known attack.
func TestMemoryOfBrokerConnections(t *testing.T) {
	for _, step := range []string{
		"silence after the handshake", "silence after SETTINGS", "an open call", "large headers", "large headers twice", "large headers in 16 streams",
		"everything at once", "many headers", "many headers in 16 streams", "a message in crumbs", "a ClientHello without end", "a long ClientHello without end",
	} {
		t.Run(step, func(t *testing.T) {
			b, l := startBroker(t, session)
			checkMemory(t, l, "h2", step, b.Connections, broker.HeldPerConnection)
		})
	}
}

// TestProbesBesideAttackers checks that a kubelet's probes succeed while four addresses hold as many connections as they
// can.
func TestProbesBesideAttackers(t *testing.T) {
	for _, step := range []string{"silence after the handshake", "an idle connection", "many headers without end", "connecting again"} {
		t.Run(step, func(t *testing.T) {
			l := listen(t)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- admin.Serve(ctx, l, admin.Handler(nil)) }()
			t.Cleanup(func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
			a := startAttack(t, l, "", step, attackers, 50)
			until(t, func() bool { return a.Opened() > 200 })
			client := &http.Client{Transport: &http.Transport{DialContext: from("127.0.0.6").DialContext, DisableKeepAlives: true}} // as kubelets do
			for range 50 {
				response, err := client.Get("http://" + l.Addr().String() + "/healthz") //nolint:noctx // The test's time is its limit.
				if err != nil {
					t.Fatalf("a probe: %v", err)
				}
				_, _ = io.Copy(io.Discard, response.Body)
				_ = response.Body.Close()
				if response.StatusCode != http.StatusOK {
					t.Errorf("a probe has status %s", response.Status)
				}
			}
			if open := l.open.Load(); open > 200 {
				t.Errorf("%d connections are open", open)
			}
		})
	}
}
