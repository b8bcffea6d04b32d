//go:build unix

package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// controlPlane is the demo without nodes: it runs what a node would run.
type controlPlane struct {
	*demo

	stack     *stack.Stack
	awsclient string // the path of the program
	sidecar   *stack.Sidecar
}

func onControlPlane(d *demo) play {
	p := &controlPlane{demo: d}
	return d.local(play{
		opening: "This demo shows the whole path on a real Kubernetes control plane. What a node would run, runs as local processes.\n" +
			takes(notBuilt(tools.ControlPlane())),
		steps: []step{
			{"Start a control plane, Credence, an STS and an object store", `etcd, kube-apiserver and kube-controller-manager run on the loopback address. Beside them run the broker,
the webhook, and local doubles of STS and S3 with AWS's protocols. Each bucket opens only for the role of
the same name. The demo runs each command as shown.`, p.start},
			{"A namespace opts in and permits roles", optInText, p.optIn},
			{"A pod requests a role", "", p.createPod},
			{"What the webhook added to the pod", "", p.showInjected},
			{"The token that identifies the pod", `A kubelet requests such a token for the volume, and renews it. Here kubectl requests it. The token is a
secret, so the demo shows only its claims, which the API server has signed.`, p.showToken},
			{"The injected sidecar, run as the pod's spec says", `It has the command, env and volumes of the pod. Only its port and the folder of its files differ, because
all pods here share one machine.`, p.runSidecar},
			{"The application: an unmodified AWS SDK", `awsclient is a small program with the AWS SDK for Go. It runs with the container's env and three settings:
AWS_REGION, and AWS_ENDPOINT_URL_STS and AWS_ENDPOINT_URL_S3 for the local services.`, p.runApplication},
			{"What Credence refuses when a user creates a pod", "", p.showRefusals},
			{"What the broker logged", auditText, func(ctx context.Context) error { return p.showAudit(ctx, p.readAudit) }},
		},
	})
}

// start starts the control plane and Credence. It compiles the programs of Credence while the control plane is built and
// starts.
func (p *controlPlane) start(ctx context.Context) (err error) {
	compiled := make(chan struct{})
	go func() {
		defer close(compiled)
		_ = stack.Compile(ctx) // stack.Start reports the error
	}()
	defer func() { <-compiled }()
	// One command builds all programs, which share most packages.
	if _, err = tools.Paths(ctx, tools.ControlPlane(), p); err != nil {
		return err
	}
	if p.cluster, err = cluster.Start(ctx, cluster.Config{Runs: p.runs, Progress: p}); err != nil {
		return err
	}
	if p.kubectl, err = tools.Path(ctx, tools.Kubectl, p); err != nil {
		return err
	}
	if _, err := p.kube(ctx, "", "version"); err != nil {
		return err
	}
	if <-compiled; ctx.Err() != nil {
		return ctx.Err()
	}
	p.stack, err = stack.Start(ctx, stack.Config{Cluster: p.cluster, Progress: p, Buckets: buckets})
	return err
}

func (p *controlPlane) runSidecar(ctx context.Context) (err error) {
	_, _ = fmt.Fprintln(p, "building awsclient")
	if p.awsclient, err = p.stack.BuildAWSClient(ctx); err != nil {
		return err
	}
	began := time.Now()
	if p.sidecar, err = p.stack.RunSidecar(ctx, p.pod); err != nil {
		return err
	}
	p.say(fmt.Sprintf("%s runs as process %d. Its startup probe passed after %d ms: it has credentials.",
		stack.SidecarName, p.sidecar.PID(), time.Since(began).Milliseconds()))
	return nil
}

func (p *controlPlane) createPod(ctx context.Context) error {
	out, err := p.kube(ctx, p.podManifest(), "apply", "-n", p.namespace, "-f", "-")
	if err != nil && strings.Contains(out, "denied the request: credence:") {
		return refusal()
	}
	return err
}

func (p *controlPlane) showToken(ctx context.Context) error {
	token, err := p.quietKube(ctx, "", "create", "token", p.pod.Spec.ServiceAccountName, "-n", p.namespace, "--audience="+stack.Audience,
		"--bound-object-kind=Pod", "--bound-object-name="+p.pod.Name, "--bound-object-uid="+string(p.pod.UID))
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(token, ".")
	payload, _, _ := strings.Cut(rest, ".")
	claims, err := base64.RawURLEncoding.DecodeString(payload)
	if err == nil {
		claims, err = yaml.JSONToYAML(claims)
	}
	if err != nil {
		return fmt.Errorf("decoding the token's claims: %w", err)
	}
	p.output(string(claims))
	return nil
}

func (p *controlPlane) runApplication(ctx context.Context) error {
	env, err := p.sidecar.AppEnv()
	if err != nil {
		return err
	}
	env = append(env, "AWS_REGION="+stack.Region, "AWS_ENDPOINT_URL_STS="+p.stack.STS.URL(), "AWS_ENDPOINT_URL_S3="+p.stack.Store.URL())
	return p.showCalls(func(stdin string, args ...string) (string, error) {
		return p.command(ctx, p.awsclient, env, stdin, args...)
	})
}

func (p *controlPlane) readAudit(context.Context) (string, error) {
	log, err := os.ReadFile(p.stack.Broker.Log())
	if err != nil {
		return "", fmt.Errorf("reading the broker's log: %w", err)
	}
	return string(log), nil
}
