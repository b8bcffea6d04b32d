// Package client gets a pod's AWS session from the brokers. The sidecar imports it.
//
// It guarantees:
//   - It reads the pod's token from its file at each call, because the kubelet replaces it long before it expires. The
//     token leaves the process only over TLS, to a server that has proved the broker's name. No error contains it.
//   - It looks up and verifies brokers at each call. No connection and no back-off remains from an earlier one. Calls are
//     half an hour apart, so keeping a connection would save nothing. An idle sidecar has no timer, socket or goroutine.
//   - It calls the two owners of the session first. A broker that fails or does not respond costs little time, because
//     the client calls another one. It calls no broker twice in one call.
//   - It does not make an outage of all brokers worse, nor slow brokers slower: see [Client.Credentials].
//   - A call ends within 10 s, whatever brokers and DNS do. Only a look-up of the brokers' name without a
//     response continues, for up to 30 s. The next call uses its result.
//   - A response that is incomplete, expired or too large never becomes a lease.
//
// It does not retry when all brokers have failed, and it keeps no session. The caller does both.
//
// Each attempt is a gRPC connection to one address. gRPC's balancers call another address if they cannot connect, but not
// if a broker does not respond or is shutting down. A balancer of our own would not learn of either, and would keep
// connections between calls.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
)

// callTimeout limits one call, from the look-up of the brokers' name to the response of the last broker. A broker waits
// up to 2 s for a pod that it does not know yet, and STS responds within a second or two. A call that times out loses
// nothing: the brokers continue, and the next call gets the result.
const callTimeout = 10 * time.Second

const (
	// maxAnswer limits the response message. A session has about 1.5 kB. AWS does not limit the length of its token, but
	// refuses requests with larger headers than this.
	maxAnswer = 64 << 10

	// maxName is the longest DNS name, with its final dot.
	maxName = 254

	// bufferSize is the size of a connection's read and write buffers. One response fits. gRPC's two buffers of 32 kB
	// would be the largest allocations of the sidecar.
	bufferSize = 4 << 10
)

// Config configures [New].
type Config struct {
	// Target is HOST:PORT. The addresses of HOST are those of the brokers. Required.
	Target string
	// RoutingKey determines which brokers own this pod's session. Empty: each call uses a random order.
	RoutingKey policy.RoutingKey
	// TLS verifies each broker. If it has no server name, the certificate must match the host of Target. Required.
	// certs.ClientConfig returns one that reads its roots at each handshake.
	TLS *tls.Config
	// TokenFile has the pod's token for the broker's audience. It need not exist yet. Required.
	TokenFile string
	// DNSName is looked up for the brokers' addresses, for example the host of Target with the cluster's domain and a
	// final dot, which keeps resolvers from trying search domains. If it does not exist, the host of Target is looked up.
	// TLS does not verify it. Empty: the host of Target.
	DNSName string
	// Lookup returns the addresses of a host in network "ip4" or "ip6", and returns soon after ctx ends. If the host has
	// no such address, it returns a [*net.DNSError] with IsNotFound, or no address. It may be called again for a host
	// while it runs, and then sends another query. Nil: Go's resolver.
	Lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	// Dial opens a connection to addr, IP:PORT. Nil: TCP, never through a proxy.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
}

// Client calls the brokers behind one name. Make it with [New]. Its methods may be called concurrently.
type Client struct {
	target    string
	port      uint16
	key       policy.RoutingKey
	tokenFile string
	options   []grpc.DialOption
	addresses addresses
	hedges    budget
}

// New returns a client. It does not resolve the target, connect, or read the token.
func New(cfg Config) (*Client, error) {
	host, port, err := splitTarget(cfg.Target)
	switch {
	case err != nil:
		return nil, fmt.Errorf("creating broker client: %w", err)
	case cfg.TLS == nil:
		return nil, errors.New("creating broker client: no TLS configuration; a token is never sent in plain text")
	case cfg.TokenFile == "":
		return nil, errors.New("creating broker client: no token file")
	}
	names := []string{host}
	if _, err := netip.ParseAddr(host); err != nil && cfg.DNSName != "" {
		if len(cfg.DNSName) > maxName || strings.ContainsAny(cfg.DNSName, "/%: ") {
			return nil, fmt.Errorf("creating broker client: %.100q is not a DNS name; use the full name of the brokers with a final dot", cfg.DNSName)
		}
		names = []string{cfg.DNSName, host}
	}
	c := &Client{
		target:    cfg.Target,
		port:      port,
		key:       cfg.RoutingKey,
		tokenFile: cfg.TokenFile,
		options: []grpc.DialOption{
			grpc.WithTransportCredentials(credentials.NewTLS(cfg.TLS)),
			// HTTPS_PROXY of a pod is for the internet. The broker is not there, and a proxy must not see who calls it.
			grpc.WithNoProxy(),
			grpc.WithReadBufferSize(bufferSize),
			grpc.WithWriteBufferSize(bufferSize),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		},
		addresses: addresses{names: names, lookup: cfg.Lookup},
	}
	if cfg.TLS.ServerName == "" {
		// gRPC dials an address, but certificates are for the name.
		c.options = append(c.options, grpc.WithAuthority(cfg.Target))
	}
	if cfg.Dial != nil {
		c.options = append(c.options, grpc.WithContextDialer(cfg.Dial))
	}
	if c.addresses.lookup == nil {
		c.addresses.lookup = lookup
	}
	return c, nil
}

// splitTarget splits HOST:PORT.
func splitTarget(target string) (host string, port uint16, err error) {
	if target == "" {
		return "", 0, errors.New("no target; set the brokers' address as HOST:PORT")
	}
	host, text, err := net.SplitHostPort(target)
	number, malformed := strconv.ParseUint(text, 10, 16)
	// A gRPC target with a scheme has a slash. An IPv6 address with a zone, which is valid only on this node, has a percent sign.
	if err != nil || malformed != nil || number == 0 || host == "" || strings.ContainsAny(host, "/% ") {
		return "", 0, fmt.Errorf("target %q is not HOST:PORT, such as credence-broker.credence.svc:9443", target)
	}
	return host, uint16(number), nil
}

// Credentials requests the session of this pod's role.
//
// It calls the broker with the first rank for the routing key. It calls the next one immediately if a broker fails without
// saying anything about the pod, and a little later if a broker does not respond; the constants of this package say when.
// If a broker reports that a dependency of all brokers is unavailable, or has accepted the call and waits, Credentials
// calls hardly any broker but the owners. The first lease counts, and so does the first refusal, because all brokers have
// the same policy. Only that the token has expired must be confirmed by a second broker, if there is one: clocks differ.
//
// The lease is valid. Its RefreshAfter is between 30 s and 1 h. Its Issued is when this call began, not when the broker
// got the session from STS, which can be half a session duration earlier. So the lease's Duration is the time left of the
// session; only the broker knows the full session duration.
//
// The error is or wraps a [*credential.Error]. Its kind is credential.ErrUnavailable if no broker said anything about the
// pod: no address, no connection, an unverified server, no response in time, a token file that cannot be read. If several
// brokers failed, it is the error with the most detail. If a broker was called, the error has or wraps a method
// TraceID() string. The ID finds the call in the brokers' traces.
func (c *Client) Credentials(ctx context.Context) (credential.Lease, error) {
	token, err := readToken(c.tokenFile)
	if err != nil {
		return credential.Lease{}, err
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()

	found, current, err := c.addresses.find(ctx)
	if err != nil {
		return credential.Lease{}, err
	}
	ctx, traceID := begin(ctx)
	lease, err := c.newCall(token, began, found, current).run(ctx)
	if err != nil {
		return credential.Lease{}, failure{err, traceID}
	}
	return lease, nil
}
