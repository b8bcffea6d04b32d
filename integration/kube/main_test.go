//go:build unix

// Package kube_test tests package broker/kube against a real API server: all kinds of tokens, pods and service accounts
// that are created and deleted, and an API server that becomes unavailable and returns. What does not depend on the API
// server's own behavior is tested in broker/kube itself, in virtual time.
package kube_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/kube/verify"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/kubetest"
)

const (
	audience = "credence-broker"
	// secondIssuer is accepted by the API server, which issues no tokens for it, as after a change of issuer.
	secondIssuer = "https://second.example"
	injectedKey  = policy.DefaultPrefix + "/injected"
	injectKey    = policy.DefaultPrefix + "/inject"
	roleKey      = policy.DefaultPrefix + "/role"
)

// All tests share one control plane.
var (
	control *cluster.Cluster
	client  kubernetes.Interface
)

func TestMain(m *testing.M) {
	config := cluster.Config{Progress: os.Stderr, APIServerFlags: []string{"--service-account-issuer=" + secondIssuer}}
	os.Exit(cluster.RunTests(config, func(_ context.Context, c *cluster.Cluster) (err error) {
		control = c
		config := c.Config()
		config.WarningHandler = rest.NoWarnings{}
		client, err = kubernetes.NewForConfig(config)
		return err
	}, m.Run))
}

func keys(t *testing.T) policy.Keys {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// logger writes to the test's log for as long as the test runs.
func logger(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// background runs run until the test ends.
func background(t *testing.T, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// startDirectory runs a directory until the test ends, and returns when it has listed all objects.
func startDirectory(t *testing.T, config *rest.Config) *kube.Directory {
	t.Helper()
	d, err := kube.NewDirectory(config, keys(t), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	background(t, d.Run)
	eventually(t, "the directory has listed everything", d.Synced)
	return d
}

// eventually waits for what a watch delivers.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	await.Until(t, what, func() error {
		if !condition() {
			return errors.New("it is not so")
		}
		return nil
	})
}

// namespace creates an opted-in namespace with ServiceAccount app, and returns its name.
func namespace(t *testing.T) string {
	t.Helper()
	ns := kubetest.Namespace(t, client, map[string]string{injectKey: "enabled"}, nil)
	account(t, ns, "app")
	return ns
}

func account(t *testing.T, ns, name string) *corev1.ServiceAccount {
	t.Helper()
	made, err := client.CoreV1().ServiceAccounts(ns).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// pod creates an injected pod. If change is not nil, it changes the pod before.
func pod(t *testing.T, ns, name string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{injectedKey: "true"}, Annotations: map[string]string{roleKey: "cart", "example.com/other": "x"}},
		Spec: corev1.PodSpec{
			ServiceAccountName: "app", AutomountServiceAccountToken: new(false),
			Containers: []corev1.Container{{Name: "app", Image: "app:1"}},
		},
	}
	if change != nil {
		change(p)
	}
	return kubetest.Create(t, client, ns, p)
}

// remove deletes a pod immediately.
func remove(t *testing.T, p *corev1.Pod) {
	t.Helper()
	if err := client.CoreV1().Pods(p.Namespace).Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
		t.Fatal(err)
	}
}

func podRef(p *corev1.Pod) *authenticationv1.BoundObjectReference {
	return &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.Name, UID: p.UID}
}

// token requests a token of a service account. bound may be nil.
func token(t *testing.T, ns, account string, life time.Duration, bound *authenticationv1.BoundObjectReference, audiences ...string) string {
	t.Helper()
	return tokenFrom(t, client, ns, account, life, bound, audiences...)
}

// tokenFrom is token for another cluster.
func tokenFrom(t *testing.T, client kubernetes.Interface, ns, account string, life time.Duration, bound *authenticationv1.BoundObjectReference, audiences ...string) string {
	t.Helper()
	response, err := client.CoreV1().ServiceAccounts(ns).CreateToken(t.Context(), account, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: audiences, BoundObjectRef: bound, ExpirationSeconds: new(int64(life.Seconds()))},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return response.Status.Token
}

// podToken requests the token that a kubelet would project into the pod.
func podToken(t *testing.T, p *corev1.Pod) string {
	t.Helper()
	return token(t, p.Namespace, p.Spec.ServiceAccountName, time.Hour, podRef(p), audience)
}

func idOf(t *testing.T, p *corev1.Pod) identity.Pod {
	t.Helper()
	account, err := client.CoreV1().ServiceAccounts(p.Namespace).Get(t.Context(), p.Spec.ServiceAccountName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return identity.Pod{
		Namespace: p.Namespace, Name: p.Name, UID: string(p.UID),
		ServiceAccount: account.Name, ServiceAccountUID: string(account.UID),
	}
}

func newJWKS(t *testing.T, config *rest.Config, issuers ...string) *verify.JWKS {
	t.Helper()
	v, err := verify.NewJWKS(verify.Config{REST: config, Audience: audience, Issuers: issuers, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func newTokenReview(t *testing.T, config *rest.Config) *verify.TokenReview {
	t.Helper()
	v, err := verify.NewTokenReview(verify.Config{REST: config, Audience: audience, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// outcome returns the term of docs/tokens.md for a result.
func outcome(err error) string {
	if err == nil {
		return "accepted"
	}
	return string(credential.ReasonOf(err))
}
