package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/tools"
)

// nodes is the demonstration on a cluster with a node, where pods run.
type nodes struct {
	*demo

	deployment *deployment.Deployment
}

func onNodes(d *demo) play {
	p := &nodes{demo: d}
	return play{
		opening: "Kubernetes with a node, in networks of its own on this machine.",
		needs:   tools.Deployment(),
		steps: []step{
			{"Start a cluster: control plane, DNS, a node with kubelet and containerd", p.start},
			{"Build the images; start an STS and an object store that pods can reach", p.prepare},
			{"Install cert-manager with Helm", p.installCertManager},
			{"Install Credence with Helm", p.installCredence},
			{"A namespace opts in, and says which roles its pods may have", p.optIn},
			{"A Deployment asks for a role, and runs", p.deploy},
			{"What the webhook has added to its pod", func(ctx context.Context) error { return p.showInjected(ctx, "-l", "app="+app) }},
			{"The application: an AWS SDK that knows nothing of Credence", p.runApplication},
			{"What is refused, while somebody is looking", p.showRefusals},
			{"What is refused while nobody is looking: a Deployment's pods", p.showRefusedDeployment},
			{"What the broker has written down", func(ctx context.Context) error { return p.showAudit(ctx, p.readAudit) }},
		},
		kept: func() {
			for _, node := range d.cluster.Nodes() {
				d.say("A shell on " + node.Name() + ":")
				d.typed("", "nsenter", "--all", fmt.Sprintf("--target=%d", node.PID()))
			}
		},
	}
}

func (p *nodes) start(ctx context.Context) (err error) {
	p.cluster, err = cluster.Start(ctx, cluster.Config{Nodes: 1, Runs: p.runs, Progress: p})
	return err
}

func (p *nodes) prepare(ctx context.Context) (err error) {
	if p.deployment, err = deployment.Prepare(ctx, deployment.Config{Cluster: p.cluster, Buckets: buckets, Progress: p}); err != nil {
		return err
	}
	p.kubectl = p.deployment.Kubectl
	p.say("The images are built FROM scratch, without Docker, and given to the node. MinIO runs, with the buckets " +
		strings.Join(buckets, " and ") + ", and an STS that speaks AWS's protocol; MinIO makes its keys. Every command is run as it is shown.")
	_, err = p.kube(ctx, "", "get", "nodes")
	return err
}

// install runs Helm and shows the first lines of what it says: the rest is for people who install by hand.
func (p *nodes) install(ctx context.Context, args []string) error {
	out, err := p.command(ctx, p.deployment.Helm, nil, "", args...)
	if err != nil {
		p.output(out)
		return err
	}
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "NAME:") || strings.HasPrefix(line, "STATUS:") {
			p.output(line)
		}
	}
	return nil
}

func (p *nodes) installCertManager(ctx context.Context) error {
	return p.install(ctx, p.deployment.CertManager)
}

func (p *nodes) installCredence(ctx context.Context) error {
	if err := p.install(ctx, p.deployment.Credence); err != nil {
		return err
	}
	p.say("The values name the images, the local STS, and a Secret with the broker's own AWS keys.")
	_, err := p.kube(ctx, "", "get", "pods,certificates", "-n", deployment.Namespace)
	return err
}

// manifest is that of a Deployment whose application waits to be told what to do.
func (p *nodes) manifest(name, annotation string) string {
	var env strings.Builder
	for _, e := range p.deployment.AppEnv() {
		fmt.Fprintf(&env, "        - {name: %s, value: %q}\n", e.Name, e.Value)
	}
	return `apiVersion: apps/v1
kind: Deployment
metadata:
  name: ` + name + `
spec:
  selector: {matchLabels: {app: ` + name + `}}
  template:
    metadata:
      labels: {app: ` + name + `}
      annotations:
        ` + annotation + `
    spec:
      containers:
      - name: app
        image: ` + deployment.AppImage + `
        args: [watch, 24h]
        env:
` + env.String()
}

func (p *nodes) deploy(ctx context.Context) error {
	annotation, err := p.annotation()
	if err != nil {
		return err
	}
	if _, err := p.kube(ctx, p.manifest(app, annotation), "apply", "-n", namespace, "-f", "-"); err != nil {
		return err
	}
	if p.refused() {
		return p.showRefusal(ctx, app)
	}
	if _, err := p.kube(ctx, "", "rollout", "status", "deployment", app, "-n", namespace, "--timeout=2m"); err != nil {
		return err
	}
	_, err = p.kube(ctx, "", "get", "pods", "-n", namespace)
	return err
}

// refused says whether the role is none of those that the namespace permits.
func (p *nodes) refused() bool {
	for _, bucket := range buckets {
		if p.role == bucket || p.role == roles+bucket {
			return false
		}
	}
	return true
}

// showRefusal shows why the Deployment's pods are not made, and ends the demonstration.
func (p *nodes) showRefusal(ctx context.Context, name string) error {
	if err := p.describe(ctx, name); err != nil {
		return err
	}
	return refusal()
}

func (p *nodes) runApplication(ctx context.Context) error {
	p.say("awsclient is a small program around the AWS SDK for Go, alone in its image. It has no settings but those in the " +
		"manifest, and what the webhook has added.")
	return p.showCalls(func(stdin string, args ...string) (string, error) {
		command := []string{"exec", "-n", namespace, "deploy/" + app, "-c", "app"}
		if stdin != "" {
			command = append(command, "-i")
		}
		return p.command(ctx, p.kubectl, nil, stdin, append(append(command, "--", deployment.AppProgram), args...)...)
	})
}

// describeTimeout is how long a refusal may take to become an Event: the ReplicaSet tries at once.
const describeTimeout = time.Minute

// describe shows the Events of the Deployment's ReplicaSet, once there is a refusal among them.
func (p *nodes) describe(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, describeTimeout, errors.New("no Event tells of the refusal"))
	defer cancel()
	args := []string{"describe", "replicaset", "-l", "app=" + name, "-n", namespace}
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		out, err := p.deployment.Run(ctx, "", p.kubectl, args...)
		if err == nil && strings.Contains(out, "does not permit role") {
			p.typed("", append([]string{filepath.Base(p.kubectl)}, args...)...)
			_, events, _ := strings.Cut(out, "\nEvents:")
			p.output("…\nEvents:" + events)
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-ticker.C:
		}
	}
}

func (p *nodes) showRefusedDeployment(ctx context.Context) error {
	if _, err := p.kube(ctx, p.manifest("greedy", "iam.amazonaws.com/role: admin"), "apply", "-n", namespace, "-f", "-"); err != nil {
		return err
	}
	p.say("It was stored, since only pods are judged. Why it has none, stands where Kubernetes puts such things:")
	return p.describe(ctx, "greedy")
}

func (p *nodes) readAudit(ctx context.Context) (string, error) {
	return p.deployment.Run(ctx, "", p.kubectl, "logs", "-n", deployment.Namespace, "-l", "app.kubernetes.io/component=broker", "--tail=-1")
}
