//go:build unix

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/certs/certstest"
)

const (
	loopback = "127.0.0.1"
	// serverName is what servers are dialled by: clients verify names, not addresses.
	serverName = "localhost"
)

var discard = slog.New(slog.DiscardHandler)

// trust is what a TLS server of the benchmark shows, and what its clients trust.
type trust struct {
	pair      *certs.KeyPair
	rootsFile string
	rootsPEM  []byte
}

// newTrust makes one, with its files in dir.
func newTrust(dir string) (trust, error) {
	ca := certstest.NewCA(tb{})
	certFile, keyFile := ca.Leaf(serverName).WriteTo(filepath.Join(dir, "tls"))
	pair, err := certs.NewKeyPair(certFile, keyFile, discard)
	return trust{pair: pair, rootsFile: ca.WriteTo(filepath.Join(dir, "roots")), rootsPEM: ca.PEM}, err
}

// tb is for certstest. What fails there is the disk or the program.
type tb struct{}

func (tb) Helper()                           {}
func (tb) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

// listen returns a listener, and the address to reach it at by the name in its certificate.
func listen(ctx context.Context) (net.Listener, string, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		return nil, "", fmt.Errorf("listening: %w", err)
	}
	_, port, err := net.SplitHostPort(listener.Addr().String())
	return listener, net.JoinHostPort(serverName, port), err
}

// bareBroker answers the broker's call with no more than a function.
type bareBroker struct {
	brokerpb.UnimplementedBrokerServer

	answer func(context.Context) (*brokerpb.GetCredentialsResponse, error)
	// reached is told of what a call has come to, each time; nil tells nobody.
	reached func(moment)
}

// moment is what a call has come to, as its server sees it.
type moment int

const (
	accepted moment = iota // the connection is there
	secured                // the handshake is over
	arrived                // so is all that the caller sends
	answered               // the answer is known
	moments
)

func (b bareBroker) tell(m moment) {
	if b.reached != nil {
		b.reached(m)
	}
}

// GetCredentials implements brokerpb.BrokerServer.
func (b bareBroker) GetCredentials(ctx context.Context, _ *brokerpb.GetCredentialsRequest) (*brokerpb.GetCredentialsResponse, error) {
	b.tell(arrived)
	defer b.tell(answered)
	return b.answer(ctx)
}

// serve serves b until ctx ends, with nothing set but TLS, and returns the address.
func (b bareBroker) serve(ctx context.Context, t trust) (string, error) {
	listener, address, err := listen(ctx)
	if err != nil {
		return "", err
	}
	server := grpc.NewServer(grpc.Creds(telling{credentials.NewTLS(certs.ServerConfig(t.pair)), b}))
	brokerpb.RegisterBrokerServer(server, b)
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, server.Stop)
	return address, nil
}

// telling are credentials that tell a broker of their handshakes. gRPC begins one as soon as it has accepted.
type telling struct {
	credentials.TransportCredentials
	broker bareBroker
}

// ServerHandshake implements credentials.TransportCredentials.
func (t telling) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t.broker.tell(accepted)
	conn, info, err := t.TransportCredentials.ServerHandshake(conn)
	if err == nil {
		t.broker.tell(secured)
	}
	return conn, info, err
}

// session is an AWS session of the usual lengths.
func session() credential.Credential {
	now := time.Now()
	return credential.Credential{
		AccessKeyID:     "ASIA" + strings.Repeat("B", 16),
		SecretAccessKey: credential.NewSecret(strings.Repeat("s", 40)),
		SessionToken:    credential.NewSecret(strings.Repeat("t", 1000)),
		Issued:          now,
		Expiration:      now.Add(time.Hour),
	}
}
