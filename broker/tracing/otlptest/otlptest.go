// Package otlptest runs an OpenTelemetry collector for tests: the real gRPC service on loopback, which stores the spans
// that it receives, or refuses them. It accepts only traces, and forwards nothing.
package otlptest

import (
	"context"
	"encoding/hex"
	"net"
	"sync"
	"testing"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Span is a received span. IDs are in hexadecimal.
type Span struct {
	TraceID, ID, Parent string
	Name                string
	Attributes          map[string]string // other values than text in their protobuf form
	Status              string            // message of a failed span; empty otherwise
	Resource            map[string]string // of the program that sent it
	Raw                 string            // the whole span as text, to search it for secrets
}

// Collector stores spans. Make it with [Start].
type Collector struct {
	collectorpb.UnimplementedTraceServiceServer

	addr string

	mu      sync.Mutex
	spans   []Span // guarded by mu
	refuses bool   // guarded by mu
}

// Start runs a collector until the test ends.
func Start(t testing.TB) *Collector {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &Collector{addr: listener.Addr().String()}
	server := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(server, c)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Stop(); <-done })
	return c
}

// Endpoint returns the URL for a program's configuration.
func (c *Collector) Endpoint() string { return "http://" + c.addr }

// Refuse makes the collector refuse all later spans, in a way that the sender does not retry.
func (c *Collector) Refuse() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuses = true
}

// Spans returns the spans received so far.
func (c *Collector) Spans() []Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Span(nil), c.spans...)
}

// Export implements the collector's service.
func (c *Collector) Export(_ context.Context, request *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuses {
		return nil, status.Error(codes.InvalidArgument, "refused by the test") // a code that is not retried
	}
	for _, resource := range request.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, s := range scope.GetSpans() {
				c.spans = append(c.spans, Span{
					TraceID: hex.EncodeToString(s.GetTraceId()), ID: hex.EncodeToString(s.GetSpanId()), Parent: hex.EncodeToString(s.GetParentSpanId()),
					Name: s.GetName(), Attributes: texts(s.GetAttributes()), Status: s.GetStatus().GetMessage(),
					Resource: texts(resource.GetResource().GetAttributes()), Raw: s.String(),
				})
			}
		}
	}
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

func texts(attributes []*commonpb.KeyValue) map[string]string {
	all := make(map[string]string)
	for _, a := range attributes {
		text := a.GetValue().GetStringValue()
		if text == "" {
			text = a.GetValue().String()
		}
		all[a.GetKey()] = text
	}
	return all
}
