package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/connlimit"
	"github.com/credence-iam/credence/broker/identity"
)

// Bounds of one connection.
const (
	// maxRequest: the request is empty, and fields that a later sidecar may add are small.
	maxRequest = 4 << 10
	// maxHeaders: one token and the few headers of gRPC.
	maxHeaders = identity.MaxTokenBytes + 4<<10
	// maxStreams: a sidecar or a health check makes one call on a connection.
	maxStreams = 1
	// maxHandshake bounds the bytes of a handshake. Go's has 1.7 kB, with a post-quantum key share; other clients may send more
	// extensions. It includes bytes that the client sends immediately after the handshake.
	maxHandshake = 16 << 10
	// maxCallBytes bounds the bytes between handshake and response, and between responses: one header block, one message, the
	// frames of HTTP/2 itself, and the bytes of TLS. So a client cannot send PINGs, SETTINGS or resets for long.
	maxCallBytes = maxHeaders + maxRequest + 4<<10
	// socketBuffer is enough for a call, in both directions. The kernel uses twice as much.
	socketBuffer = 16 << 10
	// bufferSize is the size of the write buffer. A response has about 2 kB. Only TLS buffers reads.
	bufferSize = 4 << 10
	// window is the minimum of HTTP/2. No request is larger than maxRequest.
	window = 64 << 10
	// streamWorkers handle calls one after the other. They reuse the stack that the verification of a signature has grown, see
	// docs/performance.md. If all of them wait for STS, further calls get their own goroutines.
	streamWorkers = 32
	// requestTime bounds the time from the acceptance of a connection until its request has arrived, with turns and handshake.
	// A sidecar with 50m of CPU (5 ms in each 100 ms) takes 2 ms at the median and 160 ms at most, of 40 measurements on two
	// busy processors.
	requestTime = 5 * time.Second
	// maxIdle is when the server closes connections that sidecars leave open after their call. Health checks that leave theirs
	// open for longer connect again.
	maxIdle = 5 * time.Second
	// idleTime is when the server cuts off a connection whose client did not close it as requested after maxIdle.
	idleTime = 2 * maxIdle
	// maxAge bounds the age of connections, so that new brokers get a share of the load and clients see renewed certificates.
	// gRPC adds 10 % of jitter.
	maxAge = 15 * time.Minute
	// maxAgeGrace is the time for the calls of an old connection to end. No call takes longer than a minute.
	maxAgeGrace = time.Minute
)

// Bounds of all connections. Their products are the memory that callers can make a broker use.
const (
	// maxUnauthenticated is the maximum of open connections whose token has not been verified.
	maxUnauthenticated = 560
	// maxAuthenticated is the maximum of further connections whose token has been verified, mostly with calls that wait for STS.
	// One namespace has all of them only if no other needs any. A caller that may have credentials can make its connection use
	// as much memory as any other caller. If there is no room for a call, its sidecar calls another broker, or calls again.
	maxAuthenticated = 1024
	// maxPerPod is the maximum of these for one pod. A sidecar makes one call at a time, and a second one to another broker. A
	// call that it has given up may remain for a moment.
	maxPerPod = 8
	// maxWaiting is the maximum of connections that wait for room, for example of pods that start together. Each is a socket.
	maxWaiting = 2048
	// HeldPerConnection is the maximum of memory, in bytes, that a connection uses before a handler runs: buffers of TLS and
	// HTTP/2, one stream with its headers, a header block that has not ended, and the stacks of its goroutines. An idle
	// connection uses 23 kB, and the worst one 187 kB; integration/siege/connections measures both.
	HeldPerConnection = 208 << 10
	// MaxHeldUnauthenticated is the maximum of memory, in bytes, that callers without a verified token can make a broker use. It
	// is less than a quarter of a broker's memory in the chart; integration/siege/connections compares them.
	MaxHeldUnauthenticated = (maxUnauthenticated + maxUnauthenticated/8) * HeldPerConnection
	// MaxHeld is the same for all callers, with those that have a verified token. It is less than three quarters of a broker's
	// memory in the chart. The rest is for sessions, pods and garbage.
	MaxHeld = MaxHeldUnauthenticated + maxAuthenticated*HeldPerConnection
)

// newConnections returns the limiter of a broker's connections.
func newConnections() (*connlimit.Limiter, error) {
	return connlimit.New(connlimit.Config{ //nolint:wrapcheck // The error names the cause.
		Max: maxUnauthenticated, MaxAuthenticated: maxAuthenticated, MaxPerCaller: maxPerPod, MaxWaiting: maxWaiting, RequestTime: requestTime, IdleTime: idleTime,
		// More handshakes at once would not end earlier, and would delay running calls.
		Handshakes:     runtime.GOMAXPROCS(0),
		HandshakeBytes: maxHandshake, RequestBytes: maxCallBytes, SocketBuffer: socketBuffer,
	})
}

// drainTime bounds how long a shutdown waits for running calls. Kubernetes gives a pod 30 s by default.
const drainTime = 20 * time.Second

// readyPoll is how often the health service checks readiness.
const readyPoll = 250 * time.Millisecond

// ServerConfig configures [Broker.Serve].
type ServerConfig struct {
	// Listener accepts connections. Serve closes it. Required.
	Listener net.Listener
	// TLS has the broker's serving certificate. Required.
	TLS *tls.Config
	// Ready reports whether this broker should receive calls, for the health service. Required.
	Ready func() bool
	// Interceptors intercept every call, in order. Default: none.
	Interceptors []grpc.UnaryServerInterceptor
	// Logger receives panics. Required.
	Logger *slog.Logger
}

// Serve serves calls and the standard gRPC health service until ctx ends. Then the health service reports NOT_SERVING, and
// Serve returns when the running calls have ended, after 20 s at most.
func (b *Broker) Serve(ctx context.Context, cfg ServerConfig) error {
	if cfg.Listener == nil || cfg.TLS == nil || cfg.Ready == nil || cfg.Logger == nil {
		return errors.New("a server needs a Listener, a TLS configuration, Ready and a Logger")
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
	go func() { served <- server.Serve(b.connections.Listen(cfg.Listener)) }()
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
	drain(state.Shutdown, server.GracefulStop, server.Stop)
	return nil
}

// drain first reports this broker as unhealthy. Then it waits until the running calls have ended, and cuts them off after
// drainTime.
func drain(reportUnhealthy, finish, cutOff func()) {
	reportUnhealthy()
	drained := make(chan struct{})
	go func() { finish(); close(drained) }()
	timeout := time.NewTimer(drainTime)
	defer timeout.Stop()
	select {
	case <-drained:
	case <-timeout.C:
		cutOff()
		<-drained
	}
}

// Connections returns the state of the broker's connections.
func (b *Broker) Connections() connlimit.Stats { return b.connections.Stats() }

// transport is TLS that reports its handshakes to the limiter, and lets handlers find the connection of their call.
type transport struct {
	credentials.TransportCredentials
}

// peerInfo has the TLS state of a connection, and the connection.
type peerInfo struct {
	credentials.TLSInfo
	conn *connlimit.Conn
}

// ServerHandshake implements credentials.TransportCredentials.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err //nolint:wrapcheck // gRPC examines it.
	}
	counted, ours := raw.(*connlimit.Conn)
	tls, ok := info.(credentials.TLSInfo)
	if !ours || !ok {
		return conn, info, nil
	}
	counted.Handshaken()
	return conn, peerInfo{tls, counted}, nil
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials {
	return transport{t.TransportCredentials.Clone()}
}

// connectionOf returns the connection of a call; nil if [Broker.Serve] did not receive the call.
func connectionOf(ctx context.Context) *connlimit.Conn {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, _ := p.AuthInfo.(peerInfo)
	return info.conn
}

// counted reports to the connection of a call when its request has arrived, and when the response is ready.
func counted(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if conn := connectionOf(ctx); conn != nil {
		conn.Begin()
		defer conn.End()
	}
	return handler(ctx, req)
}

// options returns the limits of the gRPC server and its keepalive, and turns panics into errors.
func options(cfg ServerConfig) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(transport{credentials.NewTLS(cfg.TLS)}),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.NumStreamWorkers(streamWorkers),
		grpc.ConnectionTimeout(requestTime),
		grpc.ReadBufferSize(0),
		grpc.WriteBufferSize(bufferSize),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: maxIdle, MaxConnectionAge: maxAge, MaxConnectionAgeGrace: maxAgeGrace,
		}),
		// The only stream is Watch of the health service. Any client may open one, and would not close it, so it would delay
		// every drain. Kubernetes and gRPC's own tools use Check.
		grpc.StreamInterceptor(func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
			return status.Error(codes.Unimplemented, "this server has no streams; use Check")
		}),
		grpc.ChainUnaryInterceptor(append(slices.Concat([]grpc.UnaryServerInterceptor{counted}, cfg.Interceptors), func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
			defer func() {
				if p := recover(); p != nil {
					// The request may hold a token; the stack's arguments are addresses only.
					cfg.Logger.ErrorContext(ctx, "Panicked while serving a call", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
					resp, err = nil, brokerpb.ToStatus(fmt.Errorf("panic: %v", p)).Err()
				}
			}()
			return handler(ctx, req)
		})...),
	}
}
