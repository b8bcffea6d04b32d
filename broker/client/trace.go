package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"

	"google.golang.org/grpc/metadata"
)

// traceparent is the header of W3C Trace Context. gRPC sends it as metadata.
const traceparent = "traceparent"

// begin adds a new trace to ctx, and returns the trace's ID. OpenTelemetry would do the same, but adds megabytes to the
// program.
//
// The last field says that the caller records nothing. The broker decides what it records by the trace ID; a pod must not.
func begin(ctx context.Context) (_ context.Context, traceID string) {
	var random [16 + 8]byte
	_, _ = rand.Read(random[:]) // never fails: crypto/rand crashes the program instead
	text := hex.EncodeToString(random[:])
	traceID, spanID := text[:32], text[32:]
	return metadata.AppendToOutgoingContext(ctx, traceparent, "00-"+traceID+"-"+spanID+"-00"), traceID
}

// failure is an error with the trace ID of the failed call. Its text does not contain the ID, so that equal failures have
// equal texts.
type failure struct {
	error
	traceID string
}

// TraceID returns the ID of the call in the brokers' traces, in hexadecimal.
func (f failure) TraceID() string { return f.traceID }

// Unwrap returns the wrapped error.
func (f failure) Unwrap() error { return f.error }
