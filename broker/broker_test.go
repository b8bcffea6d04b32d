package broker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/brokertest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// secret is in every session, and must appear in responses only.
const secret = "very/secret+key"

func session(_ context.Context, g policy.Grant) (credential.Credential, error) {
	return credential.Credential{
		AccessKeyID:     "ASIA" + strings.ToUpper(g.Role().Name()),
		SecretAccessKey: credential.NewSecret(secret),
		SessionToken:    credential.NewSecret(secret),
		Issued:          time.Now(),
		Expiration:      time.Now().Add(time.Hour),
	}, nil
}

// lines collects audit lines; tests read it while the broker writes.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// last waits for the nth line and returns it.
func (l *lines) last(t *testing.T, n int) audit.Entry {
	t.Helper()
	for {
		l.mu.Lock()
		text := l.buf.String()
		l.mu.Unlock()
		if all := strings.Split(strings.TrimSpace(text), "\n"); text != "" && len(all) >= n {
			var e audit.Entry
			if err := json.Unmarshal([]byte(all[n-1]), &e); err != nil {
				t.Fatalf("audit line %q: %v", all[n-1], err)
			}
			if strings.Contains(text, secret) {
				t.Fatalf("the audit log holds a secret: %s", text)
			}
			return e
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("the audit log has only %q", text)
		case <-time.After(time.Millisecond):
		}
	}
}

var cart = brokertest.Pod{
	Token:       "cart-token",
	Identity:    identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", ServiceAccountUID: "s-1"},
	Annotations: map[string]string{"iam.amazonaws.com/role": "cart"},
}

// call calls the broker with that metadata.
func call(t *testing.T, b *brokertest.Broker, md ...string) (*brokerpb.GetCredentialsResponse, error) {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///broker", grpc.WithContextDialer(b.Dial), grpc.WithTransportCredentials(credentials.NewTLS(b.ClientTLS())))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx := metadata.AppendToOutgoingContext(t.Context(), md...)
	return brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
}

func TestRespondsWithTheAnnotatedRole(t *testing.T) {
	var audited lines
	b := brokertest.Start(t, session, &audited)
	b.Set(cart)
	got, err := call(t, b, "authorization", "Bearer cart-token")
	if err != nil {
		t.Fatal(err)
	}
	if got.GetRoleArn() != "arn:aws:iam::123456789012:role/cart" || got.GetAccountId() != "123456789012" || got.GetAccessKeyId() != "ASIACART" ||
		got.GetSecretAccessKey() != secret || got.GetRegion() != "eu-central-1" {
		t.Errorf("the response has role %s, account %s, key %s, region %s", got.GetRoleArn(), got.GetAccountId(), got.GetAccessKeyId(), got.GetRegion())
	}
	// Between 0.45 and 0.5 of the hour are left when the sidecar calls again.
	if after := got.GetRefreshAfter().AsDuration(); after < 29*time.Minute || after > 33*time.Minute {
		t.Errorf("refresh after %s", after)
	}
	e := audited.last(t, 1)
	if e.Decision != audit.Allow || e.Pod != "cart-1" || e.AccessKeyID != "ASIACART" || e.Role != got.GetRoleArn() || e.Peer == "" {
		t.Errorf("the audit entry is %+v", e)
	}
}

func TestRegionOfThePodWins(t *testing.T) {
	b := brokertest.Start(t, session, &lines{})
	pod := cart
	pod.Annotations = map[string]string{"iam.amazonaws.com/role": "cart", "iam.amazonaws.com/region": "us-east-2"}
	b.Set(pod)
	got, err := call(t, b, "authorization", "bearer cart-token")
	if err != nil || got.GetRegion() != "us-east-2" {
		t.Errorf("region %q, error %v", got.GetRegion(), err)
	}
}

func TestRefusesAndAudits(t *testing.T) {
	unlabelled := cart
	unlabelled.Token, unlabelled.Identity.UID = "unlabelled", "u-2"
	unlabelled.Namespace = policy.Namespace{Name: "shop", Annotations: map[string]string{"iam.amazonaws.com/permitted": ".*"}}
	unpermitted := cart
	unpermitted.Token, unpermitted.Identity.UID = "unpermitted", "u-3"
	unpermitted.Namespace = policy.Namespace{Name: "shop", Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"}}

	tests := []struct {
		name     string
		metadata []string
		code     codes.Code
		reason   credential.Reason
	}{
		{"no token", nil, codes.Unauthenticated, credential.ReasonTokenMissing},
		{"two tokens", []string{"authorization", "Bearer cart-token", "authorization", "Bearer other"}, codes.Unauthenticated, credential.ReasonTokenMissing},
		{"other scheme", []string{"authorization", "Basic cart-token"}, codes.Unauthenticated, credential.ReasonTokenMissing},
		{"unknown token", []string{"authorization", "Bearer nonsense"}, codes.Unauthenticated, credential.ReasonTokenInvalid},
		{"namespace not opted in", []string{"authorization", "Bearer unlabelled"}, codes.PermissionDenied, credential.ReasonNamespaceNotOpted},
		{"nothing permitted", []string{"authorization", "Bearer unpermitted"}, codes.PermissionDenied, credential.ReasonNothingPermitted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var audited lines
			b := brokertest.Start(t, session, &audited)
			for _, p := range []brokertest.Pod{cart, unlabelled, unpermitted} {
				b.Set(p)
			}
			got, err := call(t, b, tt.metadata...)
			if got != nil || status.Code(err) != tt.code || credential.ReasonOf(brokerpb.FromError(err)) != tt.reason {
				t.Errorf("the response is there: %v, with %v", got != nil, err)
			}
			if e := audited.last(t, 1); e.Decision != audit.Deny || e.Reason != tt.reason || e.AccessKeyID != "" || e.Message == "" {
				t.Errorf("the audit entry is %+v", e)
			}
		})
	}
}

func TestCausesStayInside(t *testing.T) {
	b := brokertest.Start(t, func(context.Context, policy.Grant) (credential.Credential, error) {
		return credential.Credential{}, errors.New("dialing 10.1.2.3 with " + secret)
	}, &lines{})
	b.Set(cart)
	_, err := call(t, b, "authorization", "Bearer cart-token")
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "10.1.2.3") {
		t.Errorf("the call ended with %v", err)
	}
}

func TestPanicIsAnError(t *testing.T) {
	b := brokertest.Start(t, session, &lines{})
	pod := cart
	b.Set(pod)
	b.PanicOnBind()
	if _, err := call(t, b, "authorization", "Bearer cart-token"); status.Code(err) != codes.Internal {
		t.Errorf("the call ended with %v", err)
	}
}

func TestHealthIsChecked(t *testing.T) {
	b := brokertest.Start(t, session, &lines{})
	conn, err := grpc.NewClient("passthrough:///broker", grpc.WithContextDialer(b.Dial), grpc.WithTransportCredentials(credentials.NewTLS(b.ClientTLS())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	health := healthpb.NewHealthClient(conn)
	for { // the broker checks it four times a second
		answer, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if answer.GetStatus() == healthpb.HealthCheckResponse_SERVING {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	// A stream that any client may open would delay each drain.
	watch, err := health.Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a watch ended with %v", err)
	}
}

func TestCallerLearnsWhatTookSoLong(t *testing.T) {
	release := make(chan struct{})
	b := brokertest.Start(t, func(ctx context.Context, g policy.Grant) (credential.Credential, error) {
		select {
		case <-release:
			return session(ctx, g)
		case <-ctx.Done():
			return credential.Credential{}, ctx.Err()
		}
	}, &lines{})
	b.Set(cart)
	conn, err := grpc.NewClient("passthrough:///broker", grpc.WithContextDialer(b.Dial), grpc.WithTransportCredentials(credentials.NewTLS(b.ClientTLS())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer cart-token"), 300*time.Millisecond)
	defer cancel()
	_, err = brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "still being fetched") {
		t.Errorf("a caller with a short deadline got %v", err)
	}
	close(release)
	// The fetch continues without its caller: the next caller joins it or finds it done.
	if _, err := call(t, b, "authorization", "Bearer cart-token"); err != nil {
		t.Errorf("the next caller got %v", err)
	}
}
