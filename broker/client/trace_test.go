package client_test

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
)

// TestEachCallHasATrace: the header has the form of W3C Trace Context. Each call has a new trace that is not marked as
// sampled. The error has its ID, but the error's text does not.
func TestEachCallHasATrace(t *testing.T) {
	w := newWorld(t)
	form := regexp.MustCompile(`^00-([0-9a-f]{32})-([0-9a-f]{16})-00$`)
	seen := map[string]bool{}
	for name, respond := range map[string]func() (*brokerpb.GetCredentialsResponse, error){
		"success": func() (*brokerpb.GetCredentialsResponse, error) { return good(), nil },
		"refused": func() (*brokerpb.GetCredentialsResponse, error) {
			return nil, status.Error(codes.PermissionDenied, "no")
		},
		"nonsense": func() (*brokerpb.GetCredentialsResponse, error) { return &brokerpb.GetCredentialsResponse{}, nil },
	} {
		var sent []string
		w.server.respond = func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
			sent = metadata.ValueFromIncomingContext(ctx, "traceparent")
			return respond()
		}
		_, err := w.Credentials(t.Context())
		if len(sent) != 1 || !form.MatchString(sent[0]) {
			t.Fatalf("%s: traceparent %q", name, sent)
		}
		ids := form.FindStringSubmatch(sent[0])
		for _, id := range ids[1:] {
			if seen[id] || strings.Trim(id, "0") == "" {
				t.Errorf("%s: the ID %s is zero or was used before", name, id)
			}
			seen[id] = true
		}
		if (err == nil) != (name == "success") {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			continue
		}
		traced, ok := errors.AsType[interface {
			error
			TraceID() string
		}](err)
		if !ok || traced.TraceID() != ids[1] {
			t.Errorf("%s: the error does not have the trace ID %s", name, ids[1])
		}
		if strings.Contains(err.Error(), ids[1]) {
			t.Errorf("%s: the error's text contains the trace ID: %v", name, err)
		}
		if _, ok := errors.AsType[*credential.Error](err); !ok {
			t.Errorf("%s: %v does not wrap a credential.Error", name, err)
		}
	}
}
