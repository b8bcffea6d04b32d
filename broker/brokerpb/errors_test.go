package brokerpb_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
)

var kinds = map[error]codes.Code{
	credential.ErrUnauthenticated: codes.Unauthenticated,
	credential.ErrDenied:          codes.PermissionDenied,
	credential.ErrInvalid:         codes.FailedPrecondition,
	credential.ErrNotFound:        codes.NotFound,
	credential.ErrUnavailable:     codes.Unavailable,
}

// across converts err to a status and back, as the wire does.
func across(err error) error { return brokerpb.FromError(brokerpb.ToStatus(err).Err()) }

func TestRoundTrip(t *testing.T) {
	var tried int
	for kind, code := range kinds {
		for name, reason := range reasons(t) {
			for _, retry := range []time.Duration{0, time.Nanosecond, 1500 * time.Millisecond, time.Hour} {
				tried++
				sent := &credential.Error{
					Kind: kind, Reason: reason, Message: "refused: süß", RetryAfter: retry, Cause: errors.New("a cause for our own log"),
				}
				// Wrapped, as the layers above do.
				st := brokerpb.ToStatus(fmt.Errorf("granting: %w", sent))
				if st.Code() != code || st.Message() != sent.Message {
					t.Errorf("%v, %s becomes status %s: %s", kind, name, st.Code(), st.Message())
				}
				got, ok := errors.AsType[*credential.Error](across(sent))
				if !ok || !errors.Is(got, kind) || got.Reason != reason || got.Message != sent.Message || got.RetryAfter != retry || got.Cause != nil {
					t.Errorf("%v, %s, %s returns as %#v", kind, name, retry, got)
				}
			}
		}
	}
	if tried < len(kinds)*20*4 {
		t.Errorf("%d combinations were tested, want at least %d", tried, len(kinds)*20*4)
	}
}

func TestNil(t *testing.T) {
	if st := brokerpb.ToStatus(nil); st.Code() != codes.OK || st.Err() != nil {
		t.Errorf("nil becomes %s", st)
	}
	if err := brokerpb.FromError(nil); err != nil {
		t.Errorf("OK becomes %v", err)
	}
}

// ErrorInfo and RetryInfo have the reason and the delay, because other tools read them there.
func TestDetails(t *testing.T) {
	st := brokerpb.ToStatus(&credential.Error{
		Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSThrottled, Message: "m", RetryAfter: 2 * time.Second,
	})
	var found int
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			found++
			if d.GetReason() != "STS_THROTTLED" || d.GetDomain() != "credence" || len(d.GetMetadata()) != 0 {
				t.Errorf("ErrorInfo is %v", d)
			}
		case *errdetails.RetryInfo:
			found++
			if d.GetRetryDelay().AsDuration() != 2*time.Second {
				t.Errorf("RetryInfo is %v", d)
			}
		default:
			t.Errorf("status has the unexpected detail %v", detail)
		}
	}
	if found != 2 {
		t.Errorf("status has %d details, want 2", found)
	}
	if details := brokerpb.ToStatus(credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted, "m")).Details(); len(details) != 1 {
		t.Errorf("without RetryAfter, status has the details %v", details)
	}
}

// Causes and internal errors never cross the wire: they contain addresses, accounts and details of failures.
func TestInternalErrorsRevealNothing(t *testing.T) {
	const private = "dialing 10.1.2.3"
	for name, err := range map[string]error{
		"plain":         errors.New(private),
		"wrapped":       fmt.Errorf("%s: %w", private, io.ErrUnexpectedEOF),
		"only a kind":   fmt.Errorf("%s: %w", private, credential.ErrDenied),
		"a status":      status.Error(codes.Unauthenticated, private),
		"a context's":   fmt.Errorf("%s: %w", private, context.Canceled),
		"a cause":       &credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonSTSUnavailable, Message: "STS does not respond", Cause: errors.New(private)},
		"wrapped again": fmt.Errorf("%s: %w", private, credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted, "no")),
	} {
		st := brokerpb.ToStatus(err)
		if strings.Contains(st.Proto().String(), private) || strings.Contains(across(err).Error(), private) {
			t.Errorf("%s: becomes %s, which contains the private text", name, st.Proto())
		}
		if _, ours := errors.AsType[*credential.Error](err); ours {
			continue
		}
		if st.Code() != codes.Internal || st.Message() == "" {
			t.Errorf("%s: becomes %s", name, st.Proto())
		}
		// To the sidecar an internal error is an outage, because it says nothing about the pod.
		if got := across(err); !errors.Is(got, credential.ErrUnavailable) || credential.ReasonOf(got) != credential.ReasonInternal {
			t.Errorf("%s: returns as %v, %s", name, got, credential.ReasonOf(got))
		}
	}
	// An Error without a kind becomes INTERNAL too.
	if st := brokerpb.ToStatus(&credential.Error{Reason: credential.ReasonInternal, Message: "m"}); st.Code() != codes.Internal {
		t.Errorf("an error without a kind becomes %s", st.Code())
	}
}

// Proxies and gRPC itself send codes that the broker does not send. These say nothing about the pod, so they must not
// become refusals.
func TestForeignCodes(t *testing.T) {
	known := map[codes.Code]error{}
	for kind, code := range kinds {
		known[code] = kind
	}
	for code := codes.Canceled; code <= codes.Unauthenticated+3; code++ {
		want, ok := known[code]
		if !ok {
			want = credential.ErrUnavailable
		}
		err := brokerpb.FromError(status.Error(code, "from elsewhere"))
		for kind := range kinds {
			if errors.Is(err, kind) != errors.Is(want, kind) {
				t.Errorf("%s becomes %v: errors.Is with %v is %v", code, err, kind, errors.Is(err, kind))
			}
		}
		if credential.ReasonOf(err) != credential.ReasonInternal || err.Error() != "from elsewhere" {
			t.Errorf("%s becomes %v, %s", code, err, credential.ReasonOf(err))
		}
	}
	for name, err := range map[string]error{
		"no status":      errors.New("transport is closing"),
		"context":        context.DeadlineExceeded,
		"wrapped":        fmt.Errorf("calling: %w", context.Canceled),
		"wrapped status": fmt.Errorf("calling: %w", status.Error(codes.ResourceExhausted, "too large")),
		"no message":     status.Error(codes.Unknown, ""),
	} {
		got, ok := errors.AsType[*credential.Error](brokerpb.FromError(err))
		if !ok || !errors.Is(got, credential.ErrUnavailable) || got.Message == "" || got.Reason != credential.ReasonInternal {
			t.Errorf("%s becomes %#v", name, got)
		}
	}
}

// A message and a delay are limited, whatever a faulty or hostile broker sends.
func TestBounds(t *testing.T) {
	for name, message := range map[string]string{
		"long":             strings.Repeat("m", 1<<20),
		"long, 2 bytes":    strings.Repeat("ü", 1<<20),
		"cut in a rune":    "m" + strings.Repeat("ü", 1<<20),
		"invalid":          "m\xff\xfe",
		"invalid and long": strings.Repeat("\xff", 1000) + strings.Repeat("m", 1<<20),
	} {
		sent := &credential.Error{Kind: credential.ErrDenied, Reason: credential.ReasonRoleNotPermitted, Message: message, RetryAfter: time.Second}
		st := brokerpb.ToStatus(sent)
		received := brokerpb.FromError(status.Error(codes.PermissionDenied, message))
		for how, text := range map[string]string{"sent": st.Message(), "received": received.Error()} {
			if len(text) > 2048 || len(text) == 0 || !utf8.ValidString(text) {
				t.Errorf("%s message, %s: %d bytes, valid: %v", name, how, len(text), utf8.ValidString(text))
			}
			if strings.HasPrefix(message, "m") && text[0] != 'm' {
				t.Errorf("%s message, %s, has another text", name, how)
			}
		}
		if len(st.Details()) != 2 {
			t.Errorf("%s message: the status has %d details, want 2", name, len(st.Details()))
		}
		if got := across(sent); credential.ReasonOf(got) != credential.ReasonRoleNotPermitted || !errors.Is(got, credential.ErrDenied) {
			t.Errorf("%s message: returns as %v, %s", name, got, credential.ReasonOf(got))
		}
	}
	for _, tt := range []struct {
		delay *durationpb.Duration
		want  time.Duration
	}{
		{durationpb.New(time.Hour), time.Hour},
		{durationpb.New(time.Hour + 1), time.Hour},
		{durationpb.New(1 << 62), time.Hour},
		{&durationpb.Duration{Seconds: 1 << 62}, time.Hour},
		{durationpb.New(-time.Second), 0},
		{&durationpb.Duration{Seconds: -1 << 62}, 0},
		{nil, 0},
	} {
		err := brokerpb.FromError(detailed(t, &errdetails.RetryInfo{RetryDelay: tt.delay}))
		if e, ok := errors.AsType[*credential.Error](err); !ok || e.RetryAfter != tt.want {
			t.Errorf("a delay of %v becomes %#v", tt.delay, err)
		}
	}
	for _, tt := range []struct {
		info *errdetails.ErrorInfo
		want credential.Reason
	}{
		{&errdetails.ErrorInfo{Reason: "A_REASON_OF_2030", Domain: "credence"}, "A_REASON_OF_2030"}, // from a newer broker
		{&errdetails.ErrorInfo{Reason: strings.Repeat("R", 63), Domain: "credence"}, credential.Reason(strings.Repeat("R", 63))},
		{&errdetails.ErrorInfo{Reason: strings.Repeat("R", 64), Domain: "credence"}, credential.ReasonInternal},
		{&errdetails.ErrorInfo{Reason: "ROLE_MISSING", Domain: "googleapis.com"}, credential.ReasonInternal},
		{&errdetails.ErrorInfo{Reason: "ROLE_MISSING"}, credential.ReasonInternal},
		{&errdetails.ErrorInfo{Reason: "", Domain: "credence"}, credential.ReasonInternal},
		{&errdetails.ErrorInfo{Reason: "role missing\n", Domain: "credence"}, credential.ReasonInternal},
	} {
		if got := credential.ReasonOf(brokerpb.FromError(detailed(t, tt.info))); got != tt.want {
			t.Errorf("%v becomes %s, want %s", tt.info, got, tt.want)
		}
	}
}

func detailed(t *testing.T, detail protoadapt.MessageV1) error {
	t.Helper()
	st, err := status.New(codes.Unavailable, "m").WithDetails(detail)
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}
