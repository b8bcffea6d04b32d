//go:build unix

package main

import (
	"context"
	_ "embed" // for the manifest
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

//go:embed pod.yaml
var podYAML string

// controlPlane is the demo without nodes: it runs what a node would run.
type controlPlane struct {
	*demo

	store     *minio.Server
	stack     *stack.Stack
	awsclient string // the path of the program
	sidecar   *stack.Sidecar
}

func onControlPlane(d *demo) play {
	p := &controlPlane{demo: d}
	return play{
		opening: "Kubernetes control plane without nodes. What a node would run, runs here as local processes.",
		steps: []step{
			{"Start a control plane, Credence, an STS and an object store", p.start},
			{"A namespace opts in and permits roles", p.optIn},
			{"A pod requests a role", p.createPod},
			{"What the webhook added to the pod", func(ctx context.Context) error { return p.showInjected(ctx, app) }},
			{"The token that identifies the pod", p.showToken},
			{"The injected sidecar, run as the pod's spec says", p.runSidecar},
			{"The application: an unmodified AWS SDK", p.runApplication},
			{"What Credence refuses when a user creates a pod", p.showRefusals},
			{"What the broker logged", func(ctx context.Context) error { return p.showAudit(ctx, p.readAudit) }},
		},
		kept: func() {},
	}
}

func (p *controlPlane) start(ctx context.Context) (err error) {
	// The cluster first: kubectl consists mostly of what the cluster builds.
	if p.cluster, err = cluster.Start(ctx, cluster.Config{Runs: p.runs, Progress: p}); err != nil {
		return err
	}
	if p.kubectl, err = tools.Path(ctx, tools.Kubectl, p); err != nil {
		return err
	}
	p.say("etcd, kube-apiserver and kube-controller-manager run on the loopback address. The demo runs each command as shown.")
	if _, err := p.kube(ctx, "", "version"); err != nil {
		return err
	}
	if p.store, err = minio.Start(ctx, p.cluster.Run(), p.cluster.Host(), p); err != nil {
		return err
	}
	sessions, err := stack.FillStore(ctx, p.store, buckets...)
	if err != nil {
		return err
	}
	p.say(fmt.Sprintf("MinIO runs, with the buckets %s. Only the role of its name opens each.", strings.Join(buckets, " and ")))
	if p.stack, err = stack.Start(ctx, stack.Config{Cluster: p.cluster, Progress: p, STS: ststest.Config{MinIO: sessions}}); err != nil {
		return err
	}
	p.say("The broker, the webhook and an STS with AWS's protocol run. MinIO makes the STS's credentials.")
	_, _ = fmt.Fprintln(p, "building awsclient")
	p.awsclient = filepath.Join(p.cluster.Run().Dir(), "bin", "awsclient")
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", p.awsclient, "github.com/credence-iam/credence/integration/awsclient") //nolint:gosec // The path is ours.
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the AWS client: %w\n%s", err, out)
	}
	return nil
}

func (p *controlPlane) optIn(ctx context.Context) error {
	if err := p.demo.optIn(ctx); err != nil {
		return err
	}
	if err := p.stack.AwaitTrust(ctx, namespace); err != nil {
		return err
	}
	p.say("The broker has published its root certificate there, as ConfigMap credence-trust.")
	return nil
}

func (p *controlPlane) createPod(ctx context.Context) error {
	manifest := strings.NewReplacer("ROLE", quoteYAML(p.role), "BUCKET", p.bucket()).Replace(podYAML)
	out, err := p.kube(ctx, manifest, "apply", "-n", namespace, "-f", "-")
	if err != nil && strings.Contains(out, "denied the request: credence:") {
		return refusal()
	}
	return err
}

func (p *controlPlane) showToken(ctx context.Context) error {
	p.say("A kubelet requests such a token for the volume, and renews it. Here kubectl requests it:")
	projection, _ := p.projected()
	token, err := p.quietKube(ctx, "", "create", "token", p.pod.Spec.ServiceAccountName, "-n", namespace, "--audience="+projection.Audience,
		fmt.Sprintf("--duration=%ds", *projection.ExpirationSeconds),
		"--bound-object-kind=Pod", "--bound-object-name="+p.pod.Name, "--bound-object-uid="+string(p.pod.UID))
	if err != nil {
		return err
	}
	var claims struct {
		Audience   []string `json:"aud"`
		Issuer     string   `json:"iss"`
		Subject    string   `json:"sub"`
		Expires    int64    `json:"exp"`
		Kubernetes struct {
			Pod struct{ Name, UID string } `json:"pod"`
		} `json:"kubernetes.io"`
	}
	_, rest, _ := strings.Cut(token, ".")
	payload, _, _ := strings.Cut(rest, ".")
	text, err := base64.RawURLEncoding.DecodeString(payload)
	if err == nil {
		err = json.Unmarshal(text, &claims)
	}
	if err != nil {
		return fmt.Errorf("decoding the token's claims: %w", err)
	}
	expires := time.Unix(claims.Expires, 0)
	p.say("The token is a secret, so the demo shows only its claims, which the API server has signed:")
	p.output(fmt.Sprintf("iss  %s\naud  %s\nsub  %s\npod  %s, uid %s\nexp  %s, in %v",
		claims.Issuer, strings.Join(claims.Audience, ", "), claims.Subject, claims.Kubernetes.Pod.Name, claims.Kubernetes.Pod.UID,
		expires.UTC().Format(time.RFC3339), time.Until(expires).Round(time.Second)))
	return nil
}

func (p *controlPlane) runSidecar(ctx context.Context) (err error) {
	began := time.Now()
	if p.sidecar, err = p.stack.RunSidecar(ctx, p.pod); err != nil {
		return err
	}
	p.say(fmt.Sprintf("%s runs as process %d, with the command, env and volumes of the pod. Only its port and the folder of "+
		"its files differ, because all pods here share one machine. Its startup probe passed after %d ms: it has credentials.",
		stack.SidecarName, p.sidecar.PID(), time.Since(began).Milliseconds()))
	return nil
}

func (p *controlPlane) runApplication(ctx context.Context) error {
	env, err := p.sidecar.AppEnv()
	if err != nil {
		return err
	}
	p.say("awsclient is a small program with the AWS SDK for Go. It runs with the container's env and three settings: " +
		"AWS_REGION, and AWS_ENDPOINT_URL_STS and AWS_ENDPOINT_URL_S3 for the local services.")
	env = append(env, "AWS_REGION="+stack.Region, "AWS_ENDPOINT_URL_STS="+p.stack.STS.URL(), "AWS_ENDPOINT_URL_S3="+p.store.Endpoint())
	return p.showCalls(func(stdin string, args ...string) (string, error) {
		return p.command(ctx, p.awsclient, env, stdin, args...)
	})
}

func (p *controlPlane) readAudit(context.Context) (string, error) {
	log, err := os.ReadFile(p.stack.BrokerLog())
	if err != nil {
		return "", fmt.Errorf("reading the broker's log: %w", err)
	}
	return string(log), nil
}
