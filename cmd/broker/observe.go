package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/assume"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube/verify"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/tracing"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// sources returns what the metrics read from the parts.
func (p parts) sources() admin.Sources {
	s := admin.Sources{
		Cache: p.sessions.Stats,
		Audit: func() admin.AuditStats {
			queued, capacity := p.decisions.Queued()
			return admin.AuditStats{Queued: queued, Capacity: capacity, Lost: p.decisions.Lost()}
		},
		Certificate:     p.pair.NotAfter,
		OwnCredentials:  p.sts.OwnExpiration,
		ClockSkew:       p.sts.ClockSkew,
		InformerAge:     p.informerAge,
		LiveReads:       p.directory.Reads,
		PodsQueued:      p.prefetch.Pending,
		VerificationAge: p.verifier.Age,
		TokensWaiting:   p.verifier.Waiting,
		Events: func() admin.EventStats {
			stats := p.events.Stats()
			return admin.EventStats{Queued: stats.Queued, Written: stats.Written, Suppressed: stats.Suppressed, Dropped: stats.Dropped}
		},
	}
	if reviews, ok := p.verifier.(*verify.TokenReview); ok {
		s.TokenReviews = reviews.InFlight
	}
	if p.trust != nil {
		s.TrustOK = func() bool { return p.trust.Err() == nil }
	}
	if p.traces != nil {
		s.Spans = func() admin.SpanStats {
			ended, exported := p.traces.Spans()
			return admin.SpanStats{Ended: ended, Exported: exported}
		}
	}
	return s
}

// informerAge returns the age of the watch that has received nothing for the longest time.
func (p parts) informerAge() time.Duration {
	age := p.directory.Age()
	if p.endpoints != nil {
		age = max(age, p.endpoints.Age())
	}
	return age
}

// newTracing returns the tracing, nil if calls are not traced, and the source from which the cache fetches: STS, with a span
// for each call if calls are traced.
func newTracing(ctx context.Context, o options, sts *assume.STS, log *slog.Logger) (*tracing.Tracing, credential.Source[policy.Grant], error) {
	if o.traceEndpoint == "" {
		return nil, sts, nil
	}
	traces, err := tracing.New(ctx, tracing.Config{Endpoint: o.traceEndpoint, Ratio: o.traceRatio, Version: program.Version(), Logger: log})
	if err != nil {
		return nil, nil, fmt.Errorf("--trace-endpoint: %w", err)
	}
	return traces, tracing.Source(traces, sts, func(g policy.Grant) string { return g.Role().String() }), nil
}

// observers are notified of each call: the metrics, and the trace of the call if calls are traced.
func (p parts) observers() []broker.Observer {
	all := []broker.Observer{func(_ context.Context, call broker.Call) { p.metrics.Answer(credential.ReasonOf(call.Err), call.Took) }}
	if p.traces != nil {
		all = append(all, func(ctx context.Context, call broker.Call) {
			tracing.Describe(ctx, call.Entry.Namespace, call.Entry.Role)
		})
	}
	return all
}

// interceptors are the gRPC interceptors of calls; none if calls are not traced.
func (p parts) interceptors() []grpc.UnaryServerInterceptor {
	if p.traces == nil {
		return nil
	}
	return []grpc.UnaryServerInterceptor{p.traces.Interceptor()}
}

// debugPages returns the handler of the debug pages on the listener with that address.
func (p parts) debugPages(ctx context.Context, address net.Addr) (http.Handler, error) {
	loopback := admin.Loopback(address)
	if !loopback {
		p.log.WarnContext(ctx, "Started debug pages beyond loopback, anyone who can connect can use them", "address", address.String())
	}
	cfg := admin.DebugConfig{Sessions: p.sessions, Pods: p.prefetch, Audit: p.decisions, Logger: p.log, AnyAddress: !loopback}
	if p.commands != nil {
		cfg.Authorize = p.commands.Verify
	}
	return admin.Debug(cfg)
}
