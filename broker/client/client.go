// Package client asks the broker for the credentials of the pod that it runs in. It is what the
// sidecar imports of the broker.
//
// It promises that
//   - the pod's token is read from its file at each call, because the kubelet replaces it there long
//     before it expires; it leaves the process only over TLS, and is in no error;
//   - the broker is found and verified anew at each call: no connection, no address and no back-off
//     of an earlier failure stays behind. Calls are half an hour apart, so keeping one would save
//     nothing, and an idle sidecar has no timer, no socket and no goroutine for it;
//   - a call ends within [AttemptTimeout], whatever the broker does;
//   - an answer that is incomplete, expired or too large never becomes a lease.
//
// It does not retry, and it keeps no credentials: both are the caller's part.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
)

// AttemptTimeout bounds one call from the look-up of the broker's name to its answer. The broker
// waits up to 2 s for a pod that it does not know yet, and STS answers within a second or two. A
// call that is given up loses nothing: the broker goes on, and the next call finds the result.
const AttemptTimeout = 10 * time.Second

const (
	// maxAnswer bounds the whole message. A session is about 1.5 kB. AWS gives its token no bound,
	// but refuses requests whose headers are larger than this.
	maxAnswer = 64 << 10

	// bufferSize of a connection, each way. One answer fits, and gRPC's own 32 kB twice would be the
	// largest allocations of the sidecar.
	bufferSize = 4 << 10

	// A wrong refresh_after must neither make sidecars storm nor silence them for longer than a
	// session of the default length.
	minRefreshAfter = 30 * time.Second
	maxRefreshAfter = time.Hour
)

// Lengths from the STS API reference (accessKeyIdType), and what regions are made of: both end in
// logs and in answers to other programs.
var (
	accessKeyForm = regexp.MustCompile(`^\w{1,128}$`)
	regionForm    = regexp.MustCompile(`^[a-z0-9-]{0,64}$`)
)

// Config says which broker to ask, and as whom.
type Config struct {
	// Target is the broker's address as gRPC takes it, "host:port" as a rule. Required.
	Target string
	// TLS verifies the broker. Where it names no server, the host of Target must match. Required;
	// certs.ClientConfig makes one that reads its roots at each handshake.
	TLS *tls.Config
	// TokenFile holds the pod's token for the broker's audience. Required. It need not exist yet.
	TokenFile string
	// Dial opens connections instead of the network; addr is the address Target resolved to. Zero:
	// TCP, never through a proxy.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
}

// Client asks one broker, or one of the replicas behind one name. Make it with [New]. Its methods may be called concurrently.
type Client struct {
	target    string
	tokenFile string
	options   []grpc.DialOption
}

// New checks cfg. It neither connects nor reads the token.
func New(cfg Config) (*Client, error) {
	switch {
	case cfg.Target == "":
		return nil, errors.New("making broker client: no target: give the broker's address as host:port")
	case cfg.TLS == nil:
		return nil, errors.New("making broker client: no TLS configuration: a token is never sent in the clear")
	case cfg.TokenFile == "":
		return nil, errors.New("making broker client: no token file")
	}
	c := &Client{
		target:    cfg.Target,
		tokenFile: cfg.TokenFile,
		options: []grpc.DialOption{
			grpc.WithTransportCredentials(credentials.NewTLS(cfg.TLS)),
			// Pods have HTTPS_PROXY set for the internet's sake. The broker is not there, and a proxy
			// must not see who talks to it.
			grpc.WithNoProxy(),
			// Whoever answers DNS must not set retries or timeouts, and a look-up of TXT records
			// delays each call where the cluster's DNS is slow to say that there are none.
			grpc.WithDisableServiceConfig(),
			grpc.WithReadBufferSize(bufferSize),
			grpc.WithWriteBufferSize(bufferSize),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		},
	}
	if cfg.Dial != nil {
		c.options = append(c.options, grpc.WithContextDialer(cfg.Dial))
	}
	conn, err := c.dial() // only to have the target parsed: gRPC connects with the first call
	if err != nil {
		return nil, err
	}
	return c, conn.Close()
}

// Credentials asks for the session of this pod's role.
//
// The lease is valid, and its RefreshAfter lies between 30 s and 1 h. Its Issued is when this call
// began, not when the broker had the session from STS, which can be half a life earlier: a lease's
// Life is what was left of the session, and its full length is known to the broker alone.
//
// The error is or wraps a [*credential.Error]. Its kind is credential.ErrUnavailable whenever nothing was said
// about the pod: no connection, an unverified server, no answer in time, a token file that cannot be read.
// Where the broker was called, the error has or wraps one that has a method TraceID() string, with
// which the call is found in the broker's traces.
func (c *Client) Credentials(ctx context.Context) (credential.Lease, error) {
	token, err := readToken(c.tokenFile)
	if err != nil {
		return credential.Lease{}, err
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, AttemptTimeout)
	defer cancel()

	conn, err := c.dial()
	if err != nil {
		return credential.Lease{}, err
	}
	defer conn.Close()
	ctx, traceID := begin(ctx)
	answer, err := brokerpb.NewBrokerClient(conn).GetCredentials(ctx,
		&brokerpb.GetCredentialsRequest{}, grpc.PerRPCCredentials(bearer{token}))
	if err != nil {
		return credential.Lease{}, failure{fmt.Errorf("asking broker %s: %w", c.target, brokerpb.FromError(err)), traceID}
	}
	lease, err := leaseOf(answer, began)
	if err != nil {
		return credential.Lease{}, failure{&credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonInternal,
			Message: fmt.Sprintf("the answer of broker %s is of no use: %v", c.target, err),
		}, traceID}
	}
	return lease, nil
}

func (c *Client) dial() (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient(c.target, c.options...)
	if err != nil {
		return nil, fmt.Errorf("parsing broker target %q: %w", c.target, err)
	}
	return conn, nil
}

// leaseOf checks an answer whose size gRPC has bounded already. Its errors quote nothing but times
// and the role.
func leaseOf(answer *brokerpb.GetCredentialsResponse, began time.Time) (credential.Lease, error) {
	if !accessKeyForm.MatchString(answer.GetAccessKeyId()) {
		return credential.Lease{}, errors.New("it has no access key id of 1 to 128 letters, digits and underscores")
	}
	if answer.GetSecretAccessKey() == "" || answer.GetSessionToken() == "" {
		return credential.Lease{}, errors.New("it lacks the secret access key or the session token")
	}
	if !regionForm.MatchString(answer.GetRegion()) {
		return credential.Lease{}, errors.New("its region is not of the form eu-central-1")
	}
	role, err := credential.ParseRoleARN(answer.GetRoleArn())
	if err != nil {
		return credential.Lease{}, fmt.Errorf("parsing its role: %w", err)
	}
	if answer.GetAccountId() != role.Account() {
		return credential.Lease{}, fmt.Errorf("its account is not that of the role %s", role)
	}
	if err := answer.GetExpiration().CheckValid(); err != nil {
		return credential.Lease{}, errors.New("it has no expiration")
	}
	expiration := answer.GetExpiration().AsTime()
	if now := time.Now(); !now.Before(expiration) {
		return credential.Lease{}, fmt.Errorf("it expired at %s, and it is %s here: compare the clocks of this node and of the broker's",
			expiration.Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return credential.Lease{
		Credential: credential.Credential{
			AccessKeyID:     answer.GetAccessKeyId(),
			SecretAccessKey: credential.NewSecret(answer.GetSecretAccessKey()),
			SessionToken:    credential.NewSecret(answer.GetSessionToken()),
			Issued:          began,
			Expiration:      expiration,
		},
		Role:         role,
		Region:       answer.GetRegion(),
		RefreshAfter: min(max(answer.GetRefreshAfter().AsDuration(), minRefreshAfter), maxRefreshAfter),
	}, nil
}

// bearer presents a token as per-call metadata.
type bearer struct{ token identity.UnverifiedToken }

// GetRequestMetadata implements [credentials.PerRPCCredentials].
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token.Reveal()}, nil
}

// RequireTransportSecurity implements [credentials.PerRPCCredentials]: gRPC refuses to send the
// token over anything but TLS.
func (bearer) RequireTransportSecurity() bool { return true }

// readToken reads a token and drops the newline that editors and shells leave at its end. Its errors
// never quote the content.
func readToken(file string) (identity.UnverifiedToken, error) {
	text, err := readBounded(file, identity.MaxTokenBytes)
	if err == nil {
		text = bytes.TrimRight(text, "\r\n")
		switch {
		case len(text) == 0:
			err = fmt.Errorf("%s is empty", file)
		// What is no JWT anyway could break out of the header.
		case bytes.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r >= 0x7f }):
			err = fmt.Errorf("%s holds something else", file)
		}
	}
	if err != nil {
		return identity.UnverifiedToken{}, &credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonTokenMissing,
			Message: fmt.Sprintf("the pod's token cannot be read: %v", err),
		}
	}
	return identity.NewUnverifiedToken(string(text)), nil
}

func readBounded(file string, most int) ([]byte, error) {
	f, err := os.Open(file) //nolint:gosec // G304: the file that the program was told
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, int64(most)+1))
	if err != nil {
		return nil, err
	}
	if len(content) > most {
		return nil, fmt.Errorf("%s is longer than %d bytes", file, most)
	}
	return content, nil
}
