package main

import (
	"cmp"
	"context"
	_ "embed" // for the manifest
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/tools"
)

//go:embed deployment.yaml
var deploymentYAML string

// nodes is the demo on a cluster with a node, where pods run.
type nodes struct {
	*demo

	deployment *deployment.Deployment
}

func onNodes(d *demo, missing []tools.Tool) play {
	p := &nodes{demo: d}
	return d.local(play{
		opening: "This demo shows the whole path on a real Kubernetes with a node, in its own networks on this machine.\n" + takes(missing),
		steps:   p.steps(false),
		kept:    p.showNodes,
	})
}

// inTwoParts shows what a control plane alone can show, while it builds the missing programs. Then it shows the rest on a
// cluster with a node.
func inTwoParts(d *demo, missing []tools.Tool) play {
	first, second := &controlPlane{demo: d}, &nodes{demo: d}
	// The first part waits for nothing that it does not need.
	later := slices.DeleteFunc(slices.Clone(missing), func(tool tools.Tool) bool { return !onlyForNodes(tool) })
	return d.local(play{
		opening: `This demo shows the whole path on a real Kubernetes, in two parts: first on a control plane alone, then on a
cluster with a node. The programs for the node are built during the first part.
` + takes(missing),
		steps: append([]step{
			{"Part 1: start a control plane and Credence", `etcd, kube-apiserver and kube-controller-manager run on the loopback address. Beside them run the broker and
the webhook. The demo runs each command as shown.`, func(ctx context.Context) error {
				if err := first.start(ctx); err != nil {
					return err
				}
				d.background = inBackground(ctx, later, func(ctx context.Context, progress io.Writer) error {
					_, err := tools.Paths(ctx, later, progress)
					return err
				})
				return nil
			}},
			{"A namespace opts in and permits roles", optInText, d.optIn},
			{"A pod requests a role", "", first.createPod},
			{"What the webhook added to the pod", "", d.showInjected},
			{"What Credence refuses when a user creates a pod", "", d.showRefusals},
			{"Part 2: stop the control plane, and build the remaining programs for a node", "", func(context.Context) error {
				d.background.show(d)
				err := d.stopCluster()
				d.cluster, d.pod = nil, nil
				return cmp.Or(err, d.background.wait())
			}},
		}, second.steps(true)...),
		kept: second.showNodes,
	})
}

func (p *nodes) showNodes() {
	for _, node := range p.cluster.Nodes() {
		p.say("A shell on " + node.Name() + ":")
		p.typed("", "nsenter", "--all", fmt.Sprintf("--target=%d", node.PID()))
	}
}

// steps are the steps on a cluster with a node. In the second part of a demo, they omit what the first part has shown.
func (p *nodes) steps(second bool) []step {
	steps := []step{
		{"Start a cluster: control plane, DNS, a node with kubelet and containerd", "", p.start},
		{"Build the images; start an STS and an object store that pods can reach", `The images are built FROM scratch, without Docker, and loaded on the node. Beside them run local doubles of STS
and S3 with AWS's protocols. Each bucket opens only for the role of the same name.`, p.prepare},
		{"Install cert-manager with Helm", "", func(ctx context.Context) error { return p.install(ctx, p.deployment.CertManager) }},
		{"Install Credence with Helm", "The values name the images, the local STS, and a Secret with the broker's own AWS keys.", p.installCredence},
		{"A namespace opts in and permits roles", optInText, p.optIn},
		{"A Deployment requests a role, and runs", "", p.deploy},
	}
	if second {
		steps[4].explanation = ""
	} else {
		steps[1].explanation += "\nThe demo runs each command as shown."
		steps = append(steps, step{"What the webhook added to its pod", "", p.showInjected})
	}
	steps = append(steps, step{"The application: an unmodified AWS SDK", `awsclient is a small program with the AWS SDK for Go, alone in its image. Its only settings are those in the
manifest and those that the webhook added.`, p.runApplication})
	if !second {
		steps = append(steps, step{"What Credence refuses when a user creates a pod", "", p.showRefusals})
	}
	return append(steps,
		step{"What Credence refuses when a Deployment creates a pod", `The API server stores the Deployment, because Credence checks only pods. The Events of its ReplicaSet say
why it has no pod.`, p.showRefusedDeployment},
		step{"What the broker logged", auditText, func(ctx context.Context) error { return p.showAudit(ctx, p.readAudit) }},
	)
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
	if _, err := p.kube(ctx, p.manifest(app, p.role), "apply", "-n", p.namespace, "-f", "-"); err != nil {
		return err
	}
	if !slices.Contains(buckets, p.bucket()) {
		if err := p.describe(ctx, app); err != nil {
			return err
		}
		return refusal()
	}
	if _, err := p.kube(ctx, "", "rollout", "status", "deployment", app, "-n", p.namespace, "--timeout=2m"); err != nil {
		return err
	}
	_, err := p.kube(ctx, "", "get", "pods", "-n", p.namespace)
	return err
}

func (p *nodes) runApplication(ctx context.Context) error {
	return p.showCalls(func(stdin string, args ...string) (string, error) {
		command := []string{"exec", "-n", p.namespace, "deploy/" + app, "-c", "app"}
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
	args := []string{"describe", "replicaset", "-l", "app=" + name, "-n", p.namespace}
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
	if _, err := p.kube(ctx, p.manifest("greedy", "admin"), "apply", "-n", p.namespace, "-f", "-"); err != nil {
		return err
	}
	return p.describe(ctx, "greedy")
}

func (p *nodes) readAudit(ctx context.Context) (string, error) {
	return p.deployment.Run(ctx, "", p.kubectl, "logs", "-n", deployment.Namespace, "-l", "app.kubernetes.io/component=broker", "--tail=-1")
}
