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
	// maxRequest: the request is empty; what unknown fields a later sidecar may add is small.
	maxRequest = 4 << 10
	// maxHeaders: one token, and the few headers of gRPC itself.
	maxHeaders = identity.MaxTokenBytes + 4<<10
	// maxStreams: a sidecar makes one call on a connection, and a health check is one.
	maxStreams = 1
	// maxHandshake bounds the bytes of a handshake. Go's is 1.7 kB, with a post-quantum key share; those of others
	// may have more extensions. What the client sends at once behind it is read with it.
	maxHandshake = 16 << 10
	// maxCallBytes bounds what arrives between handshake and answer, and between answers: one header block, one message,
	// what HTTP/2 itself says, and TLS's own bytes. So neither PINGs, SETTINGS nor resets can go on for long.
	maxCallBytes = maxHeaders + maxRequest + 4<<10
	// socketBuffer is enough for a call, either way. The kernel takes twice as much.
	socketBuffer = 16 << 10
	// bufferSize is the size of the write buffer. A response is about 2 kB. TLS alone buffers reads.
	bufferSize = 4 << 10
	// window is the least that HTTP/2 has. Nothing larger comes in than maxRequest.
	window = 64 << 10
	// streamWorkers handle calls one after the other, and keep the stack that verifying a signature has grown
	// for the next: see docs/performance.md. When all are waiting for STS, further calls have goroutines of
	// their own.
	streamWorkers = 32
	// requestTime is how long a connection may take from when it is accepted until its request has arrived, turns and
	// handshake included. A sidecar with 50m of CPU (5 ms in each 100 ms) takes 2 ms at the median and 160 ms at most, of
	// 40 that were measured on two busy processors.
	requestTime = 5 * time.Second
	// maxIdle closes connections that sidecars have finished with, and leave open. Health checks that keep theirs
	// open longer than that connect again.
	maxIdle = 5 * time.Second
	// idleTime is when a connection is closed that does not heed being asked to close it, after maxIdle.
	idleTime = 2 * maxIdle
	// maxAge spreads load over new brokers, and moves clients to renewed certificates. gRPC adds
	// 10 % of jitter by itself.
	maxAge = 15 * time.Minute
	// maxAgeGrace lets the calls of an aged connection end; none takes longer than a minute.
	maxAgeGrace = time.Minute
)

// Bounds of all connections. Their products are what callers can make a broker hold.
const (
	// maxUnauthenticated is how many connections may be open whose token has not been verified.
	maxUnauthenticated = 560
	// maxAuthenticated is how many more may be open whose token has been: calls that wait for STS, mostly. One namespace
	// has all of them only while no other wants any. A caller that may have credentials can make its connection hold as much
	// as any other can, and a call that finds no room is made to another broker, or again.
	maxAuthenticated = 1024
	// maxPerPod is how many of them one pod may have. A sidecar makes one call at a time, and a second one to another
	// broker; a call that it has given up may be there for a moment.
	maxPerPod = 8
	// maxWaiting is how many connections may wait for room, such as those of pods that all start at once. Each is a socket.
	maxWaiting = 2048
	// HeldPerConnection is how many bytes of memory a connection holds at most before a handler runs: buffers of TLS and
	// HTTP/2, one stream with its headers, a block of headers that has not ended, and the stacks of its goroutines. A
	// silent one holds 23 kB, and one that was made to hold as much as it can, 187 kB; integration/siege/connections measures them.
	HeldPerConnection = 208 << 10
	// MaxHeldUnauthenticated is how many bytes callers can make a broker hold before it knows them. It is less than a
	// quarter of the memory that the chart gives a broker, which integration/siege/connections compares.
	MaxHeldUnauthenticated = (maxUnauthenticated + maxUnauthenticated/8) * HeldPerConnection
	// MaxHeld is how many bytes all callers can make a broker hold, those with a token included. It is less than three
	// quarters of the memory that the chart gives a broker. The rest is for sessions, pods and garbage.
	MaxHeld = MaxHeldUnauthenticated + maxAuthenticated*HeldPerConnection
)

// newConnections makes the bounds of all connections of a broker.
func newConnections() (*connlimit.Limiter, error) {
	return connlimit.New(connlimit.Config{ //nolint:wrapcheck // The error names the cause.
		Max: maxUnauthenticated, MaxAuthenticated: maxAuthenticated, MaxPerCaller: maxPerPod, MaxWaiting: maxWaiting, RequestTime: requestTime, IdleTime: idleTime,
		// More at once would not end earlier, and delay calls that are under way.
		Handshakes:     runtime.GOMAXPROCS(0),
		HandshakeBytes: maxHandshake, RequestBytes: maxCallBytes, SocketBuffer: socketBuffer,
	})
}

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

// drain first says that this broker is not to be asked, then lets the calls under way end, and cuts them off if they take
// longer than drainTime.
func drain(sayNo, finish, cutOff func()) {
	sayNo()
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

// transport is TLS that reports its handshakes, and lets handlers find the connection of their call.
type transport struct {
	credentials.TransportCredentials
}

// peerInfo is what TLS knows of the peer, and the connection.
type peerInfo struct {
	credentials.TLSInfo
	conn *connlimit.Conn
}

// ServerHandshake implements credentials.TransportCredentials.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err //nolint:wrapcheck // gRPC looks at it.
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

// connectionOf returns the connection of a call; nil if it came by another way than [Broker.Serve].
func connectionOf(ctx context.Context) *connlimit.Conn {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, _ := p.AuthInfo.(peerInfo)
	return info.conn
}

// counted tells the connection of a call that its request has arrived, and later, that it has been answered.
func counted(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if conn := connectionOf(ctx); conn != nil {
		conn.Begin()
		defer conn.End()
	}
	return handler(ctx, req)
}

// options are the bounds of a gRPC server, its keepalive, and panics turned into errors.
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
		// Nothing here streams but the health service's Watch, which anybody may open and nobody would
		// close: it would hold up every drain. Kubernetes and gRPC's own tools use Check.
		grpc.StreamInterceptor(func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
			return status.Error(codes.Unimplemented, "this server has no streams; use Check")
		}),
		grpc.ChainUnaryInterceptor(append(slices.Concat([]grpc.UnaryServerInterceptor{counted}, cfg.Interceptors), func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
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
