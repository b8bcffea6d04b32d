//go:build unix

package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube/apitest"
	"github.com/credence-iam/credence/broker/kube/verify"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
)

const (
	// sidecars keep two processors busy.
	sidecars = 8

	account   = "123456789012"
	region    = "eu-central-1"
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
func warmBroker(choose func(scene) (ours, bare side)) func(*world) []measurement {
	return func(w *world) []measurement {
		t, keys := w.newTrust(), newSigner()
		pods, tokens := makePods(keys)
		verifier := must(verify.NewJWKS(verify.Config{REST: apitest.Serve(w, keys).Config(), Audience: audience, Logger: discard}))
		brokerAddress, decisions := w.serveBroker(t, verifier, pods)
		response := must(call(w.ctx, w.dial(brokerAddress, t), tokens[0]))
		token := identity.NewUnverifiedToken(tokens[0])
		ours, bare := choose(scene{
			ours: w.callers(brokerAddress, t, tokens),
			bare: w.callers(verifying(keys.Public(), response).serve(w, t), t, tokens),
			verify: func() error {
				_, err := verifier.Verify(w.ctx, token)
				return err
			},
			verifySignature: func() error { return verifySignature(keys.Public(), tokens[0]) },
		})
		runs := w.paired(ours, bare)
		if lost := decisions.Lost(); lost > 0 {
			check(fmt.Errorf("the broker lost %d audit lines, so it did less work than it should", lost))
		}
		return runs
	}
}

// makePods returns a pod for each sidecar, and a token for each.
func makePods(keys signer) (pods podMap, tokens []string) {
	annotations := must(policy.NewKeys(policy.DefaultPrefix))
	request := annotations.Request(map[string]string{annotations.Name(policy.Role): "bench"})
	pods = make(podMap)
	for i := range sidecars {
		pod := policy.Pod{
			Namespace: namespace, Name: fmt.Sprintf("bench-6d4cf56db6-%05d", i), UID: uid(1, i), ServiceAccount: "default",
			Request: request,
		}
		pods[pod.UID] = pod
		tokens = append(tokens, keys.token(pod, uid(4, 0)))
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
	dir := w.TempDir()
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
}

// GetCredentials implements brokerpb.BrokerServer.
func (b bareBroker) GetCredentials(ctx context.Context, _ *brokerpb.GetCredentialsRequest) (*brokerpb.GetCredentialsResponse, error) {
	return b.respond(ctx)
}

// serve serves b until the world ends, with no setting but TLS, and returns the address.
func (b bareBroker) serve(w *world, t trust) string {
	listener, address := w.listen()
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(certs.ServerConfig(t.pair))))
	brokerpb.RegisterBrokerServer(server, b)
	go func() { _ = server.Serve(listener) }()
	w.Cleanup(server.Stop)
	return address
}

// signer signs tokens as API servers create them, and serves its key. Its signatures of 2,048 bits are cheap to verify.
// Package apitest signs with ECDSA, whose keys are cheap to make.
type signer struct{ *rsa.PrivateKey }

const keyID = "bench"

func newSigner() signer { return signer{must(rsa.GenerateKey(rand.Reader, 2048))} }

// token makes a token with the claims of projected tokens.
func (s signer) token(pod policy.Pod, accountUID string) string {
	type object struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	key := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: s.PrivateKey, KeyID: keyID}}, nil))
	now := time.Now()
	return must(jwt.Signed(key).Claims(jwt.Claims{
		Issuer: apitest.Issuer, Subject: "system:serviceaccount:" + pod.Namespace + ":" + pod.ServiceAccount, Audience: jwt.Audience{audience},
		Expiry: jwt.NewNumericDate(now.Add(2 * time.Hour)), IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now),
		ID: "jti-" + pod.UID,
	}).Claims(map[string]any{"kubernetes.io": map[string]any{
		"namespace": pod.Namespace, "node": object{"node-1", uid(3, 0)}, "pod": object{pod.Name, pod.UID},
		"serviceaccount": object{pod.ServiceAccount, accountUID}, "warnafter": now.Add(time.Hour).Unix(),
	}}).Serialize())
}

// ServeHTTP implements http.Handler: it serves the documents with the key, as an API server does.
func (s signer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	documents := map[string]any{
		"/openid/v1/jwks":                   jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.Public(), KeyID: keyID, Algorithm: string(jose.RS256), Use: "sig"}}},
		"/.well-known/openid-configuration": map[string]string{"issuer": apitest.Issuer},
	}
	document, ok := documents[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(document)
}
