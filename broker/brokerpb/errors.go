package brokerpb

import (
	"errors"
	"regexp"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/broker/credential"
)

// errorDomain is the domain in each google.rpc.ErrorInfo that the broker sends.
const errorDomain = "credence"

// Limits of what a caller accepts from an error. A message is shown to users and may become an HTTP body, and the AWS
// common runtime refuses bodies over 10,000 bytes. A delay from a faulty or hostile broker must not silence a sidecar for
// hours.
const (
	maxMessage    = 2 << 10
	maxRetryAfter = time.Hour
)

// reasonForm is the form of a reason (AIP-193). It makes a reason from the wire safe as a metric label.
var reasonForm = regexp.MustCompile(`^[A-Z0-9_]{1,63}$`)

// kinds maps each kind of error to its gRPC code, and back.
var kinds = []struct {
	kind error
	code codes.Code
}{
	{credential.ErrUnauthenticated, codes.Unauthenticated},
	{credential.ErrDenied, codes.PermissionDenied},
	{credential.ErrInvalid, codes.FailedPrecondition},
	{credential.ErrNotFound, codes.NotFound},
	{credential.ErrUnavailable, codes.Unavailable},
}

// ToStatus converts err into the status that crosses the wire: code, message, ErrorInfo and, if the error says when to
// retry, RetryInfo. An error without a [credential.Error] becomes INTERNAL without its text, so that causes stay in the
// process. A nil err becomes OK.
func ToStatus(err error) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		e = credential.Errorf(nil, credential.ReasonInternal, "the broker failed; see its log for the cause")
	}
	code := codes.Internal
	for _, k := range kinds {
		if e.Kind == k.kind { //nolint:errorlint // Kind is a sentinel itself, never a wrapped one.
			code = k.code
		}
	}
	st := status.New(code, clip.Bytes(e.Message, maxMessage))
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: string(e.Reason), Domain: errorDomain}}
	if e.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	detailed, err := st.WithDetails(details...)
	if err != nil {
		return st // Only invalid UTF-8 makes this fail, and clip removes it.
	}
	return detailed
}

// FromError converts the error of a call into a [*credential.Error]. Failures of the connection, and codes that the broker
// does not send, become credential.ErrUnavailable, because they say nothing about the pod. A nil err gives nil.
func FromError(err error) error {
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	e := &credential.Error{Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal, Message: clip.Bytes(st.Message(), maxMessage)}
	for _, k := range kinds {
		if st.Code() == k.code {
			e.Kind = k.kind
		}
	}
	if e.Message == "" {
		e.Message = "the broker responded with code " + st.Code().String()
	}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == errorDomain && reasonForm.MatchString(d.GetReason()) {
				e.Reason = credential.Reason(d.GetReason())
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = min(max(d.GetRetryDelay().AsDuration(), 0), maxRetryAfter)
		}
	}
	return e
}
