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

// Interceptor makes a span of each call of GetCredentials, below the span that the caller's
// traceparent names. Other calls, such as those of the health service, make none.
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
		// Not deferred directly: End would write the text of a panic into the span, whatever that is.
		defer func() { span.End() }()
		resp, err := handler(ctx, req)
		span.SetAttributes(attribute.Int64("rpc.grpc.status_code", int64(status.Code(err))))
		if err != nil {
			fail(span, brokerpb.FromError(err))
		}
		return resp, err
	}
}

// Describe adds to the span of the call that ctx belongs to what was learned of the caller: its
// namespace, and the ARN of the role that was decided on. Empty ones are left out.
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

// fail marks a span as failed, by reason alone: messages quote what users wrote, and causes are for
// our own log.
func fail(span trace.Span, err error) {
	reason := string(credential.ReasonOf(err))
	span.SetAttributes(attribute.String("credence.reason", reason))
	span.SetStatus(otelcodes.Error, reason)
}

// Source makes a span of each call of next. role names the role of a key. Where the context of a call
// carries a span, as that of the cache carries the first caller's, the new one is below it.
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

// incoming shows a call's traceparent, and nothing else of its metadata, to OpenTelemetry.
type incoming struct{ ctx context.Context }

// Get implements propagation.TextMapCarrier. Where there are several, none is believed.
func (c incoming) Get(key string) string {
	if key != "traceparent" {
		return "" // tracestate is for systems that the sidecar is not a part of, and as long as callers like
	}
	if values := metadata.ValueFromIncomingContext(c.ctx, key); len(values) == 1 {
		return values[0]
	}
	return ""
}

// Set implements propagation.TextMapCarrier. Nothing is passed on.
func (incoming) Set(string, string) {}

// Keys implements propagation.TextMapCarrier.
func (incoming) Keys() []string { return []string{"traceparent"} }
