//go:build unix

package certmanager_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/certmanager"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/tools"
)

// patience bounds what a test waits for. Each takes below a second on an idle machine.
const patience = 2 * time.Minute

// needs skips a test under -short when it would build programs for minutes.
func needs(t *testing.T, programs ...tools.Tool) {
	t.Helper()
	if !testing.Short() {
		return
	}
	missing := slices.DeleteFunc(append(programs, cluster.Missing(0)...), tools.Built)
	if len(missing) > 0 {
		t.Skipf("-short, and %v would have to be built first (go run ./integration/tools/install)", missing)
	}
}

func path(t *testing.T, tool tools.Tool) string {
	t.Helper()
	path, err := tools.Path(t.Context(), tool, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// A world is a control plane.
type world struct {
	*cluster.Cluster
	client  kubernetes.Interface
	kubectl string
}

func start(t *testing.T) *world {
	t.Helper()
	c, err := cluster.Start(t.Context(), cluster.Config{Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			c.Run().KeepLogs()
			t.Log("the logs are in", c.Logs())
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	client, err := kubernetes.NewForConfig(c.Config())
	if err != nil {
		t.Fatal(err)
	}
	return &world{Cluster: c, client: client, kubectl: path(t, tools.Kubectl)}
}

// run runs kubectl with standard input. The error holds what it says.
func (w *world) run(ctx context.Context, input string, args ...string) error {
	cmd := exec.CommandContext(ctx, w.kubectl, append(args, "--kubeconfig="+w.Kubeconfig())...)
	cmd.Stdin = strings.NewReader(input)
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl %s: %w: %s", args[0], err, output)
	}
	return nil
}

func (w *world) apply(t *testing.T, from string, input string) {
	t.Helper()
	if err := w.run(t.Context(), input, "apply", "--server-side", "--filename="+from); err != nil {
		t.Fatal(err)
	}
}

// eventually tries until it succeeds.
func eventually(t *testing.T, what string, try func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// issuance asks for an authority and a leaf of its, and for the authority in a webhook configuration.
const issuance = `
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: selfsigned, namespace: default}
spec: {selfSigned: {}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: authority, namespace: default}
spec:
  isCA: true
  commonName: authority
  secretName: authority
  privateKey: {algorithm: ECDSA, rotationPolicy: Never}
  issuerRef: {name: selfsigned}
---
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: authority, namespace: default}
spec: {ca: {secretName: authority}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: leaf, namespace: default}
spec:
  dnsNames: [leaf.example]
  secretName: leaf
  privateKey: {algorithm: ECDSA, rotationPolicy: Always}
  issuerRef: {name: authority}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata:
  name: leaf
  annotations: {cert-manager.io/inject-ca-from: default/leaf}
webhooks:
- name: leaf.example.com
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Ignore
  clientConfig: {url: "https://leaf.example/"}
  rules: [{apiGroups: [nobody.example], apiVersions: [v1], resources: [nothing], operations: [CREATE]}]
`

// issued returns the leaf after checking that its authority signed it.
func (w *world) issued(ctx context.Context) (*x509.Certificate, []byte, error) {
	secret, err := w.client.CoreV1().Secrets("default").Get(ctx, "leaf", metav1.GetOptions{})
	if err != nil {
		return nil, nil, err
	}
	block, _ := pem.Decode(secret.Data[corev1.TLSCertKey])
	roots := x509.NewCertPool()
	if block == nil || !roots.AppendCertsFromPEM(secret.Data["ca.crt"]) {
		return nil, nil, errors.New("the Secret has no certificates")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, err
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "leaf.example"})
	return leaf, secret.Data["ca.crt"], err
}

// checkIssuance asks for certificates, and for a renewal.
func (w *world) checkIssuance(t *testing.T) {
	t.Helper()
	// The kinds have been defined a moment ago, and may not be served yet.
	eventually(t, "the objects to be accepted", func(ctx context.Context) error {
		return w.run(ctx, issuance, "apply", "--server-side", "--filename=-")
	})
	if err := w.run(t.Context(), "", "wait", "--namespace=default", "--for=condition=Ready", "certificate/leaf", "--timeout=2m"); err != nil {
		t.Fatal(err)
	}
	first, ca, err := w.issued(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the authority to be injected", func(ctx context.Context) error {
		hook, err := w.client.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, "leaf", metav1.GetOptions{})
		if err == nil && !bytes.Contains(hook.Webhooks[0].ClientConfig.CABundle, bytes.TrimSpace(ca)) {
			err = errors.New("it is not there")
		}
		return err
	})

	// What "cmctl renew" does.
	renewal := `{"status":{"conditions":[{"type":"Issuing","status":"True","reason":"ManuallyTriggered","message":"by a test","lastTransitionTime":"` +
		time.Now().UTC().Format(time.RFC3339) + `"}]}}`
	if err := w.run(t.Context(), "", "patch", "--namespace=default", "certificate/leaf", "--subresource=status", "--type=merge", "--patch="+renewal); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new leaf", func(ctx context.Context) error {
		second, again, err := w.issued(ctx)
		switch {
		case err != nil:
			return err
		case second.SerialNumber.Cmp(first.SerialNumber) == 0:
			return errors.New("it is the old one")
		case bytes.Equal(second.RawSubjectPublicKeyInfo, first.RawSubjectPublicKeyInfo):
			t.Error("the new leaf has the old key")
		case !bytes.Equal(again, ca):
			t.Error("another authority signed the new leaf")
		}
		return nil
	})
}

func TestWithoutNodesNorWebhook(t *testing.T) {
	needs(t, tools.CertManager)
	_ = path(t, tools.CertManager) // build it before anything runs
	w := start(t)
	crds, err := certmanager.CRDs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.apply(t, crds, "")
	command, err := certmanager.Command(t.Context(), w.Kubeconfig(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Run().Start(command); err != nil {
		t.Fatal(err)
	}
	w.checkIssuance(t)
}

// TestOfficialChart applies what Helm would, and runs what the Deployments would: with their commands, their
// environment, and the rights of their ServiceAccounts.
func TestOfficialChart(t *testing.T) {
	needs(t, tools.CertManager, tools.Helm)
	program := path(t, tools.CertManager)
	w := start(t)
	port, health := freePort(t), freePort(t)
	rendered := render(t, "webhook.url.host=localhost:"+port)
	w.apply(t, "-", "{apiVersion: v1, kind: Namespace, metadata: {name: "+certmanager.Namespace+"}}\n---\n"+string(rendered))

	pods := make(map[string]corev1.PodSpec)
	deployments, err := w.client.AppsV1().Deployments(certmanager.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, deployment := range deployments.Items {
		pods[deployment.Name] = deployment.Spec.Template.Spec
	}
	jobs, err := w.client.BatchV1().Jobs(certmanager.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const checkName = "cert-manager-startupapicheck"
	for _, job := range jobs.Items {
		pods[job.Name] = job.Spec.Template.Spec
	}
	if len(pods) != 4 || len(pods[checkName].Containers) != 1 {
		t.Fatalf("got %d kinds of pods, want controller, cainjector, webhook and %s", len(pods), checkName)
	}
	commands := make(map[string]process.Command)
	for name, pod := range pods {
		container := pod.Containers[0]
		command := process.Command{Name: name, Path: program, Env: []string{"POD_NAMESPACE=" + certmanager.Namespace}}
		for _, arg := range container.Args {
			command.Args = append(command.Args, strings.ReplaceAll(arg, "$(POD_NAMESPACE)", certmanager.Namespace))
		}
		for _, variable := range container.Env {
			if variable.ValueFrom == nil {
				command.Env = append(command.Env, variable.Name+"="+variable.Value)
			}
		}
		// Later flags win. The pods would have an address each.
		command.Args = append(command.Args, "--kubeconfig="+w.kubeconfigOf(t, pod.ServiceAccountName),
			"--secure-port="+port, "--healthz-port="+health, "--livez=")
		if name == "cert-manager-webhook" {
			command.Args = append(command.Args, "--dynamic-serving-dns-names=localhost")
		}
		commands[name] = command
	}
	check := commands[checkName]
	delete(commands, checkName)
	for _, command := range commands {
		if _, err := w.Run().Start(command); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), check.Path, check.Args...)
	cmd.Env = check.Env
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("startupapicheck: %v\n%s", err, output)
	}
	w.checkIssuance(t)

	err = w.run(t.Context(), `
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: nameless, namespace: default}
spec: {secretName: nameless, issuerRef: {name: authority}}
`, "apply", "--server-side", "--filename=-")
	if err == nil || !strings.Contains(err.Error(), `admission webhook "webhook.cert-manager.io" denied the request`) {
		t.Errorf("a Certificate without names: %v", err)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	port, err := process.FreePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(port)
}

// kubeconfigOf writes a kubeconfig file with the rights of a ServiceAccount.
func (w *world) kubeconfigOf(t *testing.T, account string) string {
	t.Helper()
	config, err := w.ServiceAccount(t.Context(), certmanager.Namespace, account)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: config.Host, CertificateAuthorityData: config.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: config.BearerToken}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// render returns what helm would install, hooks included; set are further values, as NAME=VALUE.
func render(t *testing.T, set ...string) []byte {
	t.Helper()
	args, err := certmanager.Helm(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	args[0] = "template"
	for _, value := range set {
		args = append(args, "--set="+value)
	}
	cmd := exec.CommandContext(t.Context(), path(t, tools.Helm), args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	rendered, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		t.Fatalf("rendering cert-manager: %v\n%s", err, exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return rendered
}

// TestChartRunsOurImage needs no cluster.
func TestChartRunsOurImage(t *testing.T) {
	needs(t, tools.Helm)
	rendered := render(t)
	modes := make(map[string]string)
	crds := 0
	for document := range bytes.SplitSeq(rendered, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(document, &kind); err != nil {
			t.Fatal(err)
		}
		var name string
		var pod corev1.PodSpec
		switch kind.Kind {
		case "Deployment":
			var deployment appsv1.Deployment
			if err := yaml.UnmarshalStrict(document, &deployment); err != nil {
				t.Fatal(err)
			}
			name, pod = deployment.Name, deployment.Spec.Template.Spec
		case "Job":
			var job batchv1.Job
			if err := yaml.UnmarshalStrict(document, &job); err != nil {
				t.Fatal(err)
			}
			name, pod = job.Name, job.Spec.Template.Spec
		case "CustomResourceDefinition":
			crds++
			if bytes.Contains(document, []byte("helm.sh/resource-policy")) {
				t.Error("Helm would leave CRDs behind")
			}
			continue
		case "Role", "RoleBinding":
			if bytes.Contains(document, []byte("namespace: kube-system")) {
				t.Errorf("a %s in kube-system", kind.Kind)
			}
			continue
		default:
			continue
		}
		for _, container := range pod.Containers {
			if container.Image != certmanager.Reference || container.ImagePullPolicy != corev1.PullNever {
				t.Errorf("%s runs %s, pulled %s", name, container.Image, container.ImagePullPolicy)
			}
			for _, variable := range container.Env {
				if variable.Name == "MODE" {
					modes[name] = variable.Value
				}
			}
		}
	}
	if diff := cmp.Diff(map[string]string{
		"cert-manager":                 "controller",
		"cert-manager-cainjector":      "cainjector",
		"cert-manager-webhook":         "webhook",
		"cert-manager-startupapicheck": "startupapicheck",
	}, modes); diff != "" {
		t.Errorf("modes (-want +got):\n%s", diff)
	}
	if crds != 6 {
		t.Errorf("%d CustomResourceDefinitions, want 6", crds)
	}
}

func TestArchive(t *testing.T) {
	needs(t, tools.CertManager)
	archive, err := certmanager.Archive(t.Context(), t.TempDir(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(archive.Path); err != nil || info.Size() < archive.Platforms[0].Program || archive.Reference != certmanager.Reference {
		t.Errorf("got %+v, %v", archive, err)
	}
}
