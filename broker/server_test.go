package broker_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/brokertest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// A broker that is told to end says so first, answers what it was asked before, and then ends.
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
		t.Fatal("the broker has ended while a call was under way")
	case err := <-answered:
		t.Fatalf("a call that STS has not answered ended with %v", err)
	default:
	}
	close(release)
	if err := <-answered; err != nil {
		t.Errorf("the call that was under way ended with %v", err)
	}
	<-ended
}
