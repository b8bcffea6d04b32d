// Package client asks the brokers for the credentials of the pod that it runs in. It is what the
// sidecar imports of the broker.
//
// It promises that
//   - the pod's token is read from its file at each call, because the kubelet replaces it there long
//     before it expires; it leaves the process only over TLS, to a server that has proved the broker's
//     name, and is in no error;
//   - brokers are found and verified anew at each call: no connection and no back-off of an earlier
//     failure stays behind. Calls are half an hour apart, so keeping one would save nothing, and an
//     idle sidecar has no timer, no socket and no goroutine for it;
//   - the two brokers that have the session warm are asked first, and a broker that fails or is silent
//     costs little: another one is asked. Nobody is asked twice in one call;
//   - what ails all brokers, and a cluster of slow ones, is not made worse by it: see [Client.Credentials];
//   - a call ends within [CallTimeout], whatever brokers and DNS do. Nothing of it continues but a look-up of the
//     brokers' name that has no answer yet, for up to 30 s: the next call uses its result;
//   - an answer that is incomplete, expired or too large never becomes a lease.
//
// It does not ask again when all brokers have failed, and it keeps no credentials: both are the
// caller's part.
//
// Each attempt is a gRPC connection to one address. gRPC's own balancers turn to another address when
// they cannot connect, and not when a broker is silent or says that it is leaving; one of our own would be
// told of neither, and would keep connections between calls.
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

// CallTimeout bounds one call, from the look-up of the brokers' name to the answer of the last broker that
// is asked. A broker waits up to 2 s for a pod that it does not know yet, and STS answers within a second
// or two. A call that is given up loses nothing: the brokers go on, and the next call finds the result.
const CallTimeout = 10 * time.Second

const (
	// maxAnswer bounds the whole message. A session is about 1.5 kB. AWS gives its token no bound,
	// but refuses requests whose headers are larger than this.
	maxAnswer = 64 << 10

	// maxName is the longest DNS name, with its final dot.
	maxName = 254

	// bufferSize of a connection, each way. One answer fits, and gRPC's own 32 kB twice would be the
	// largest allocations of the sidecar.
	bufferSize = 4 << 10
)

// Config says which brokers to ask, and as whom.
type Config struct {
	// Target is HOST:PORT. The addresses of HOST are those of the brokers. Required.
	Target string
	// RoutingKey says which of them have this pod's session warm. Empty: any is as good, and each call
	// asks them in an order of its own.
	RoutingKey policy.RoutingKey
	// TLS verifies each broker. Where it names no server, the host of Target must match. Required;
	// certs.ClientConfig makes one that reads its roots at each handshake.
	TLS *tls.Config
	// TokenFile holds the pod's token for the broker's audience. Required. It need not exist yet.
	TokenFile string
	// DNSName is the name that is looked up for the brokers' addresses, such as the host of Target with the cluster's
	// domain and a final dot, which keeps resolvers from trying search domains. If it is not found, the host of Target
	// is looked up. It is not what TLS verifies. Zero: the host of Target.
	DNSName string
	// Lookup returns the addresses of a host, of network "ip4" or "ip6", and returns soon after ctx ends. If the host
	// has none of that family, it returns a [*net.DNSError] with IsNotFound, or no address. It may be called again for a
	// host while it runs, and sends another query then. Zero: Go's resolver.
	Lookup func(ctx context.Context, network, host string) ([]netip.Addr, error)
	// Dial opens connections instead of the network; addr is IP:PORT. Zero: TCP, never through a proxy.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
}

// Client asks the brokers behind one name. Make it with [New]. Its methods may be called concurrently.
type Client struct {
	target    string
	port      uint16
	key       policy.RoutingKey
	tokenFile string
	options   []grpc.DialOption
	addresses addresses
	hedges    budget
}

// New checks cfg. It neither looks up nor connects, and does not read the token.
func New(cfg Config) (*Client, error) {
	host, port, err := splitTarget(cfg.Target)
	switch {
	case err != nil:
		return nil, fmt.Errorf("making broker client: %w", err)
	case cfg.TLS == nil:
		return nil, errors.New("making broker client: no TLS configuration: a token is never sent in the clear")
	case cfg.TokenFile == "":
		return nil, errors.New("making broker client: no token file")
	}
	names := []string{host}
	if _, err := netip.ParseAddr(host); err != nil && cfg.DNSName != "" {
		if len(cfg.DNSName) > maxName || strings.ContainsAny(cfg.DNSName, "/%: ") {
			return nil, fmt.Errorf("making broker client: %.100q is no DNS name: want the full name of the brokers with a final dot", cfg.DNSName)
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
			// Pods have HTTPS_PROXY set for the internet's sake. The broker is not there, and a proxy
			// must not see who talks to it.
			grpc.WithNoProxy(),
			grpc.WithReadBufferSize(bufferSize),
			grpc.WithWriteBufferSize(bufferSize),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		},
		addresses: addresses{names: names, lookup: cfg.Lookup},
	}
	if cfg.TLS.ServerName == "" {
		// What is dialed is an address, and it is the name that certificates are for.
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

// splitTarget takes HOST:PORT apart.
func splitTarget(target string) (host string, port uint16, err error) {
	if target == "" {
		return "", 0, errors.New("no target: give the brokers' address as HOST:PORT")
	}
	host, text, err := net.SplitHostPort(target)
	number, malformed := strconv.ParseUint(text, 10, 16)
	// A target of gRPC, with its scheme, has a slash; and an address that only this node knows has a percent sign.
	if err != nil || malformed != nil || number == 0 || host == "" || strings.ContainsAny(host, "/% ") {
		return "", 0, fmt.Errorf("target %q is not HOST:PORT, such as credence-broker.credence.svc:9443", target)
	}
	return host, uint16(number), nil
}

// Credentials asks for the session of this pod's role.
//
// The broker that is first in rank for the routing key is asked. The next in rank is asked at once when
// one could not say anything about the pod, and a little later while one is silent; how much later is said
// with the constants of this package. When a broker says that what all brokers depend on is away, or has taken the
// call and waits, hardly any but those that may hold the session are asked. The first lease counts, and so does the first refusal: policy is the
// same in all brokers. Only that the token has expired must be said by two of them, where there are two: clocks differ.
//
// The lease is valid, and its RefreshAfter lies between 30 s and 1 h. Its Issued is when this call
// began, not when the broker had the session from STS, which can be half a life earlier: a lease's
// Life is what was left of the session, and its full length is known to the broker alone.
//
// The error is or wraps a [*credential.Error]. Its kind is credential.ErrUnavailable whenever nothing was said
// about the pod: no address, no connection, an unverified server, no answer in time, a token file that cannot
// be read. Where several brokers have failed, it is the error that tells most.
// Where a broker was called, the error has or wraps one that has a method TraceID() string, with
// which the call is found in the brokers' traces.
func (c *Client) Credentials(ctx context.Context) (credential.Lease, error) {
	token, err := readToken(c.tokenFile)
	if err != nil {
		return credential.Lease{}, err
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, CallTimeout)
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
