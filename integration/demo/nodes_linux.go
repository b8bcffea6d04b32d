package main

import (
	"cmp"
	"context"
	_ "embed" // for the manifest
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
)

//go:embed deployment.yaml
var deploymentYAML string

// nodes is the demo on a cluster with a node, where pods run.
type nodes struct {
	*demo

	deployment *deployment.Deployment
}

func onNodes(d *demo) play {
	p := &nodes{demo: d}
	return play{
		opening: "Kubernetes with a node, in its own networks on this machine.",
		steps: []step{
			{"Start a cluster: control plane, DNS, a node with kubelet and containerd", "", p.start},
			{"Build the images; start an STS and an object store that pods can reach", `The images are built FROM scratch, without Docker, and loaded on the node. Beside them run an STS with AWS's
protocol and an S3 double. Each bucket opens only for the role of the same name.
The demo runs each command as shown.`, p.prepare},
			{"Install cert-manager with Helm", "", func(ctx context.Context) error { return p.install(ctx, p.deployment.CertManager) }},
			{"Install Credence with Helm", "The values name the images, the local STS, and a Secret with the broker's own AWS keys.", p.installCredence},
			{"A namespace opts in and permits roles", optInText, p.optIn},
			{"A Deployment requests a role, and runs", "", p.deploy},
			{"What the webhook added to its pod", "", p.showInjected},
			{"The application: an unmodified AWS SDK", `awsclient is a small program with the AWS SDK for Go, alone in its image. Its only settings are those in the
manifest and those that the webhook added.`, p.runApplication},
			{"What Credence refuses when a user creates a pod", "", p.showRefusals},
			{"What Credence refuses when a Deployment creates a pod", `The API server stores the Deployment, because Credence checks only pods. The Events of its ReplicaSet say
why it has no pod.`, p.showRefusedDeployment},
			{"What the broker logged", auditText, func(ctx context.Context) error { return p.showAudit(ctx, p.readAudit) }},
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
	_, err = p.kube(ctx, "", "get", "nodes")
	return err
}

// install runs Helm and shows the first lines of its output. The rest is for users who install by hand.
func (p *nodes) install(ctx context.Context, args []string) error {
	out, err := p.command(ctx, p.deployment.Helm, nil, "", args...)
	for line := range strings.Lines(out) {
		if err != nil || strings.HasPrefix(line, "NAME:") || strings.HasPrefix(line, "STATUS:") {
			p.output(line)
		}
	}
	return err
}

func (p *nodes) installCredence(ctx context.Context) error {
	if err := p.install(ctx, p.deployment.Credence); err != nil {
		return err
	}
	_, err := p.kube(ctx, "", "get", "pods,certificates", "-n", deployment.Namespace)
	return err
}

// manifest is a Deployment whose application waits for commands.
func (p *nodes) manifest(name, role string) string {
	var env strings.Builder
	for _, e := range p.deployment.AppEnv() {
		fmt.Fprintf(&env, "        - {name: %s, value: %q}\n", e.Name, e.Value)
	}
	return strings.NewReplacer("NAME", name, "ROLE", quoteYAML(role), "IMAGE", deployment.AppImage).Replace(deploymentYAML) + env.String()
}

func (p *nodes) deploy(ctx context.Context) error {
	if _, err := p.kube(ctx, p.manifest(app, p.role), "apply", "-n", namespace, "-f", "-"); err != nil {
		return err
	}
	if !slices.Contains(buckets, p.bucket()) {
		if err := p.describe(ctx, app); err != nil {
			return err
		}
		return refusal()
	}
	if _, err := p.kube(ctx, "", "rollout", "status", "deployment", app, "-n", namespace, "--timeout=2m"); err != nil {
		return err
	}
	_, err := p.kube(ctx, "", "get", "pods", "-n", namespace)
	return err
}

func (p *nodes) runApplication(ctx context.Context) error {
	return p.showCalls(func(stdin string, args ...string) (string, error) {
		command := []string{"exec", "-n", namespace, "deploy/" + app, "-c", "app"}
		if stdin != "" {
			command = append(command, "-i")
		}
		return p.command(ctx, p.kubectl, nil, stdin, append(append(command, "--", deployment.AppProgram), args...)...)
	})
}

// describeTimeout is how long a refusal may take to become an Event. The ReplicaSet tries at once.
const describeTimeout = time.Minute

// describe shows the Events of the Deployment's ReplicaSet when they include a refusal.
func (p *nodes) describe(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	args := []string{"describe", "replicaset", "-l", "app=" + name, "-n", namespace}
	return await.Poll(ctx, func() error {
		out, err := p.deployment.Run(ctx, "", p.kubectl, args...)
		if err != nil || !strings.Contains(out, "does not permit role") {
			return cmp.Or(err, errors.New("no Event reports the refusal"))
		}
		p.typed("", append([]string{filepath.Base(p.kubectl)}, args...)...)
		_, events, _ := strings.Cut(out, "\nEvents:")
		p.output("…\nEvents:" + events)
		return nil
	})
}

func (p *nodes) showRefusedDeployment(ctx context.Context) error {
	if _, err := p.kube(ctx, p.manifest("greedy", "admin"), "apply", "-n", namespace, "-f", "-"); err != nil {
		return err
	}
	return p.describe(ctx, "greedy")
}

func (p *nodes) readAudit(ctx context.Context) (string, error) {
	return p.deployment.Run(ctx, "", p.kubectl, "logs", "-n", deployment.Namespace, "-l", "app.kubernetes.io/component=broker", "--tail=-1")
}
