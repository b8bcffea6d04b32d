//go:build unix

package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/stack"
)

const (
	// callTimeout limits a call of the user's API server.
	callTimeout = 30 * time.Second
	// deleteTimeout limits the wait for the end of the namespace, which has no pods.
	deleteTimeout = 2 * time.Minute
	// injectKey is the end of the label that opts a namespace in. Before it is the prefix of the installation.
	injectKey = "/inject"
)

// ownCluster is the demo on a cluster that the user has, and where Credence is installed. It makes one namespace.
type ownCluster struct {
	*demo

	client  kubernetes.Interface
	context string
}

// onContext reads the user's kubeconfig files and connects to the cluster. It changes nothing before the user confirms,
// by CONFIRM or by a line of input.
func onContext(ctx context.Context, d *demo, name string, input io.Reader) (play, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	files, err := rules.Load()
	if err != nil {
		return play{}, fmt.Errorf("reading the kubeconfig files: %w", err)
	}
	if len(files.Contexts) == 0 {
		return play{}, errors.New("found no kubeconfig file with contexts; set KUBECONFIG")
	}
	if files.Contexts[name] == nil {
		return play{}, fmt.Errorf("the kubeconfig files have no context %q; set CONTEXT to one of %q", name, slices.Sorted(maps.Keys(files.Contexts)))
	}
	config, err := clientcmd.NewNonInteractiveClientConfig(*files, name, nil, rules).ClientConfig()
	if err != nil {
		return play{}, fmt.Errorf("reading context %s: %w", name, err)
	}
	config.Timeout, config.WarningHandler = callTimeout, rest.NoWarnings{}
	p := &ownCluster{demo: d, context: name}
	if p.client, err = kubernetes.NewForConfig(config); err != nil {
		return play{}, fmt.Errorf("making a client: %w", err)
	}
	version, err := p.client.Discovery().ServerVersion()
	if err != nil {
		return play{}, fmt.Errorf("calling %s of context %s: %w", config.Host, name, err)
	}
	if d.kubectl, err = exec.LookPath("kubectl"); err != nil {
		return play{}, errors.New("the demo calls your cluster with kubectl, which is not in PATH; install it")
	}
	d.role = cmp.Or(d.role, stack.RoleARN(buckets[0]))
	if !strings.HasPrefix(d.role, "arn:") {
		return play{}, fmt.Errorf("DEMO_ROLE %q is not an ARN; set one such as %s", d.role, stack.RoleARN(d.role))
	}
	d.kubeFlags = []string{"--context=" + name}
	d.namespace = "credence-demo-" + strings.ToLower(rand.Text()[:6])
	d.say(fmt.Sprintf(`This demo uses a cluster that exists, in which Credence must be installed:
  context  %s
  server   %s, Kubernetes %s
It makes namespace %s, and removes it at the end. It makes nothing else, and no pod runs: its pods are
dry runs, which the API server and Credence check but do not store.`, name, config.Host, version.GitVersion, d.namespace))
	if err := p.confirm(ctx, input); err != nil {
		return play{}, err
	}
	return play{
		opening: "You can press Ctrl-C at any time: the namespace is removed.",
		steps: []step{
			{"Find Credence in the cluster", "Its webhook gets the pods of namespaces with this label:", p.find},
			{"A namespace opts in and permits a role", optInText, p.optIn},
			{"A pod requests the role, as a dry run", "", p.createPod},
			{"What Credence refuses when a user creates a pod", "", p.showRefusals},
		},
		next: `docs/install.md  a pod of yours that runs, with a role of your account
docs/errors.md   every refusal, and what to do`,
		kept: func() {
			d.say("In another terminal:")
			d.typed("", "kubectl", "get", "namespace", d.namespace, "-o", "yaml", d.kubeFlags[0])
		},
		stop:    p.stop,
		stopped: "Namespace " + d.namespace + " is removed.",
	}, nil
}

// confirm returns an error unless the user agrees.
func (p *ownCluster) confirm(ctx context.Context, input io.Reader) error {
	if os.Getenv("CONFIRM") == "yes" {
		return nil
	}
	p.say("Type yes to continue:")
	line := make(chan string, 1)
	go func() {
		text, _ := bufio.NewReader(input).ReadString('\n') // without a terminal it is empty
		line <- text
	}()
	select {
	case text := <-line:
		if strings.TrimSpace(text) == "yes" {
			return nil
		}
		return errors.New("not confirmed, so nothing was changed; type yes, or set CONFIRM=yes")
	case <-ctx.Done():
		return errors.New("interrupted before anything was changed")
	}
}

// find shows the label that opts namespaces in, and takes the prefix of all keys from it.
func (p *ownCluster) find(ctx context.Context) error {
	out, err := p.kube(ctx, "", "get", "mutatingwebhookconfigurations", "credence", "-o", "jsonpath={.webhooks[0].namespaceSelector.matchLabels}")
	if strings.Contains(out, "NotFound") {
		return fmt.Errorf("found no Credence in the cluster of context %s; install it as in docs/install.md", p.context)
	}
	if err != nil {
		return err
	}
	var labels map[string]string
	if err := json.Unmarshal([]byte(out), &labels); err != nil {
		return fmt.Errorf("decoding the labels: %w", err)
	}
	for label := range labels {
		if prefix, ok := strings.CutSuffix(label, injectKey); ok {
			p.prefix = prefix
			return nil
		}
	}
	return fmt.Errorf("the webhook selects no namespaces by a label that ends in %s: %w", injectKey, errUnexpected)
}

func (p *ownCluster) createPod(ctx context.Context) error {
	// The API server refuses pods until the namespace has its service account.
	if err := await.Poll(ctx, func() error {
		_, err := p.client.CoreV1().ServiceAccounts(p.namespace).Get(ctx, "default", metav1.GetOptions{})
		return err
	}); err != nil {
		return fmt.Errorf("waiting for the service account of namespace %s: %w", p.namespace, err)
	}
	out, err := p.quietKube(ctx, p.podManifest(), "apply", "-n", p.namespace, "--dry-run=server", "-o", "json", "-f", "-")
	if err != nil {
		p.output(out)
		return err
	}
	if err := json.Unmarshal([]byte(out), &p.pod); err != nil {
		return fmt.Errorf("decoding the pod: %w", err)
	}
	p.say("The output has what the webhook added: the sidecar, the env of the application and the volume:")
	return p.showAdded(p.pod)
}

// stop removes the namespace, if the demo has made it, and waits until it is removed.
func (p *ownCluster) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	namespaces := p.client.CoreV1().Namespaces()
	err := namespaces.Delete(ctx, p.namespace, metav1.DeleteOptions{})
	if err == nil {
		err = await.Poll(ctx, func() error {
			_, err := namespaces.Get(ctx, p.namespace, metav1.GetOptions{})
			if err == nil {
				err = errors.New("it still exists")
			}
			if apierrors.IsNotFound(err) {
				return nil
			}
			return err
		})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("removing namespace %s of context %s: %w; remove it with kubectl", p.namespace, p.context, err)
	}
	return nil
}
