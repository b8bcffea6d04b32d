package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
)

const token = "header.claims.signature"

// server is a real gRPC server. The test sets its response.
type server struct {
	brokerpb.UnimplementedBrokerServer

	respond func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error)
	calls   atomic.Int32
	open    atomic.Int32 // open connections
}

func (s *server) GetCredentials(ctx context.Context, _ *brokerpb.GetCredentialsRequest) (*brokerpb.GetCredentialsResponse, error) {
	s.calls.Add(1)
	return s.respond(ctx)
}

// listen serves s over TLS, and returns its address with the host name localhost.
func (s *server) listen(t *testing.T, leaf *certstest.Leaf) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.serve(t, listener, credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{leaf.TLS()},
	}))
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return "localhost:" + port
}

func (s *server) serve(t *testing.T, listener net.Listener, creds credentials.TransportCredentials) {
	g := grpc.NewServer(grpc.Creds(creds))
	brokerpb.RegisterBrokerServer(g, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(&countingListener{listener, &s.open})
	}()
	t.Cleanup(func() { g.Stop(); <-done })
}

// countingListener counts the open connections.
type countingListener struct {
	net.Listener
	open *atomic.Int32
}

func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.open.Add(1)
	return &countingConn{Conn: conn, open: l.open}, nil
}

type countingConn struct {
	net.Conn
	open   *atomic.Int32
	closed atomic.Bool
}

func (c *countingConn) Close() error {
	if !c.closed.Swap(true) {
		c.open.Add(-1)
	}
	return c.Conn.Close()
}

// good returns a valid response.
func good() *brokerpb.GetCredentialsResponse {
	return &brokerpb.GetCredentialsResponse{
		AccessKeyId: "ASIAEXAMPLE", SecretAccessKey: "secret-key-text", SessionToken: "session-token-text",
		Expiration:   timestamppb.New(time.Now().Add(time.Hour)),
		RefreshAfter: durationpb.New(25 * time.Minute),
		RoleArn:      "arn:aws:iam::123456789012:role/team/app", AccountId: "123456789012", Region: "eu-central-1",
	}
}

func responding(r *brokerpb.GetCredentialsResponse) func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
	return func(context.Context) (*brokerpb.GetCredentialsResponse, error) { return r, nil }
}

func writeToken(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// world has a broker and a client that trusts it.
type world struct {
	*client.Client
	server    *server
	tokenFile string
	caDir     string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ca := certstest.NewCA(t)
	w := &world{
		server:    &server{respond: responding(good())},
		tokenFile: filepath.Join(t.TempDir(), "token"),
		caDir:     t.TempDir(),
	}
	writeToken(t, w.tokenFile, token)
	roots, err := certs.NewRoots(ca.WriteTo(w.caDir), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.Client, err = client.New(client.Config{
		Target:    w.server.listen(t, ca.Leaf("localhost")),
		TLS:       certs.ClientConfig(roots, ""),
		TokenFile: w.tokenFile,
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestNewRefuses(t *testing.T) {
	valid := client.Config{Target: "localhost:1", TLS: &tls.Config{MinVersion: tls.VersionTLS13}, TokenFile: "token"}
	tests := map[string]struct {
		change func(*client.Config)
		want   string
	}{
		"no target":        {func(c *client.Config) { c.Target = "" }, "no target"},
		"target of gRPC":   {func(c *client.Config) { c.Target = "dns:///localhost:1" }, "is not HOST:PORT"},
		"target of a file": {func(c *client.Config) { c.Target = "unix:/broker" }, "is not HOST:PORT"},
		"no port":          {func(c *client.Config) { c.Target = "localhost" }, "is not HOST:PORT"},
		"no host":          {func(c *client.Config) { c.Target = ":1" }, "is not HOST:PORT"},
		"port with a name": {func(c *client.Config) { c.Target = "localhost:grpc" }, "is not HOST:PORT"},
		"port 0":           {func(c *client.Config) { c.Target = "localhost:0" }, "is not HOST:PORT"},
		"high port":        {func(c *client.Config) { c.Target = "localhost:65536" }, "is not HOST:PORT"},
		"zone":             {func(c *client.Config) { c.Target = "[fe80::1%eth0]:1" }, "is not HOST:PORT"},
		"no TLS":           {func(c *client.Config) { c.TLS = nil }, "no TLS"},
		"no token":         {func(c *client.Config) { c.TokenFile = "" }, "no token file"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := valid
			test.change(&cfg)
			c, err := client.New(cfg)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("New = %v, want an error that contains %q", err, test.want)
			}
			if c != nil {
				t.Error("New returned a client with its error")
			}
		})
	}
	for _, target := range []string{"localhost:1", "credence-broker.credence.svc:9443", "10.0.0.1:65535", "[fd00::1]:9443"} {
		valid.Target = target
		if _, err := client.New(valid); err != nil {
			t.Errorf("New with %s: %v", target, err)
		}
	}
}

func TestLease(t *testing.T) {
	w := newWorld(t)
	response := good()
	w.server.respond = responding(response)
	before := time.Now()
	lease, err := w.Credentials(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if lease.Issued.Before(before) || lease.Issued.After(time.Now()) {
		t.Errorf("Issued = %v, want the time of the call", lease.Issued)
	}
	role, err := credential.ParseRoleARN("arn:aws:iam::123456789012:role/team/app")
	if err != nil {
		t.Fatal(err)
	}
	want := credential.Lease{
		Credential: credential.Credential{
			AccessKeyID:     "ASIAEXAMPLE",
			SecretAccessKey: credential.NewSecret("secret-key-text"),
			SessionToken:    credential.NewSecret("session-token-text"),
			Issued:          lease.Issued,
			Expiration:      response.GetExpiration().AsTime(),
		},
		Role: role, Region: "eu-central-1", RefreshAfter: 25 * time.Minute,
	}
	if diff := cmp.Diff(want, lease, cmp.Comparer(func(a, b credential.RoleARN) bool { return a == b })); diff != "" {
		t.Errorf("lease (-want +got):\n%s", diff)
	}
}

// The kubelet replaces the token while the sidecar runs.
func TestTokenIsReadAtEachCall(t *testing.T) {
	w := newWorld(t)
	var got []string
	w.server.respond = func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		got = append(got, md.Get("authorization")...)
		return good(), nil
	}
	for _, content := range []string{"one.a.b", "two.a.b\n", "three.a.b\r\n"} {
		writeToken(t, w.tokenFile, content)
		if _, err := w.Credentials(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"Bearer one.a.b", "Bearer two.a.b", "Bearer three.a.b"}, got); diff != "" {
		t.Errorf("authorization (-want +got):\n%s", diff)
	}
}

func TestUnusableToken(t *testing.T) {
	w := newWorld(t)
	tests := map[string]string{
		"empty":        "",
		"only newline": "\n",
		"two lines":    token + "\nx-other: header",
		"blank":        token + " x",
		"not ASCII":    token + "é",
		"too long":     strings.Repeat("a", identity.MaxTokenBytes+1),
	}
	for name, content := range tests {
		t.Run(name, func(t *testing.T) {
			writeToken(t, w.tokenFile, content)
			checkTokenRefused(t, w)
		})
	}
	t.Run("missing", func(t *testing.T) {
		if err := os.Remove(w.tokenFile); err != nil {
			t.Fatal(err)
		}
		checkTokenRefused(t, w)
	})
	if n := w.server.calls.Load(); n != 0 {
		t.Errorf("the broker was called %d times without a token", n)
	}
}

func checkTokenRefused(t *testing.T, w *world) {
	t.Helper()
	lease, err := w.Credentials(t.Context())
	if !errors.Is(err, credential.ErrUnavailable) || credential.ReasonOf(err) != credential.ReasonTokenMissing {
		t.Fatalf("Credentials = %v, want %s", err, credential.ReasonTokenMissing)
	}
	if !strings.Contains(err.Error(), w.tokenFile) {
		t.Errorf("error %q does not contain the file's name", err)
	}
	if strings.Contains(err.Error(), token) {
		t.Error("the error quotes the token")
	}
	if lease != (credential.Lease{}) {
		t.Error("a lease was returned with an error")
	}
}

func TestRefusal(t *testing.T) {
	w := newWorld(t)
	w.server.respond = func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
		return nil, brokerpb.ToStatus(&credential.Error{
			Kind: credential.ErrDenied, Reason: credential.ReasonRoleNotPermitted,
			Message: "annotate the namespace", RetryAfter: 7 * time.Second,
		}).Err()
	}
	_, err := w.Credentials(t.Context())
	e, ok := errors.AsType[*credential.Error](err)
	if !ok {
		t.Fatalf("Credentials = %v, want a *credential.Error", err)
	}
	want := credential.Error{
		Kind: credential.ErrDenied, Reason: credential.ReasonRoleNotPermitted,
		Message: "annotate the namespace", RetryAfter: 7 * time.Second,
	}
	if *e != want {
		t.Errorf("error = %+v, want %+v", *e, want)
	}
}

// If no broker says anything about the pod, the error is "unavailable", so that the sidecar retries soon.
func TestUnavailable(t *testing.T) {
	t.Run("other root", func(t *testing.T) {
		w := newWorld(t)
		certstest.NewCA(t).WriteTo(w.caDir)
		checkUnavailable(t, w.Client, "certificate signed by unknown authority")
		if w.server.calls.Load() != 0 {
			t.Error("the token was sent to an unverified server")
		}
	})
	t.Run("internal", func(t *testing.T) {
		w := newWorld(t)
		w.server.respond = func(context.Context) (*brokerpb.GetCredentialsResponse, error) {
			return nil, status.Error(codes.Internal, "broken")
		}
		checkUnavailable(t, w.Client, "broken")
	})
	t.Run("no server", func(t *testing.T) {
		c, err := client.New(client.Config{
			Target: "localhost:1", TLS: &tls.Config{MinVersion: tls.VersionTLS13}, TokenFile: newWorld(t).tokenFile,
		})
		if err != nil {
			t.Fatal(err)
		}
		checkUnavailable(t, c, "connection refused")
	})
}

func checkUnavailable(t *testing.T, c *client.Client, text string) {
	t.Helper()
	_, err := c.Credentials(t.Context())
	if !errors.Is(err, credential.ErrUnavailable) {
		t.Fatalf("Credentials = %v, want %v", err, credential.ErrUnavailable)
	}
	if !strings.Contains(err.Error(), text) {
		t.Errorf("error %q does not contain %q", err, text)
	}
}

// The next call uses roots that were replaced on disk.
func TestRootsAreReadAtEachCall(t *testing.T) {
	w := newWorld(t)
	if _, err := w.Credentials(t.Context()); err != nil {
		t.Fatal(err)
	}
	good := certstest.NewCA(t)
	good.WriteTo(w.caDir)
	checkUnavailable(t, w.Client, "unknown authority")
}

// The first call after an outage succeeds, because no back-off remains from the failures before.
func TestBrokerComesBack(t *testing.T) {
	ca := certstest.NewCA(t)
	tokenFile := filepath.Join(t.TempDir(), "token")
	writeToken(t, tokenFile, token)
	s := &server{respond: responding(good())}
	address := s.listen(t, ca.Leaf("localhost"))
	var down atomic.Bool
	down.Store(true)
	c, err := client.New(client.Config{
		Target: address, TokenFile: tokenFile,
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: ca.Pool(), ServerName: "localhost"},
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			if down.Load() {
				return nil, errors.New("the broker is down")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		checkUnavailable(t, c, "the broker is down")
	}
	down.Store(false)
	if _, err := c.Credentials(t.Context()); err != nil {
		t.Error(err)
	}
}

// Each connection is closed with its call.
func TestConnectionIsClosed(t *testing.T) {
	w := newWorld(t)
	if _, err := w.Credentials(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The server notices that a little later.
	for deadline := time.Now().Add(10 * time.Second); w.server.open.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections are still open", w.server.open.Load())
		}
	}
}

func TestInvalidResponses(t *testing.T) {
	w := newWorld(t)
	tests := map[string]struct {
		change func(*brokerpb.GetCredentialsResponse)
		want   string
	}{
		"no access key": {func(r *brokerpb.GetCredentialsResponse) { r.AccessKeyId = "" }, "access key ID"},
		"bad access key": {func(r *brokerpb.GetCredentialsResponse) {
			r.AccessKeyId = "AS IA"
		}, "access key ID"},
		"no secret":     {func(r *brokerpb.GetCredentialsResponse) { r.SecretAccessKey = "" }, "secret access key"},
		"no token":      {func(r *brokerpb.GetCredentialsResponse) { r.SessionToken = "" }, "session token"},
		"no role":       {func(r *brokerpb.GetCredentialsResponse) { r.RoleArn = "" }, "role"},
		"other account": {func(r *brokerpb.GetCredentialsResponse) { r.AccountId = "210987654321" }, "account"},
		"no expiration": {func(r *brokerpb.GetCredentialsResponse) { r.Expiration = nil }, "expiration"},
		"expired": {func(r *brokerpb.GetCredentialsResponse) {
			r.Expiration = timestamppb.New(time.Now().Add(-time.Second))
		}, "clocks"},
		"bad region": {func(r *brokerpb.GetCredentialsResponse) { r.Region = "eu\r\nX: y" }, "region"},
		"too large": {func(r *brokerpb.GetCredentialsResponse) {
			r.SessionToken = strings.Repeat("x", 64<<10)
		}, "larger than max"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			response := good()
			test.change(response)
			w.server.respond = responding(response)
			lease, err := w.Credentials(t.Context())
			if !errors.Is(err, credential.ErrUnavailable) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("Credentials = %v, want an unavailable error that contains %q", err, test.want)
			}
			if strings.Contains(err.Error(), "secret-key-text") || strings.Contains(err.Error(), "session-token-text") {
				t.Error("the error quotes a secret")
			}
			if lease != (credential.Lease{}) {
				t.Error("a lease was returned with an error")
			}
		})
	}
}

func TestRefreshAfterIsClamped(t *testing.T) {
	w := newWorld(t)
	tests := []struct {
		sent *durationpb.Duration
		want time.Duration
	}{
		{nil, 30 * time.Second},
		{durationpb.New(-time.Hour), 30 * time.Second},
		{durationpb.New(time.Second), 30 * time.Second},
		{durationpb.New(31 * time.Second), 31 * time.Second},
		{durationpb.New(time.Hour), time.Hour},
		{durationpb.New(30 * time.Hour), time.Hour},
	}
	for _, test := range tests {
		response := good()
		response.RefreshAfter = test.sent
		w.server.respond = responding(response)
		lease, err := w.Credentials(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if lease.RefreshAfter != test.want {
			t.Errorf("refresh_after %v became %v, want %v", test.sent, lease.RefreshAfter, test.want)
		}
	}
}
