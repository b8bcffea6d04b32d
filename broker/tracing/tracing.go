// Package tracing tells an OpenTelemetry collector how the broker spent the time of a call: one span
// for each call of GetCredentials, which continues the trace that the sidecar began, and one for
// each call of STS, below the span of the call that began it.
//
// It promises that no span holds a token or a secret; that callers, who are strangers until they are
// verified, decide neither which of their calls are recorded nor how many; and that the broker
// never waits for the collector: spans that it does not take in time are dropped, and counted.
//
// It is the only importer of OpenTelemetry. The sidecar writes its part of the trace, the header
// traceparent, by hand (package client), and records nothing itself.
//
// # What is recorded
//
// The broker alone decides, by the trace id: a ratio of all ids, the same ones in every replica, so
// that the calls of one trace are recorded by all of them or by none. The flag "sampled" of an
// incoming traceparent is not looked at: it would let any pod have all of its calls recorded. Trace
// ids are the caller's choice as well, so [maxSampled] bounds the rate of what is recorded.
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

// maxSampled bounds the traces that are begun per second, whatever the ratio and the callers'
// trace ids. With two spans each of some 500 bytes, that is 100 kB/s to the collector.
const maxSampled = 100

const (
	// flushTime bounds what the end of the process waits for the collector.
	flushTime = 3 * time.Second
	// exportTimeout bounds one attempt to hand spans over.
	exportTimeout = 5 * time.Second
	// maxQueued spans wait for the collector: 10 s of maxSampled.
	maxQueued = 2048
	// complainEvery bounds what is logged while the collector is away.
	complainEvery = time.Minute
)

// Config configures [New].
type Config struct {
	// Endpoint is the collector's OTLP/gRPC address, as http://HOST:PORT, or https:// for TLS with the
	// system's roots. Required.
	Endpoint string
	// Ratio of the traces that are recorded, from 0 to 1. Zero records none.
	Ratio float64
	// Version is told to the collector as the version of this program.
	Version string
	// Logger is told when spans cannot be handed over, once a minute at most. Required.
	Logger *slog.Logger
}

// Check reports why the configuration cannot be right, in terms of its fields.
func (cfg Config) Check() error {
	u, err := url.Parse(cfg.Endpoint)
	switch {
	case err != nil:
		return fmt.Errorf("parsing the endpoint: %w", err)
	case u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", u.Port() == "", u.User != nil, u.RawQuery != "", u.Fragment != "", u.Path != "" && u.Path != "/":
		return fmt.Errorf("endpoint %q must have the form http://HOST:PORT or https://HOST:PORT", u.Redacted())
	case !(cfg.Ratio >= 0 && cfg.Ratio <= 1): // so that NaN is refused too
		return fmt.Errorf("the ratio %v must be from 0 to 1", cfg.Ratio)
	}
	return nil
}

// Tracing records spans and hands them to the collector. Make it with [New].
type Tracing struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer

	ended, exported atomic.Uint64
	complaint       rate.Sometimes
}

// New checks cfg. It does not connect: a collector that is away is no reason not to start. It sets
// OpenTelemetry's handler of errors, of which a process has one.
//
// What the collector wants besides can be set by OpenTelemetry's own variables:
// OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE and OTEL_RESOURCE_ATTRIBUTES.
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
	if host, err := os.Hostname(); err == nil { // of a pod, its name
		attributes = append(attributes, attribute.String("service.instance.id", host))
	}
	// What the environment says comes last, and wins.
	about, err := resource.New(ctx, resource.WithAttributes(attributes...), resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("reading OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	t := &Tracing{complaint: rate.Sometimes{Interval: complainEvery}}
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
			cfg.Logger.Warn("Handing traces to the collector failed", "endpoint", cfg.Endpoint, "error", err)
		})
	}))
	return t, nil
}

// limits of a span. Ours have at most ten attributes, the longest of which is the ARN of a role.
var limits = sdk.SpanLimits{
	AttributeValueLengthLimit: 1024, AttributeCountLimit: 16, EventCountLimit: 4, LinkCountLimit: 1,
	AttributePerEventCountLimit: 4, AttributePerLinkCountLimit: 1,
}

// Run hands over what is left when ctx ends.
func (t *Tracing) Run(ctx context.Context) error {
	<-ctx.Done()
	flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTime)
	defer cancel()
	_ = t.provider.Shutdown(flush) // What could not be handed over is in the difference of Spans.
	return nil
}

// Spans counts the spans that ended, and those of them that the collector took. While none are
// waiting, the difference is what was lost.
func (t *Tracing) Spans() (ended, exported uint64) { return t.ended.Load(), t.exported.Load() }

// bounded lets a sampler record no more than a rate.
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

// countEnded counts the spans that are to be exported.
type countEnded struct{ n *atomic.Uint64 }

func (countEnded) OnStart(context.Context, sdk.ReadWriteSpan) {}
func (c countEnded) OnEnd(sdk.ReadOnlySpan)                   { c.n.Add(1) }
func (countEnded) Shutdown(context.Context) error             { return nil }
func (countEnded) ForceFlush(context.Context) error           { return nil }

// countExported counts the spans that were.
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
