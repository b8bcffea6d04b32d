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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/bench/report"
)

var brokerMetrics = []metric{{
	Metric: report.Metric{
		Name: "broker_get_rps", Unit: "calls/s",
		// What reading claims, policy, the cache and audit may take of the whole.
		Goal: &report.Goal{Of: report.Ratio, Op: ">=", Value: 0.80},
	},
	about: "Calls per second of GetCredentials, on a session that is held, by " + strconv.Itoa(callers) + " callers that wait for each answer, each with a\n" +
		"\tconnection and a pod-bound RS256 token of its own; beside it, a gRPC server over the same TLS that verifies the\n" +
		"\tsignature of each token and answers a fixed message of the same size. Broker, callers and baseline are one process,\n" +
		"\tso the callers' work is in both figures. Real in the broker: token verification with keys fetched from an API\n" +
		"\tserver's endpoints, policy, cache, audit lines (to nowhere). Not: finding the pod, which is in a map here, not in\n" +
		"\tinformers; and handshakes.",
	measure: brokerThroughput,
}}

const (
	// callers keep two processors busy; each stands for a sidecar.
	callers = 8

	account   = "123456789012"
	region    = "eu-central-1"
	issuer    = "https://kubernetes.default.svc.cluster.local"
	audience  = "credence-broker"
	keyID     = "bench"
	namespace = "bench"
)

func brokerThroughput(ctx context.Context, b *bench) ([]report.Run, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t, err := newTrust(b.programs.Dir())
	if err != nil {
		return nil, err
	}
	// What API servers make themselves: 2,048 bits, whose signatures are cheap to verify.
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("making a token-signing key: %w", err)
	}
	pods, tokens, err := makePods(key)
	if err != nil {
		return nil, err
	}
	api, err := serveKeys(ctx, key, t)
	if err != nil {
		return nil, err
	}
	address, decisions, err := serveBroker(ctx, t, api, pods)
	if err != nil {
		return nil, err
	}
	ours, err := dialAll(address, t, tokens)
	if err != nil {
		return nil, err
	}
	defer ours.close()
	answer, err := ours[0].call(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking the broker: %w", err)
	}
	address, err = verifying(key.Public(), answer).serve(ctx, t)
	if err != nil {
		return nil, err
	}
	bare, err := dialAll(address, t, tokens)
	if err != nil {
		return nil, err
	}
	defer bare.close()
	runs, err := b.paired(ctx, ours.throughput, bare.throughput)
	if lost := decisions.Lost(); err == nil && lost > 0 {
		err = fmt.Errorf("the broker lost %d audit lines: it did less than it should", lost)
	}
	return runs, err
}

// makePods returns a pod for each caller, by UID, and a token for each, with the claims that an API
// server gives to projected tokens.
func makePods(key *rsa.PrivateKey) (podMap, []string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: keyID}}, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("making a signer: %w", err)
	}
	type object struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	uid := func(kind, n int) string { return fmt.Sprintf("%08d-0000-4000-8000-%012d", kind, n) }
	pods, now := make(podMap), time.Now()
	var tokens []string
	for i := range callers {
		pod := policy.Pod{
			Namespace: namespace, Name: fmt.Sprintf("bench-6d4cf56db6-%05d", i), UID: uid(1, i), ServiceAccount: "default",
			Annotations: map[string]string{policy.DefaultPrefix + "/" + string(policy.Role): "bench"},
		}
		token, err := jwt.Signed(signer).Claims(jwt.Claims{
			Issuer: issuer, Subject: "system:serviceaccount:" + namespace + ":" + pod.ServiceAccount, Audience: jwt.Audience{audience},
			Expiry: jwt.NewNumericDate(now.Add(2 * time.Hour)), IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now),
			ID: uid(2, i),
		}).Claims(map[string]any{"kubernetes.io": map[string]any{
			"namespace": namespace, "node": object{"node-1", uid(3, 0)}, "pod": object{pod.Name, pod.UID},
			"serviceaccount": object{pod.ServiceAccount, uid(4, 0)}, "warnafter": now.Add(time.Hour).Unix(),
		}}).Serialize()
		if err != nil {
			return nil, nil, fmt.Errorf("making a token: %w", err)
		}
		pods[pod.UID] = pod
		tokens = append(tokens, token)
	}
	return pods, tokens, nil
}

// podMap binds identities to pods of one namespace. It stands for the broker's informers.
type podMap map[string]policy.Pod // :: UID → pod

// Bind implements broker.Binder.
func (m podMap) Bind(_ context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	pod, ok := m[id.UID]
	if !ok {
		return policy.Pod{}, policy.Namespace{}, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "pod %s does not exist", id)
	}
	return pod, policy.Namespace{
		Name:        namespace,
		Labels:      map[string]string{policy.DefaultPrefix + "/" + string(policy.Inject): policy.Enabled},
		Annotations: map[string]string{policy.DefaultPrefix + "/" + string(policy.Permitted): "arn:aws:iam::[0-9]+:role/bench.*"},
	}, nil
}

// serveKeys serves what the broker asks of an API server, until ctx ends.
func serveKeys(ctx context.Context, key *rsa.PrivateKey, t trust) (*rest.Config, error) {
	documents := map[string]any{
		"/openid/v1/jwks": jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
			{Key: key.Public(), KeyID: keyID, Algorithm: string(jose.RS256), Use: "sig"},
		}},
		"/.well-known/openid-configuration": map[string]string{"issuer": issuer},
	}
	listener, address, err := listen(ctx)
	if err != nil {
		return nil, err
	}
	server := &http.Server{
		TLSConfig:         certs.ServerConfig(t.pair),
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(documents[r.URL.Path])
		}),
	}
	go func() { _ = server.ServeTLS(listener, "", "") }()
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return &rest.Config{Host: "https://" + address, TLSClientConfig: rest.TLSClientConfig{CAData: t.rootsPEM}}, nil
}

// sts answers every grant at once. The benchmark asks it once.
type sts struct{}

// Credential implements credential.Source.
func (sts) Credential(context.Context, policy.Grant) (credential.Credential, error) {
	return session(), nil
}

// serveBroker runs a broker until ctx ends, and returns its address and its audit log.
func serveBroker(ctx context.Context, t trust, api *rest.Config, pods podMap) (string, *audit.Log, error) {
	verifier, err := kube.NewJWKS(kube.JWKSConfig{REST: api, Audience: audience, Logger: discard})
	if err != nil {
		return "", nil, err
	}
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		return "", nil, err
	}
	base, err := credential.BaseOf("aws", account)
	if err != nil {
		return "", nil, err
	}
	rules, err := policy.New(policy.Config{Keys: keys, Base: base})
	if err != nil {
		return "", nil, err
	}
	sessions, err := cache.New(cache.Config[policy.Grant]{Source: sts{}, Logger: discard})
	if err != nil {
		return "", nil, err
	}
	decisions, err := audit.New(audit.Config{Writer: io.Discard, Logger: discard})
	if err != nil {
		return "", nil, err
	}
	b, err := broker.New(broker.Config{
		Verifier: verifier, Binder: pods, Rules: rules, Sessions: sessions, Audit: decisions, Region: region, Logger: discard,
	})
	if err != nil {
		return "", nil, err
	}
	listener, address, err := listen(ctx)
	if err != nil {
		return "", nil, err
	}
	for _, run := range []func(context.Context) error{verifier.Run, sessions.Run, decisions.Run, func(ctx context.Context) error {
		return b.Serve(ctx, broker.ServerConfig{Listener: listener, TLS: certs.ServerConfig(t.pair), Ready: func() bool { return true }, Logger: discard})
	}} {
		go func() { _ = run(ctx) }()
	}
	return address, decisions, nil
}

// verifying is the baseline: what every server must do that trusts such tokens.
func verifying(key crypto.PublicKey, answer *brokerpb.GetCredentialsResponse) bareBroker {
	return bareBroker{answer: func(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
		values := metadata.ValueFromIncomingContext(ctx, "authorization")
		if len(values) != 1 {
			return nil, errors.New("the call carries no token")
		}
		token, err := jose.ParseSignedCompact(strings.TrimPrefix(values[0], "Bearer "), []jose.SignatureAlgorithm{jose.RS256})
		if err != nil {
			return nil, err
		}
		_, err = token.Verify(key)
		return answer, err
	}}
}

// caller is one sidecar's side of the wire, with its connection kept.
type caller struct {
	conn  *grpc.ClientConn
	token string
}

type callerGroup []caller

// dialAll makes a caller for each token. They connect with their first call.
func dialAll(address string, t trust, tokens []string) (callerGroup, error) {
	roots, err := certs.NewRoots(t.rootsFile, discard)
	if err != nil {
		return nil, err
	}
	var group callerGroup
	for _, token := range tokens {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(certs.ClientConfig(roots, ""))), grpc.WithNoProxy())
		if err != nil {
			group.close()
			return nil, fmt.Errorf("dialling %s: %w", address, err)
		}
		group = append(group, caller{conn, token})
	}
	return group, nil
}

func (g callerGroup) close() {
	for _, c := range g {
		_ = c.conn.Close()
	}
}

func (c caller) call(ctx context.Context) (*brokerpb.GetCredentialsResponse, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
	return brokerpb.NewBrokerClient(c.conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
}

// throughput lets all callers call, and returns the calls per second of all. It is a side.
func (g callerGroup) throughput(ctx context.Context, length time.Duration) ([]float64, error) {
	var calls atomic.Int64
	errs := make([]error, len(g))
	var calling sync.WaitGroup
	began := time.Now()
	for i, c := range g {
		calling.Go(func() {
			for time.Since(began) < length {
				if _, errs[i] = c.call(ctx); errs[i] != nil {
					return
				}
				calls.Add(1)
			}
		})
	}
	calling.Wait()
	return []float64{float64(calls.Load()) / time.Since(began).Seconds()}, errors.Join(errs...)
}
