// Package tracing sends spans to an OpenTelemetry collector: one span for each call of GetCredentials, which continues
// the sidecar's trace, and one for each STS call, below the span of the call that caused it.
//
// It guarantees: no span contains a token or a secret; callers, which are unverified at first, decide neither which of
// their calls are recorded nor how many; the broker never waits for the collector. Spans that the collector does not
// accept in time are dropped and counted.
//
// It is the only importer of OpenTelemetry. The sidecar writes its part of the trace, the header traceparent, itself
// (package client), and records nothing.
//
// # What is recorded
//
// The broker decides by the trace ID: all replicas record the same fraction of all IDs, so that either all or none of a
// trace's calls are recorded. The broker ignores the flag "sampled" of an incoming traceparent, because any pod could
// have all its calls recorded with it. The caller chooses the trace ID too, so [maxSampled] bounds the recorded traces.
package tracing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/time/rate"
)

// maxSampled is the maximum of recorded traces per second, whatever the ratio and the callers' trace IDs. With two spans
// of some 500 bytes each, that is 100 kB/s to the collector.
const maxSampled = 100

const (
	// flushTime is how long shutdown waits for the collector.
	flushTime = 3 * time.Second
	// exportTimeout is the maximum duration of one attempt to send spans.
	exportTimeout = 5 * time.Second
	// maxQueued is how many spans wait for the collector: 10 s of maxSampled.
	maxQueued = 2048
	// failureLogInterval is how often a failure is logged while the collector is unavailable.
	failureLogInterval = time.Minute
)

// Config configures [New].
type Config struct {
	// Endpoint is the collector's OTLP/gRPC address: http://HOST:PORT, or https://HOST:PORT for TLS with the system's root
	// certificates. Required.
	Endpoint string
	// Ratio is the fraction of traces that are recorded, from 0 to 1.
	Ratio float64
	// Version of this program, for the collector.
	Version string
	// Logger receives a line if spans cannot be sent, at most once a minute. Required.
	Logger *slog.Logger
}

// Check returns an error that names the field if the endpoint or the ratio is invalid.
func (cfg Config) Check() error {
	u, err := url.Parse(cfg.Endpoint)
	switch {
	case err != nil:
		return fmt.Errorf("parsing the endpoint: %w", err)
	case u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", u.Port() == "", u.User != nil, u.RawQuery != "", u.Fragment != "", u.Path != "" && u.Path != "/":
		return fmt.Errorf("endpoint %q must have the form http://HOST:PORT or https://HOST:PORT", u.Redacted())
	case !(cfg.Ratio >= 0 && cfg.Ratio <= 1): // so NaN is refused too
		return fmt.Errorf("the ratio %v must be from 0 to 1", cfg.Ratio)
	}
	return nil
}

// Tracing records spans and sends them to the collector. Make it with [New].
type Tracing struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer

	ended, exported atomic.Uint64
	complaint       rate.Sometimes
}

// New checks cfg and returns a Tracing. It does not connect, so an unavailable collector does not prevent a start. It sets
// OpenTelemetry's error handler, of which a process has only one.
//
// OpenTelemetry's own variables set what else the collector needs: OTEL_EXPORTER_OTLP_HEADERS,
// OTEL_EXPORTER_OTLP_CERTIFICATE and OTEL_RESOURCE_ATTRIBUTES.
func New(ctx context.Context, cfg Config) (*Tracing, error) {
	if cfg.Logger == nil {
		return nil, errors.New("tracing needs a Logger")
	}
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(cfg.Endpoint), otlptracegrpc.WithTimeout(exportTimeout))
	if err != nil {
		return nil, fmt.Errorf("preparing to send traces to %s: %w", cfg.Endpoint, err)
	}
	attributes := []attribute.KeyValue{
		attribute.String("service.name", "credence-broker"), attribute.String("service.version", cfg.Version),
	}
	if host, err := os.Hostname(); err == nil { // the pod's name
		attributes = append(attributes, attribute.String("service.instance.id", host))
	}
	// The environment comes last, and so overrides the rest.
	about, err := resource.New(ctx, resource.WithAttributes(attributes...), resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("reading OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	t := &Tracing{complaint: rate.Sometimes{Interval: failureLogInterval}}
	ours := bounded{sdk.TraceIDRatioBased(cfg.Ratio), rate.NewLimiter(maxSampled, maxSampled)}
	t.provider = sdk.NewTracerProvider(
		sdk.WithResource(about),
		sdk.WithSampler(sdk.ParentBased(ours, sdk.WithRemoteParentSampled(ours), sdk.WithRemoteParentNotSampled(ours))),
		sdk.WithSpanProcessor(countEnded{n: &t.ended}),
		sdk.WithBatcher(countExported{exporter, &t.exported}, sdk.WithMaxQueueSize(maxQueued), sdk.WithExportTimeout(exportTimeout)),
		sdk.WithRawSpanLimits(limits),
	)
	t.tracer = t.provider.Tracer("github.com/credence-iam/credence/broker/tracing")
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		t.complaint.Do(func() {
			cfg.Logger.Warn("Could not send traces to the collector", "endpoint", cfg.Endpoint, "error", err)
		})
	}))
	return t, nil
}

// limits bound a span. Our spans have at most ten attributes. The longest is a role ARN.
var limits = sdk.SpanLimits{
	AttributeValueLengthLimit: 1024, AttributeCountLimit: 16, EventCountLimit: 4, LinkCountLimit: 1,
	AttributePerEventCountLimit: 4, AttributePerLinkCountLimit: 1,
}

// Run waits until ctx ends and then sends the remaining spans.
func (t *Tracing) Run(ctx context.Context) error {
	<-ctx.Done()
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
	defer cancel()
	_ = t.provider.Shutdown(flush) // Spans counts what could not be sent.
	return nil
}

// Spans returns how many spans ended, and how many of them the collector accepted. If none are queued, the difference is the number of
// lost spans.
func (t *Tracing) Spans() (ended, exported uint64) { return t.ended.Load(), t.exported.Load() }

// bounded is a sampler that records at most a rate.
type bounded struct {
	sdk.Sampler
	limiter *rate.Limiter
}

// ShouldSample implements sdk.Sampler.
func (b bounded) ShouldSample(p sdk.SamplingParameters) sdk.SamplingResult {
	result := b.Sampler.ShouldSample(p)
	if result.Decision == sdk.RecordAndSample && !b.limiter.Allow() {
		result.Decision = sdk.Drop
	}
	return result
}

// countEnded counts the spans to export.
type countEnded struct{ n *atomic.Uint64 }

func (countEnded) OnStart(context.Context, sdk.ReadWriteSpan) {}
func (c countEnded) OnEnd(sdk.ReadOnlySpan)                   { c.n.Add(1) }
func (countEnded) Shutdown(context.Context) error             { return nil }
func (countEnded) ForceFlush(context.Context) error           { return nil }

// countExported counts the spans that the collector accepted.
type countExported struct {
	sdk.SpanExporter
	n *atomic.Uint64
}

// ExportSpans implements sdk.SpanExporter.
func (c countExported) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	err := c.SpanExporter.ExportSpans(ctx, spans)
	if err == nil {
		c.n.Add(uint64(len(spans)))
	}
	return err
}
