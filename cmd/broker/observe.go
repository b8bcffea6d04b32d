package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/tracing"
	"github.com/credence-iam/credence/cmd/internal/program"
)

// sources are what metrics ask of the parts that build makes.
func (p *parts) sources() admin.Sources {
	s := admin.Sources{
		Cache: p.sessions.Stats,
		Audit: func() admin.AuditStats {
			queued, capacity := p.decisions.Queued()
			return admin.AuditStats{Queued: queued, Capacity: capacity, Lost: p.decisions.Lost()}
		},
		Certificate:     p.pair.NotAfter,
		BaseCredentials: p.sts.BaseExpiration,
		ClockSkew:       p.sts.ClockSkew,
		InformerAge:     p.informerAge,
		LiveReads:       p.directory.Reads,
		VerificationAge: p.verifier.Age,
		TokensWaiting:   p.verifier.Waiting,
		Events: func() admin.EventStats {
			stats := p.events.Stats()
			return admin.EventStats{Queued: stats.Queued, Written: stats.Written, Suppressed: stats.Suppressed, Dropped: stats.Dropped}
		},
	}
	if reviews, ok := p.verifier.(*kube.TokenReview); ok {
		s.TokenReviews = reviews.UnderWay
	}
	if p.traces != nil {
		s.Spans = func() admin.SpanStats {
			ended, exported := p.traces.Spans()
			return admin.SpanStats{Ended: ended, Exported: exported}
		}
	}
	return s
}

// informerAge is that of the watch that has heard nothing for longest.
func (p parts) informerAge() time.Duration {
	age := p.directory.Age()
	if p.endpoints != nil {
		age = max(age, p.endpoints.Age())
	}
	return age
}

// traced returns what the cache fetches from: STS, with a span for each call where traces are asked for.
func (p *parts) traced(ctx context.Context, o options) (credential.Source[policy.Grant], error) {
	if o.traceEndpoint == "" {
		return p.sts, nil
	}
	var err error
	p.traces, err = tracing.New(ctx, tracing.Config{Endpoint: o.traceEndpoint, Ratio: o.traceRatio, Version: program.Version(), Logger: p.log})
	if err != nil {
		return nil, fmt.Errorf("--trace-endpoint: %w", err)
	}
	return tracing.Source(p.traces, p.sts, func(g policy.Grant) string { return g.Role().String() }), nil
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

// interceptors are what calls go through; none where nothing is traced.
func (p parts) interceptors() []grpc.UnaryServerInterceptor {
	if p.traces == nil {
		return nil
	}
	return []grpc.UnaryServerInterceptor{p.traces.Interceptor()}
}

// debugPages returns the debug pages with their listener; nil where there are none.
func (p parts) debugPages(ctx context.Context, o options) (net.Listener, http.Handler, error) {
	if o.debugListen == "" {
		return nil, nil, nil
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", o.debugListen)
	if err != nil {
		return nil, nil, fmt.Errorf("--%s: %w", debugListenFlag, err)
	}
	loopback := admin.Loopback(listener.Addr())
	if !loopback {
		p.log.WarnContext(ctx, "The debug pages take orders from whoever reaches them, and are not on loopback", "address", listener.Addr().String())
	}
	handler, err := admin.Debug(admin.DebugConfig{Sessions: p.sessions, Audit: p.decisions, Logger: p.log, AnyAddress: !loopback})
	return listener, handler, err
}
