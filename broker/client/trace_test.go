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

// TestEachCallHasATrace: the header has the form of W3C Trace Context, names a new trace each time, is not
// marked as sampled, and its id is in the error and not in the error's text.
func TestEachCallHasATrace(t *testing.T) {
	w := newWorld(t)
	form := regexp.MustCompile(`^00-([0-9a-f]{32})-([0-9a-f]{16})-00$`)
	seen := map[string]bool{}
	for name, answer := range map[string]func() (*brokerpb.GetCredentialsResponse, error){
		"answered": func() (*brokerpb.GetCredentialsResponse, error) { return good(), nil },
		"refused": func() (*brokerpb.GetCredentialsResponse, error) {
			return nil, status.Error(codes.PermissionDenied, "no")
		},
		"nonsense": func() (*brokerpb.GetCredentialsResponse, error) { return &brokerpb.GetCredentialsResponse{}, nil },
	} {
		var sent []string
		w.server.answer = func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
			sent = metadata.ValueFromIncomingContext(ctx, "traceparent")
			return answer()
		}
		_, err := w.Credentials(t.Context())
		if len(sent) != 1 || !form.MatchString(sent[0]) {
			t.Fatalf("%s: traceparent %q", name, sent)
		}
		ids := form.FindStringSubmatch(sent[0])
		for _, id := range ids[1:] {
			if seen[id] || strings.Trim(id, "0") == "" {
				t.Errorf("%s: the id %s is not new", name, id)
			}
			seen[id] = true
		}
		if (err == nil) != (name == "answered") {
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
			t.Errorf("%s: the error does not lead to the trace %s", name, ids[1])
		}
		if strings.Contains(err.Error(), ids[1]) {
			t.Errorf("%s: the error's text differs each time: %v", name, err)
		}
		if _, ok := errors.AsType[*credential.Error](err); !ok {
			t.Errorf("%s: there is no credential.Error in %v", name, err)
		}
	}
}
