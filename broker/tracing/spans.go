package tracing

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
)

// Interceptor records a span for each call of GetCredentials, below the span that the caller's traceparent names. Other
// calls, such as those of the health service, have no span.
func (t *Tracing) Interceptor() grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if info.FullMethod != brokerpb.Broker_GetCredentials_FullMethodName {
			return handler(ctx, req)
		}
		ctx = propagation.TraceContext{}.Extract(ctx, incoming{ctx})
		ctx, span := t.tracer.Start(ctx, "GetCredentials", trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(
			attribute.String("rpc.system", "grpc"),
			attribute.String("rpc.service", brokerpb.Broker_ServiceDesc.ServiceName),
			attribute.String("rpc.method", "GetCredentials"),
		))
		// The closure matters: a deferred span.End would write the text of a panic into the span, which may contain anything.
		defer func() { span.End() }()
		resp, err := handler(ctx, req)
		span.SetAttributes(attribute.Int64("rpc.grpc.status_code", int64(status.Code(err))))
		if err != nil {
			fail(span, brokerpb.FromError(err))
		}
		return resp, err
	}
}

// Describe adds the caller's namespace and the ARN of the granted role to the span of ctx's call. Empty values are left
// out.
func Describe(ctx context.Context, namespace, role string) {
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() {
		return
	}
	if namespace != "" {
		span.SetAttributes(attribute.String("k8s.namespace.name", namespace))
	}
	if role != "" {
		span.SetAttributes(attribute.String("credence.role", role))
	}
}

// fail marks a span as failed. It adds only the reason: messages quote what users wrote, and causes belong in our log.
func fail(span trace.Span, err error) {
	reason := string(credential.ReasonOf(err))
	span.SetAttributes(attribute.String("credence.reason", reason))
	span.SetStatus(otelcodes.Error, reason)
}

// Source records a span for each call of next. role returns the role of a key. The span is below that of the call's
// context, if there is one. The cache passes the first caller's.
func Source[K any](t *Tracing, next credential.Source[K], role func(K) string) credential.Source[K] {
	return source[K]{t, next, role}
}

type source[K any] struct {
	t    *Tracing
	next credential.Source[K]
	role func(K) string
}

// Credential implements [credential.Source].
func (s source[K]) Credential(ctx context.Context, key K) (credential.Credential, error) {
	ctx, span := s.t.tracer.Start(ctx, "AssumeRole", trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
		attribute.String("rpc.system", "aws-api"), attribute.String("rpc.service", "STS"), attribute.String("rpc.method", "AssumeRole"),
		attribute.String("credence.role", s.role(key)),
	))
	defer func() { span.End() }() // as in Interceptor
	cred, err := s.next.Credential(ctx, key)
	if err != nil {
		fail(span, err)
	}
	return cred, err
}

// incoming shows OpenTelemetry the traceparent of a call, and no other metadata.
type incoming struct{ ctx context.Context }

// Get implements propagation.TextMapCarrier. It ignores the header if there are several.
func (c incoming) Get(key string) string {
	if key != "traceparent" {
		return "" // The sidecar sends no tracestate, and a caller could make it very long.
	}
	if values := metadata.ValueFromIncomingContext(c.ctx, key); len(values) == 1 {
		return values[0]
	}
	return ""
}

// Set implements propagation.TextMapCarrier. It passes nothing on.
func (incoming) Set(string, string) {}

// Keys implements propagation.TextMapCarrier.
func (incoming) Keys() []string { return []string{"traceparent"} }
