package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"

	"google.golang.org/grpc/metadata"
)

// traceparent is the header of W3C Trace Context, which gRPC sends as metadata.
const traceparent = "traceparent"

// begin gives ctx's call a trace of its own, and returns the trace's id. OpenTelemetry would do the
// same for some megabytes.
//
// The last field says that the caller records nothing. It is not for a pod to say what the broker
// records; the broker decides that by the trace id.
func begin(ctx context.Context) (_ context.Context, traceID string) {
	var random [16 + 8]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand ends the program instead
	text := hex.EncodeToString(random[:])
	traceID, spanID := text[:32], text[32:]
	return metadata.AppendToOutgoingContext(ctx, traceparent, "00-"+traceID+"-"+spanID+"-00"), traceID
}

// failure is an error with the id of the trace of the call that failed. Its text is that of the error:
// an id in it would make each failure look like news.
type failure struct {
	error
	traceID string
}

// TraceID returns the id by which the call is found in the broker's traces, in hexadecimal.
func (f failure) TraceID() string { return f.traceID }

// Unwrap returns the error itself.
func (f failure) Unwrap() error { return f.error }
