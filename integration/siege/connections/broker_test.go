package connections

import (
	"context"
	"fmt"
	"io"
	"net"
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
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/brokertest"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/siege/attack"
)

// session is what the stand-in for STS gives.
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

// caller is a pod with a token of its own, and the client that its sidecar has.
type caller struct{ *client.Client }

// newCaller makes a pod of that number in a namespace, whose calls come from an address.
func newCaller(t *testing.T, b *brokertest.Broker, l *counted, source, namespace string, number int) caller {
	t.Helper()
	name := fmt.Sprintf("%s-%d", namespace, number)
	b.Set(brokertest.Pod{
		Token:       name,
		Identity:    identity.Pod{Namespace: namespace, Name: name, UID: "uid-" + name, ServiceAccount: "default"},
		Annotations: map[string]string{"iam.amazonaws.com/role": "cart"},
	})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(name), 0o600); err != nil {
		t.Fatal(err)
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	c, err := client.New(client.Config{
		Target: brokertest.Name + ":9443", TLS: b.ClientTLS(), TokenFile: file,
		Lookup: func(context.Context, string, string) ([]netip.Addr, error) {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
		},
		Dial: func(ctx context.Context, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", l.Addr().String())
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return caller{c}
}

// until waits for a condition, which the test's own time limit bounds.
func until(t *testing.T, condition func() bool) {
	t.Helper()
	for !condition() {
		if t.Context().Err() != nil {
			t.Fatal("the test has ended")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestPodBesideAttackers: while four addresses hold as many connections as they can, the calls of a fifth are answered.
func TestPodBesideAttackers(t *testing.T) {
	for name, connections := range map[string]int{ // of each address
		"silence after SETTINGS": 150,
		"an open call":           150,
		"many headers":           150,
		"one byte a time":        150,
		"calls by nobody":        150,
		"connecting again":       8,
		"resets":                 8,
	} {
		t.Run(name, func(t *testing.T) {
			b, l := startBroker(t, session)
			pod := newCaller(t, b, l, "127.0.0.6", "shop", 1)
			a := startAttack(t, l.Addr().String(), "h2", name, fourAddresses, connections)
			until(t, func() bool {
				return b.Connections().Closed[connlimit.Crowded] > 0 || connections == 8 && a.Opened() > 100
			})
			var longest time.Duration
			for i := range 20 {
				began := time.Now()
				if _, err := pod.Credentials(t.Context()); err != nil {
					t.Fatalf("call %d, beside %d connections that attack: %v", i, a.Opened(), err)
				}
				longest = max(longest, time.Since(began))
			}
			t.Logf("the longest of 20 calls took %s; attackers opened %d connections; the broker's state is %+v", longest, a.Opened(), b.Connections())
		})
	}
}

// TestNodeOfPods: some networks hide all pods of a node behind one address. They may all start at once, and beside attackers.
func TestNodeOfPods(t *testing.T) {
	const pods = 250 // Kubernetes supports 110, and some platforms 250
	for name, attacked := range map[string]bool{"alone": false, "beside attackers": true} {
		t.Run(name, func(t *testing.T) {
			b, l := startBroker(t, session)
			node := make([]caller, pods)
			for i := range node {
				node[i] = newCaller(t, b, l, "127.0.0.6", "shop", i)
			}
			if attacked {
				startAttack(t, l.Addr().String(), "h2", "silence after SETTINGS", fourAddresses, 150)
				until(t, func() bool { return b.Connections().Closed[connlimit.Crowded] > 0 })
			}
			var repeated atomic.Int32
			var running sync.WaitGroup
			for _, pod := range node {
				running.Go(func() {
					for try := 1; ; try++ { // sidecars go on trying, and this machine may be slow
						_, err := pod.Credentials(t.Context())
						if err == nil {
							return
						}
						if repeated.Add(1); !attacked || try == 20 {
							t.Errorf("a pod of a node that starts: %v", err)
							return
						}
						time.Sleep(time.Second)
					}
				})
			}
			running.Wait()
			t.Logf("%d calls were repeated; the broker's state is %+v", repeated.Load(), b.Connections())
		})
	}
}

// TestColdPods: callers that wait for STS are known, and do not count with those that are not: more of them than there may be
// unknown ones are served.
func TestColdPods(t *testing.T) {
	const pods = 600
	release := make(chan struct{})
	b, l := startBroker(t, func(ctx context.Context, g policy.Grant) (credential.Credential, error) {
		<-release
		return session(ctx, g)
	})
	var running sync.WaitGroup
	for i := range pods {
		newCaller(t, b, l, "127.0.0.6", "shop", i)
		conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(b.ClientTLS())))
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			defer conn.Close()
			ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", fmt.Sprint("Bearer shop-", i))
			_, err := brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{}, grpc.WaitForReady(true))
			if err != nil {
				t.Errorf("a cold pod: %v", err)
			}
		})
	}
	until(t, func() bool { return b.Connections().Authenticated == pods })
	close(release)
	running.Wait()
}

// TestFloods: frames without end are cut off, long before they cost anything.
func TestFloods(t *testing.T) {
	for name, step := range map[string]attack.Step{
		"PING": attack.Pings, "SETTINGS": attack.Settings, "resets": attack.Resets, "CONTINUATION": attack.Continuations,
	} {
		t.Run(name, func(t *testing.T) {
			_, l := startBroker(t, session)
			ctx, cancel := context.WithCancel(t.Context())
			var count attack.Count
			var running sync.WaitGroup
			running.Go(func() {
				attack.Run(ctx, attack.Target{Address: l.Addr().String(), TLS: attack.AnyServer("h2")}, 1, step, &count)
			})
			until(t, func() bool { return count.Opened() > 5 })
			cancel()
			running.Wait()
			if read := l.read.Load() / count.Opened(); read > 64<<10 {
				t.Errorf("of each connection the broker reads %d bytes", read)
			}
		})
	}
}

// TestBrokerLimits: unknown callers can make a broker hold a quarter of the memory that it has, all bounds together, and
// all callers three quarters.
func TestBrokerLimits(t *testing.T) {
	limit := memoryLimit(t, "broker")
	if broker.MaxHeldUnauthenticated > limit/4 {
		t.Errorf("unknown callers can make a broker hold %d bytes; a quarter of its memory limit is %d", broker.MaxHeldUnauthenticated, limit/4)
	}
	if broker.MaxHeld > limit/4*3 {
		t.Errorf("all callers can make a broker hold %d bytes; three quarters of its memory limit are %d", broker.MaxHeld, limit/4*3)
	}
}

// TestMemoryOfBrokerConnections measures what one connection holds before a handler runs, in each attack that is known.
func TestMemoryOfBrokerConnections(t *testing.T) {
	for _, name := range []string{
		"silence after the handshake", "silence after SETTINGS", "an open call", "large headers", "large headers twice", "large headers in 16 streams",
		"everything at once", "many headers", "many headers in 16 streams", "a message in crumbs", "a ClientHello without end", "a long ClientHello without end",
	} {
		t.Run(name, func(t *testing.T) {
			b, l := startBroker(t, session)
			alpn := "h2"
			if name == "a ClientHello without end" || name == "a long ClientHello without end" {
				alpn = ""
			}
			refused := func() bool { return b.Connections().Closed[connlimit.Flood] > 0 }
			got := perConnection(t, l, alpn, name, 48, refused)
			if got == 0 {
				t.Log("the broker closes such connections")
			}
			t.Logf("%d bytes a connection", got)
			if got > allowance(broker.HeldPerConnection) {
				t.Errorf("a connection holds %d bytes of a broker; its bounds are made for %d", got, broker.HeldPerConnection)
			}
		})
	}
}
