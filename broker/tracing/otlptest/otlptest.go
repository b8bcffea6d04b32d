// Package otlptest runs an OpenTelemetry collector for tests: the real gRPC service that collectors
// serve, on loopback, which keeps the spans that it is sent. It can be made to refuse. It knows no
// other signal than traces, and forwards nothing.
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

// Span is a span as it arrived. Ids are in hexadecimal.
type Span struct {
	TraceID, ID, Parent string
	Name                string
	Attributes          map[string]string // values that are no text are given as fmt would
	Status              string            // the message of a failed one; empty otherwise
	Resource            map[string]string // of the program that sent it
	Raw                 string            // all of it as text, to look for what must not be there
}

// Collector keeps spans. Make it with [Start].
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
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Stop(); <-ended })
	return c
}

// Endpoint is what a program is told.
func (c *Collector) Endpoint() string { return "http://" + c.addr }

// Refuse makes the collector refuse for good what it is sent from now on.
func (c *Collector) Refuse() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuses = true
}

// Spans returns the spans that have arrived.
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
		return nil, status.Error(codes.InvalidArgument, "the test wants it so") // not one that is sent again
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
