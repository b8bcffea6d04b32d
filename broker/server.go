package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"slices"
	"time"

	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/identity"
)

// Bounds of one connection.
const (
	// maxRequest: the request is empty; what unknown fields a later sidecar may add is small.
	maxRequest = 4 << 10
	// maxHeaders: one token, and the few headers of gRPC itself.
	maxHeaders = identity.MaxTokenBytes + 4<<10
	// maxStreams: a sidecar makes one call at a time.
	maxStreams = 16
	// maxConnections bounds what strangers can make us hold. A sidecar closes its connection after each
	// call, so this many are calls under way; at some 50 kB each they take 200 MB.
	maxConnections = 4096
	// streamWorkers handle calls one after the other, and keep the stack that verifying a signature has grown
	// for the next: see docs/performance.md. When all are waiting for STS, further calls have goroutines of
	// their own.
	streamWorkers = 32
	// handshakeTimeout ends connections that never say anything.
	handshakeTimeout = 10 * time.Second
	// maxIdle closes connections that sidecars have finished with.
	maxIdle = time.Minute
	// maxAge spreads load over new brokers, and moves clients to renewed certificates. gRPC adds
	// 10 % of jitter by itself.
	maxAge = 15 * time.Minute
	// maxAgeGrace lets the calls of an aged connection end; none takes longer than a minute.
	maxAgeGrace = time.Minute
)

// drainTime bounds the wait for calls that are under way when the broker is told to end. Kubernetes
// gives a pod 30 s by default.
const drainTime = 20 * time.Second

// readyPoll is how often readiness is looked at for the health service.
const readyPoll = 250 * time.Millisecond

// ServerConfig configures [Broker.Serve].
type ServerConfig struct {
	// Listener accepts connections. Required; Serve closes it.
	Listener net.Listener
	// TLS proves the broker. Required.
	TLS *tls.Config
	// Ready says whether this broker should be asked, for the health service. Required.
	Ready func() bool
	// Interceptors see every call, the first one first. Default: none.
	Interceptors []grpc.UnaryServerInterceptor
	// Logger is told of panics. Required.
	Logger *slog.Logger
}

// Serve answers calls, with the standard gRPC health service beside it, until ctx ends. Then it reports
// itself unhealthy, lets the calls under way end, and returns.
func (b *Broker) Serve(ctx context.Context, cfg ServerConfig) error {
	if cfg.Listener == nil || cfg.TLS == nil || cfg.Ready == nil || cfg.Logger == nil {
		return errors.New("serving needs a Listener, a TLS configuration, Ready and a Logger")
	}
	server := grpc.NewServer(options(cfg)...)
	brokerpb.RegisterBrokerServer(server, b)
	state := health.NewServer()
	healthpb.RegisterHealthServer(server, state)
	set := func(s healthpb.HealthCheckResponse_ServingStatus) {
		state.SetServingStatus("", s)
		state.SetServingStatus(brokerpb.Broker_ServiceDesc.ServiceName, s)
	}
	set(healthpb.HealthCheckResponse_NOT_SERVING)

	served := make(chan error, 1)
	go func() { served <- server.Serve(netutil.LimitListener(cfg.Listener, maxConnections)) }()
	ticker := time.NewTicker(readyPoll)
	defer ticker.Stop()
	for healthy := false; ctx.Err() == nil; {
		select {
		case err := <-served:
			return fmt.Errorf("serving gRPC: %w", err)
		case <-ticker.C:
			if now := cfg.Ready(); now != healthy {
				healthy = now
				if healthy {
					set(healthpb.HealthCheckResponse_SERVING)
				} else {
					set(healthpb.HealthCheckResponse_NOT_SERVING)
				}
			}
		case <-ctx.Done():
		}
	}
	state.Shutdown()
	drained := make(chan struct{})
	go func() { server.GracefulStop(); close(drained) }()
	timeout := time.NewTimer(drainTime)
	defer timeout.Stop()
	select {
	case <-drained:
	case <-timeout.C:
		server.Stop()
		<-drained
	}
	return nil
}

// options are the bounds of a gRPC server, its keepalive, and panics turned into errors.
func options(cfg ServerConfig) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(credentials.NewTLS(cfg.TLS)),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: maxIdle, MaxConnectionAge: maxAge, MaxConnectionAgeGrace: maxAgeGrace,
		}),
		// Nothing here streams but the health service's Watch, which anybody may open and nobody would
		// close: it would hold up every drain. Kubernetes and gRPC's own tools use Check.
		grpc.StreamInterceptor(func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
			return status.Error(codes.Unimplemented, "this server has no streams; use Check")
		}),
		grpc.ChainUnaryInterceptor(append(slices.Clone(cfg.Interceptors), func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
			defer func() {
				if p := recover(); p != nil {
					// The request may hold a token; the stack's arguments are addresses only.
					cfg.Logger.ErrorContext(ctx, "Panic while answering", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
					resp, err = nil, brokerpb.ToStatus(fmt.Errorf("panic: %v", p)).Err()
				}
			}()
			return handler(ctx, req)
		})...),
	}
}
