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
	"slices"
	"strconv"
	"strings"
	"sync"
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
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/bench/report"
)

// brokerMetrics are what the broker adds to the work that no broker can avoid, on sessions that are held.
var brokerMetrics = []metric{{
	Metric: report.Metric{
		Name: "broker_get_rps", Unit: "calls/s",
		// What reading claims, policy, the cache and audit may take of the whole.
		Goal: &report.Goal{Of: report.Ratio, Op: ">=", Value: 0.80},
	},
	about: "Calls per second of GetCredentials, on a session that is held, by " + strconv.Itoa(sidecars) + " callers that wait for each answer, each with a\n" +
		"\tconnection and a pod-bound RS256 token of its own; beside it, a gRPC server over the same TLS that verifies the\n" +
		"\tsignature of each token and answers a fixed message of the same size. Broker, callers and baseline are one process,\n" +
		"\tso the callers' work is in both figures. Real in the broker: token verification with keys fetched from an API\n" +
		"\tserver's endpoints, policy, cache, audit lines (to nowhere). Not: finding the pod, which is in a map here, not in\n" +
		"\tinformers; and handshakes.",
	measure: warmBroker(func(s scene) (ours, bare side) { return s.ours.throughput, s.bare.throughput }),
}, {
	Metric: report.Metric{
		Name: "broker_get_p99", Unit: "us",
		// The inverse of the goal for calls per second.
		Goal: &report.Goal{Of: report.Ratio, Op: "<=", Value: 1.25},
	},
	about: "The same calls and the same baseline: the latency that one call in a hundred exceeds, under the full load of all\n" +
		"\tcallers; of each tenth of a second, and of those the median.",
	measure: warmBroker(func(s scene) (ours, bare side) { return s.ours.p99, s.bare.p99 }),
}, {
	Metric: report.Metric{
		Name: "broker_fresh_connection_rps", Unit: "calls/s",
		Goal: &report.Goal{Of: report.Ratio, Op: ">=", Value: 0.80},
	},
	about: "The same with a connection for each call, through the client that sidecars use: their calls are half an hour apart,\n" +
		"\tand they keep none. The handshake is most of it, on both sides.",
	measure: warmBroker(func(s scene) (ours, bare side) { return s.oursFresh.throughput, s.bareFresh.throughput }),
}, {
	Metric: report.Metric{
		Name: "broker_verify_ns", Unit: "ns",
		NoGoal: "a part of broker_get_rps, which has one",
	},
	about: "Verifying one pod-bound RS256 token: signature and claims; beside it, the signature alone.",
	measure: warmBroker(func(s scene) (ours, bare side) {
		return timed(s.verify, time.Nanosecond), timed(s.verifySignature, time.Nanosecond)
	}),
}}

const (
	// sidecars keep two processors busy.
	sidecars = 8

	account   = "123456789012"
	region    = "eu-central-1"
	issuer    = "https://kubernetes.default.svc.cluster.local"
	audience  = "credence-broker"
	keyID     = "bench"
	namespace = "bench"
)

// scene is a broker with warm sessions, and beside it a server that does what every one must.
type scene struct {
	ours, bare              callers
	oursFresh, bareFresh    callers
	verify, verifySignature func(context.Context) (time.Duration, error)
}

// warmBroker measures a pair of sides of a scene.
func warmBroker(choose func(scene) (ours, bare side)) func(context.Context, *bench) ([]report.Run, error) {
	return func(ctx context.Context, b *bench) ([]report.Run, error) {
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
		verifier, err := kube.NewJWKS(kube.JWKSConfig{REST: api, Audience: audience, Logger: discard})
		if err != nil {
			return nil, err
		}
		address, decisions, err := serveBroker(ctx, t, verifier, pods)
		if err != nil {
			return nil, err
		}
		ours, err := dial(address, t)
		if err != nil {
			return nil, err
		}
		defer ours.Close()
		answer, err := call(ctx, ours, tokens[0])
		if err != nil {
			return nil, fmt.Errorf("asking the broker: %w", err)
		}
		var s scene
		if s.ours, s.oursFresh, err = b.callers(address, t, tokens); err != nil {
			return nil, err
		}
		defer s.ours.close()
		if address, err = verifying(key.Public(), answer).serve(ctx, t); err != nil {
			return nil, err
		}
		if s.bare, s.bareFresh, err = b.callers(address, t, tokens); err != nil {
			return nil, err
		}
		defer s.bare.close()
		token := identity.NewUnverifiedToken(tokens[0])
		s.verify = func(ctx context.Context) (time.Duration, error) {
			began := time.Now()
			_, err := verifier.Verify(ctx, token)
			return time.Since(began), err
		}
		s.verifySignature = func(context.Context) (time.Duration, error) {
			began := time.Now()
			err := verifySignature(key.Public(), tokens[0])
			return time.Since(began), err
		}
		ourSide, bareSide := choose(s)
		runs, err := b.paired(ctx, ourSide, bareSide)
		if lost := decisions.Lost(); err == nil && lost > 0 {
			err = fmt.Errorf("the broker lost %d audit lines: it did less than it should", lost)
		}
		return runs, err
	}
}

// makePods returns a pod for each caller, by UID, and a token for each.
func makePods(key *rsa.PrivateKey) (podMap, []string, error) {
	signer, err := newSigner(key)
	if err != nil {
		return nil, nil, err
	}
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		return nil, nil, err
	}
	request := keys.Request(map[string]string{keys.Name(policy.Role): "bench"})
	pods := make(podMap)
	var tokens []string
	for i := range sidecars {
		pod := policy.Pod{
			Namespace: namespace, Name: fmt.Sprintf("bench-6d4cf56db6-%05d", i), UID: uid(1, i), ServiceAccount: "default",
			Request: request,
		}
		token, err := podToken(signer, pod, uid(4, 0))
		if err != nil {
			return nil, nil, err
		}
		pods[pod.UID] = pod
		tokens = append(tokens, token)
	}
	return pods, tokens, nil
}

func uid(kind, n int) string { return fmt.Sprintf("%08d-0000-4000-8000-%012d", kind, n) }

func newSigner(key *rsa.PrivateKey) (jose.Signer, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: keyID}}, nil)
	if err != nil {
		return nil, fmt.Errorf("making a signer: %w", err)
	}
	return signer, nil
}

// podToken makes a token with the claims that an API server gives to projected ones.
func podToken(signer jose.Signer, pod policy.Pod, accountUID string) (string, error) {
	type object struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	now := time.Now()
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: issuer, Subject: "system:serviceaccount:" + pod.Namespace + ":" + pod.ServiceAccount, Audience: jwt.Audience{audience},
		Expiry: jwt.NewNumericDate(now.Add(2 * time.Hour)), IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now),
		ID: "jti-" + pod.UID,
	}).Claims(map[string]any{"kubernetes.io": map[string]any{
		"namespace": pod.Namespace, "node": object{"node-1", uid(3, 0)}, "pod": object{pod.Name, pod.UID},
		"serviceaccount": object{pod.ServiceAccount, accountUID}, "warnafter": now.Add(time.Hour).Unix(),
	}}).Serialize()
	if err != nil {
		return "", fmt.Errorf("making a token: %w", err)
	}
	return token, nil
}

// podMap binds identities to pods of one namespace. It stands for the broker's informers.
type podMap map[string]policy.Pod // :: UID → pod

// Bind implements broker.Binder.
func (m podMap) Bind(_ context.Context, id identity.Pod) (policy.Pod, policy.Namespace, error) {
	pod, ok := m[id.UID]
	if !ok {
		return policy.Pod{}, policy.Namespace{}, credential.Errorf(credential.ErrNotFound, credential.ReasonPodNotFound, "pod %s does not exist", id)
	}
	return pod, optedIn(namespace), nil
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
func serveBroker(ctx context.Context, t trust, verifier *kube.JWKS, pods podMap) (string, *audit.Log, error) {
	rules, err := newRules()
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
		return answer, verifySignature(key, strings.TrimPrefix(values[0], "Bearer "))
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

func dial(address string, t trust) (*grpc.ClientConn, error) {
	roots, err := certs.NewRoots(t.rootsFile, discard)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(certs.ClientConfig(roots, ""))), grpc.WithNoProxy())
	if err != nil {
		return nil, fmt.Errorf("dialling %s: %w", address, err)
	}
	return conn, nil
}

func call(ctx context.Context, conn *grpc.ClientConn, token string) (*brokerpb.GetCredentialsResponse, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	return brokerpb.NewBrokerClient(conn).GetCredentials(ctx, &brokerpb.GetCredentialsRequest{})
}

// callers are sidecars' side of the wire.
type callers struct {
	calls []func(context.Context) error
	conns []*grpc.ClientConn // kept between calls
}

// callers makes a caller for each token that keeps its connection, and one that makes a connection for each call, as
// sidecars do.
func (b *bench) callers(address string, t trust, tokens []string) (kept, fresh callers, err error) {
	roots, err := certs.NewRoots(t.rootsFile, discard)
	if err != nil {
		return callers{}, callers{}, err
	}
	for i, token := range tokens {
		conn, err := dial(address, t)
		if err != nil {
			kept.close()
			return callers{}, callers{}, err
		}
		kept.conns = append(kept.conns, conn)
		kept.calls = append(kept.calls, func(ctx context.Context) error {
			_, err := call(ctx, conn, token)
			return err
		})
		file := filepath.Join(b.programs.Dir(), fmt.Sprintf("token-%d", i))
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			kept.close()
			return callers{}, callers{}, fmt.Errorf("writing a token: %w", err)
		}
		c, err := client.New(client.Config{Target: address, TLS: certs.ClientConfig(roots, serverName), TokenFile: file})
		if err != nil {
			kept.close()
			return callers{}, callers{}, err
		}
		fresh.calls = append(fresh.calls, func(ctx context.Context) error {
			_, err := c.Credentials(ctx)
			return err
		})
	}
	return kept, fresh, nil
}

func (c callers) close() {
	for _, conn := range c.conns {
		_ = conn.Close()
	}
}

// load lets all callers call for that long, and returns how long each call took.
func (c callers) load(ctx context.Context, length time.Duration) ([]time.Duration, error) {
	took := make([][]time.Duration, len(c.calls))
	errs := make([]error, len(c.calls))
	var calling sync.WaitGroup
	end := time.Now().Add(length)
	for i, call := range c.calls {
		calling.Go(func() {
			for now := time.Now(); now.Before(end); {
				if errs[i] = call(ctx); errs[i] != nil {
					return
				}
				done := time.Now()
				took[i] = append(took[i], done.Sub(now))
				now = done
			}
		})
	}
	calling.Wait()
	return slices.Concat(took...), errors.Join(errs...)
}

// throughput is the calls per second of all callers together. It is a side.
func (c callers) throughput(ctx context.Context, length time.Duration) ([]float64, error) {
	began := time.Now()
	took, err := c.load(ctx, length)
	return []float64{float64(len(took)) / time.Since(began).Seconds()}, err
}

// p99 is the latency, in microseconds, that one call in a hundred exceeds. It is a side.
func (c callers) p99(ctx context.Context, length time.Duration) ([]float64, error) {
	took, err := c.load(ctx, length)
	if err != nil || len(took) == 0 {
		return nil, err
	}
	slices.Sort(took)
	return []float64{float64(took[len(took)*99/100]) / float64(time.Microsecond)}, nil
}
