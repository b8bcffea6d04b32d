//go:build unix

package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube/verify"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/bench/report"
)

const (
	// sidecars keep two processors busy.
	sidecars = 8

	account   = "123456789012"
	region    = "eu-central-1"
	issuer    = "https://kubernetes.default.svc.cluster.local"
	audience  = "credence-broker"
	namespace = "bench"
)

// scene is a broker with warm sessions, and beside it a server that does what every broker must do.
type scene struct {
	ours, bare              callers
	verify, verifySignature func() error
}

// callers call one server, one function per sidecar.
type callers struct {
	open  []func() error // each with a connection that stays open
	fresh []func() error // with a connection for each call, as sidecars do
}

// warmBroker measures two sides of a scene.
func warmBroker(choose func(scene) (ours, bare side)) func(*world) []report.Run {
	return func(w *world) []report.Run {
		t := w.newTrust()
		api, address := w.serveAPI(t, 0, true)
		pods, tokens := makePods(api)
		verifier := must(verify.NewJWKS(verify.Config{
			REST:     &rest.Config{Host: "https://" + address, TLSClientConfig: rest.TLSClientConfig{CAData: t.ca.PEM}},
			Audience: audience, Logger: discard,
		}))
		brokerAddress, decisions := w.serveBroker(t, verifier, pods)
		response := must(call(w.ctx, w.dial(brokerAddress, t), tokens[0]))
		token := identity.NewUnverifiedToken(tokens[0])
		ours, bare := choose(scene{
			ours: w.callers(brokerAddress, t, tokens),
			bare: w.callers(verifying(api.key.Public(), response).serve(w, t), t, tokens),
			verify: func() error {
				_, err := verifier.Verify(w.ctx, token)
				return err
			},
			verifySignature: func() error { return verifySignature(api.key.Public(), tokens[0]) },
		})
		runs := w.paired(ours, bare)
		if lost := decisions.Lost(); lost > 0 {
			check(fmt.Errorf("the broker lost %d audit lines, so it did less work than it should", lost))
		}
		return runs
	}
}

// makePods returns a pod for each sidecar, and a token for each.
func makePods(api *apiServer) (pods podMap, tokens []string) {
	keys := must(policy.NewKeys(policy.DefaultPrefix))
	request := keys.Request(map[string]string{keys.Name(policy.Role): "bench"})
	pods = make(podMap)
	for i := range sidecars {
		pod := policy.Pod{
			Namespace: namespace, Name: fmt.Sprintf("bench-6d4cf56db6-%05d", i), UID: uid(1, i), ServiceAccount: "default",
			Request: request,
		}
		pods[pod.UID] = pod
		tokens = append(tokens, api.token(pod, uid(4, 0)))
	}
	return pods, tokens
}

// podMap binds identities to pods of one namespace. It stands for the broker's watch caches.
type podMap map[string]policy.Pod // :: UID → pod

// Bind implements broker.Binder.
func (m podMap) Bind(_ context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	pod, ok := m[id.UID]
	if !ok {
		return policy.Pod{}, policy.Namespace{}, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "pod %s does not exist", id)
	}
	return pod, optedIn(namespace), nil
}

// sts responds to every grant at once. The benchmark calls it once.
type sts struct{}

// Credential implements credential.Source.
func (sts) Credential(context.Context, policy.Grant) (credential.Credential, error) {
	return session(), nil
}

// serveBroker runs a broker until the world ends, and returns its address and its audit log.
func (w *world) serveBroker(t trust, verifier *verify.JWKS, pods podMap) (string, *audit.Log) {
	sessions := must(cache.New(cache.Config[policy.Grant]{Source: sts{}, Logger: discard}))
	decisions := must(audit.New(audit.Config{Writer: io.Discard, Logger: discard}))
	b := must(broker.New(broker.Config{
		Verifier: verifier, Binder: pods, Rules: newRules(), Sessions: sessions, Audit: decisions, Region: region, Logger: discard,
	}))
	listener, address := w.listen()
	for _, run := range []func(context.Context) error{verifier.Run, sessions.Run, decisions.Run, func(ctx context.Context) error {
		return b.Serve(ctx, broker.ServerConfig{Listener: listener, TLS: certs.ServerConfig(t.pair), Ready: func() bool { return true }, Logger: discard})
	}} {
		go func() { _ = run(w.ctx) }()
	}
	return address, decisions
}

// newRules completes role names to ARNs of one account.
func newRules() *policy.Rules {
	return must(policy.New(policy.Config{
		Keys: must(policy.NewKeys(policy.DefaultPrefix)), Base: must(credential.BaseOf("aws", account)),
	}))
}

// optedIn is a namespace that permits the benchmark's roles.
func optedIn(name string) policy.Namespace {
	return policy.Namespace{
		Name:        name,
		Labels:      map[string]string{policy.DefaultPrefix + "/" + string(policy.Inject): policy.Enabled},
		Annotations: map[string]string{policy.DefaultPrefix + "/" + string(policy.Permitted): "arn:aws:iam::[0-9]+:role/bench.*"},
	}
}

// verifying is the baseline: what every server must do that trusts such tokens.
func verifying(key crypto.PublicKey, response *brokerpb.GetCredentialsResponse) bareBroker {
	return bareBroker{respond: func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
		values := metadata.ValueFromIncomingContext(ctx, "authorization")
		if len(values) != 1 {
			return nil, errors.New("the call has no token")
		}
		return response, verifySignature(key, strings.TrimPrefix(values[0], "Bearer "))
	}}
}

func verifySignature(key crypto.PublicKey, token string) error {
	signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return err
	}
	_, err = signed.Verify(key)
	return err
}

// dial opens a connection, which is closed when the world ends.
func (w *world) dial(address string, t trust) *grpc.ClientConn {
	conn := must(grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(t.client())), grpc.WithNoProxy()))
	w.Cleanup(func() { _ = conn.Close() })
	return conn
}

func call(ctx context.Context, conn *grpc.ClientConn, token string) (*brokerpb.GetCredentialsResponse, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	return brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
}

// callers makes a caller of each kind for each token.
func (w *world) callers(address string, t trust, tokens []string) (c callers) {
	dir := w.folder()
	for i, token := range tokens {
		conn := w.dial(address, t)
		c.open = append(c.open, func() error {
			_, err := call(w.ctx, conn, token)
			return err
		})
		sidecar := newClient(filepath.Join(dir, fmt.Sprint("token-", i)), token, client.Config{Target: address, TLS: t.client()})
		c.fresh = append(c.fresh, func() error {
			_, err := sidecar.Credentials(w.ctx)
			return err
		})
	}
	return c
}

// newClient makes a sidecar's client, with its token in a file.
func newClient(file, token string, cfg client.Config) *client.Client {
	check(os.WriteFile(file, []byte(token), 0o600))
	cfg.TokenFile = file
	return must(client.New(cfg))
}

// bareBroker serves the broker's RPC with one function.
type bareBroker struct {
	brokerpb.UnimplementedBrokerServer

	respond func(context.Context) (*brokerpb.GetCredentialsResponse, error)
	// reached is called at each moment of a call. Nil: not called.
	reached func(moment)
}

// moment is a stage of a call, as its server sees it.
type moment int

const (
	accepted  moment = iota // the connection is open
	secured                 // the handshake is done
	arrived                 // the request is complete
	responded               // the response is known
	moments
)

func (b bareBroker) report(m moment) {
	if b.reached != nil {
		b.reached(m)
	}
}

// GetCredentials implements brokerpb.BrokerServer.
func (b bareBroker) GetCredentials(ctx context.Context, _ *brokerpb.GetCredentialsRequest) (*brokerpb.GetCredentialsResponse, error) {
	b.report(arrived)
	defer b.report(responded)
	return b.respond(ctx)
}

// serve serves b until the world ends, with no setting but TLS, and returns the address.
func (b bareBroker) serve(w *world, t trust) string {
	listener, address := w.listen()
	server := grpc.NewServer(grpc.Creds(reporting{credentials.NewTLS(certs.ServerConfig(t.pair)), b}))
	brokerpb.RegisterBrokerServer(server, b)
	go func() { _ = server.Serve(listener) }()
	w.Cleanup(server.Stop)
	return address
}

// reporting are credentials that report handshakes to a broker. gRPC begins a handshake when it has accepted.
type reporting struct {
	credentials.TransportCredentials
	broker bareBroker
}

// ServerHandshake implements credentials.TransportCredentials.
func (r reporting) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	r.broker.report(accepted)
	conn, info, err := r.TransportCredentials.ServerHandshake(conn)
	if err == nil {
		r.broker.report(secured)
	}
	return conn, info, err
}
