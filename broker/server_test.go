package broker_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/brokertest"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// On shutdown a broker first reports unhealthy, finishes its running calls, and then ends.
func TestDrain(t *testing.T) {
	asked, release := make(chan struct{}), make(chan struct{})
	b := brokertest.Start(t, func(ctx context.Context, g policy.Grant) (credential.Credential, error) {
		close(asked)
		select {
		case <-release:
			return session(ctx, g)
		case <-ctx.Done():
			return credential.Credential{}, ctx.Err()
		}
	}, &lines{})
	b.Set(cart)
	dial := func() *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:///broker", grpc.WithContextDialer(b.Dial), grpc.WithTransportCredentials(credentials.NewTLS(b.ClientTLS())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	healthy := func(conn *grpc.ClientConn) healthpb.HealthCheckResponse_ServingStatus {
		answer, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			return healthpb.HealthCheckResponse_UNKNOWN
		}
		return answer.GetStatus()
	}
	looking := dial()
	for healthy(looking) != healthpb.HealthCheckResponse_SERVING {
		time.Sleep(10 * time.Millisecond)
	}

	answered := make(chan error, 1)
	go func() {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer cart-token")
		_, err := brokerpb.NewBrokerClient(dial()).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
		answered <- err
	}()
	<-asked
	ended := b.Stop()
	for healthy(looking) == healthpb.HealthCheckResponse_SERVING {
		time.Sleep(10 * time.Millisecond)
	}
	select {
	case <-ended:
		t.Fatal("the broker ended during a call")
	case err := <-answered:
		t.Fatalf("a call that waits for STS ended with %v", err)
	default:
	}
	close(release)
	if err := <-answered; err != nil {
		t.Errorf("the running call ended with %v", err)
	}
	<-ended
}

// drain reports unhealthy before the server stops accepting calls, and cuts calls off only if they take too long.
func TestDrainOrder(t *testing.T) {
	for name, tc := range map[string]struct {
		calls time.Duration // how long the running calls take
		want  []string
	}{
		"calls that end":        {5 * time.Second, []string{"say no", "finish", "ended"}},
		"calls that do not end": {time.Hour, []string{"say no", "finish", "cut off", "ended"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var did []string
				note := func(what string) {
					mu.Lock()
					defer mu.Unlock()
					did = append(did, what)
				}
				cut := make(chan struct{})
				began := time.Now()
				broker.Drain(
					func() { note("say no") },
					func() {
						note("finish")
						select {
						case <-time.After(tc.calls):
						case <-cut:
						}
						note("ended")
					},
					func() { note("cut off"); close(cut) },
				)
				if took := time.Since(began); !slices.Equal(did, tc.want) || took != min(tc.calls, broker.DrainTime) {
					t.Errorf("after %s it had done %q, want %q", took, did, tc.want)
				}
			})
		})
	}
}

// lives is a broker in a synctest bubble, which counts its connections.
type lives struct {
	*brokertest.Broker
	dialed atomic.Int32
}

func (l *lives) dial(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///broker", grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		l.dialed.Add(1)
		return l.Dial(ctx, addr)
	}), grpc.WithTransportCredentials(credentials.NewTLS(l.ClientTLS())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func callOn(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer cart-token")
	if _, err := brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Errorf("a call: %v", err)
	}
}

// The broker closes a connection in use after maxAge, so that clients see new brokers and new certificates, and an idle one
// soon.
func TestAgeOfConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &lives{Broker: brokertest.Start(t, session, &lines{})}
		b.Set(cart)
		conn := b.dial(t)
		began := time.Now()
		for b.dialed.Load() < 2 && time.Since(began) < time.Hour {
			callOn(t, conn)
			time.Sleep(time.Second)
		}
		// gRPC adds or subtracts a tenth.
		if took := time.Since(began); took < broker.MaxAge*9/10 || took > broker.MaxAge*11/10+2*time.Second {
			t.Errorf("a connection in use was closed after %s, want about %s", took, broker.MaxAge)
		}
		time.Sleep(broker.IdleTime + time.Second)
		if s := b.Connections(); s.Authenticated+s.Unauthenticated != 0 {
			t.Errorf("after an idle connection the state is %+v", s)
		}
	})
}

// The broker closes a connection without a request in time, whatever other frames arrive.
func TestTimeOfRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := brokertest.Start(t, session, &lines{})
		raw, err := b.Dial(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		cfg := b.ClientTLS()
		cfg.NextProtos = []string{"h2"}
		conn := tls.Client(raw, cfg)
		if err := conn.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		framer := http2.NewFramer(conn, conn)
		if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		if err := framer.WriteSettings(); err != nil {
			t.Fatal(err)
		}
		var talking sync.WaitGroup
		defer talking.Wait()
		talking.Go(func() {
			for framer.WriteSettingsAck() == nil { // A frame arrives all the time.
				time.Sleep(500 * time.Millisecond)
			}
		})
		for err == nil {
			_, err = framer.ReadFrame()
		}
		if took := time.Since(began); took != broker.RequestTime {
			t.Errorf("the connection was closed after %s, want %s", took, broker.RequestTime)
		}
	})
}

// The connections of unauthenticated callers, and those of one pod, are limited.
func TestConnectionBound(t *testing.T) {
	if got := connlimit.MaxOpen(broker.MaxUnauthenticated) * broker.HeldPerConnection; got != broker.MaxHeldUnauthenticated {
		t.Errorf("the product of the limits is %d, MaxHeldUnauthenticated is %d", got, broker.MaxHeldUnauthenticated)
	}
	release := make(chan struct{})
	listener := bufconn.Listen(64 << 10)
	b := brokertest.Start(t, func(ctx context.Context, g policy.Grant) (credential.Credential, error) {
		<-release
		return session(ctx, g)
	}, &lines{}, func(_ *broker.Config, s *broker.ServerConfig) { s.Listener = listener })
	b.Set(cart)
	dial := func() net.Conn {
		conn, err := listener.DialContext(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	var failed, waiting atomic.Int32
	var running sync.WaitGroup
	for range broker.MaxPerPod + 3 {
		conn, err := grpc.NewClient("passthrough:///broker", grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return dial(), nil }),
			grpc.WithTransportCredentials(credentials.NewTLS(b.ClientTLS())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		waiting.Add(1)
		running.Go(func() {
			defer waiting.Add(-1)
			ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer cart-token")
			_, err := brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
			if err != nil && credential.ReasonOf(brokerpb.FromError(err)) == credential.ReasonBrokerBusy {
				failed.Add(1)
			}
		})
	}
	for waiting.Load() > broker.MaxPerPod {
		time.Sleep(time.Millisecond)
	}
	if n := failed.Load(); n != 3 {
		t.Errorf("of %d calls of one pod, %d were refused because there were too many", broker.MaxPerPod+3, n)
	}
	for range broker.MaxUnauthenticated + broker.MaxWaiting + 10 {
		dial()
	}
	for b.Connections().Closed[connlimit.Crowded] == 0 {
		time.Sleep(time.Millisecond)
	}
	if s := b.Connections(); s.Unauthenticated > broker.MaxUnauthenticated || s.Waiting > broker.MaxWaiting || s.Authenticated != broker.MaxPerPod {
		t.Errorf("the broker's state is %+v", s)
	}
	close(release)
	running.Wait()
}
