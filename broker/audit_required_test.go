package broker_test

import (
	"context"
	"io"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
)

// world is a verifier, a binder and sessions for one pod.
type world struct{}

func (world) Verify(context.Context, identity.UnverifiedToken) (identity.Pod, error) {
	return cart.Identity, nil
}

func (world) Bind(_ context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	return policy.Pod{Namespace: id.Namespace, Request: keys.Request(map[string]string{"iam.amazonaws.com/role": "arn:aws:iam::123456789012:role/cart"})},
		policy.Namespace{
			Name: id.Namespace, Labels: map[string]string{"iam.amazonaws.com/inject": "enabled"},
			Annotations: map[string]string{"iam.amazonaws.com/permitted": ".*"},
		}, err
}

func (world) Get(ctx context.Context, g policy.Grant, _ string) (cache.Value, error) {
	c, err := session(ctx, g)
	return cache.Value{Credential: c, RefreshAfter: time.Minute}, err
}

func TestRequiredAuditRefusesCallsItCannotRecord(t *testing.T) {
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.New(policy.Config{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	decisions, err := audit.New(audit.Config{Writer: io.Discard, Required: true, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	b, err := broker.New(broker.Config{Verifier: world{}, Binder: world{}, Rules: rules, Sessions: world{}, Audit: decisions, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer x"))
	if got, err := b.GetCredentials(ctx, &brokerpb.GetCredentialsRequest{}); err != nil || got.GetAccessKeyId() == "" {
		t.Fatalf("with room in the audit log: %v", err)
	}
	for decisions.Lost() == 0 { // without a writer, the log fills up
		_ = decisions.Record(audit.Entry{Decision: audit.Allow})
	}
	got, err := b.GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
	if got != nil || credential.ReasonOf(brokerpb.FromError(err)) != credential.ReasonAuditUnavailable {
		t.Errorf("with a full audit log, credentials were returned: %v, %v", got != nil, err)
	}
}
