//go:build linux

package install

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/registry"
	"github.com/credence-iam/credence/integration/release"
	"github.com/credence-iam/credence/integration/release/releasetest"
	"github.com/credence-iam/credence/integration/stack"
)

const (
	installPage = "../../../docs/install.md"
	registryOf  = "ghcr.io" // of the page
)

// TestReleaseAsDocumented makes a release, publishes it to a registry from which the nodes pull, and follows docs/install.md
// by its own commands: with Helm, then without.
func TestReleaseAsDocumented(t *testing.T) {
	page := readPage(t)
	files := makeRelease(t, page.version)
	listener, err := d.Cluster.Host().Listen(t.Context(), "tcp", net.JoinHostPort(d.Cluster.Host().Address(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	address := registry.Start(t.Context(), listener)
	transport := &http.Transport{DialContext: d.Cluster.Host().Dial}
	published, err := release.Publish(t.Context(), files, address+"/credence-iam", transport)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range published {
		if p.SBOM != "" {
			releasetest.CheckReferrers(t, files, p, remote.WithTransport(transport))
		}
	}
	if err := d.Cluster.Mirror(registryOf, "http://"+address); err != nil {
		t.Fatal(err)
	}
	page.prepare(t, address, files)
	withoutNamespace(t)

	page.run(t, "create secret", "helm install", "create namespace shop")
	checkFirstPod(t, page, published)
	checkImages(t, published)
	page.run(t, "helm upgrade", "helm uninstall")
	page.run(t, "install.yaml")
	checkFirstPod(t, page, published)
	checkImages(t, published)
	page.command(t, "kubectl delete --wait -f "+filepath.Join(files, "install.yaml"))
}

// makeRelease runs make release in a clone of a tagged repository, and returns the folder of the release.
func makeRelease(t *testing.T, version string) string {
	t.Helper()
	releasetest.Isolate(t)
	origin, clone := releasetest.Tag(t, version), filepath.Join(t.TempDir(), "credence")
	releasetest.Git(t, origin, "clone", "--quiet", origin, clone)
	cmd := exec.CommandContext(t.Context(), "make", "release", "VERSION=v"+version, "PLATFORMS=linux/amd64,linux/arm64")
	cmd.Dir = clone
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make release: %v\n%s", err, output)
	}
	return filepath.Join(clone, ".build", "release")
}

// withoutNamespace uninstalls Credence and removes its namespace, until the test ends.
func withoutNamespace(t *testing.T) {
	t.Helper()
	secrets, err := d.Client.CoreV1().Secrets(deployment.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ns, err := d.Client.CoreV1().Namespaces().Get(t.Context(), deployment.Namespace, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	removeNamespace(t, deployment.Namespace)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		removeNamespace(t, "shop")
		removeNamespace(t, deployment.Namespace) // after a failure
		ns.ObjectMeta = metav1.ObjectMeta{Name: ns.Name, Labels: ns.Labels}
		if _, err := d.Client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		for _, secret := range secrets.Items {
			if secret.Type != corev1.SecretTypeOpaque {
				continue // Helm and cert-manager make the others.
			}
			secret.ObjectMeta = metav1.ObjectMeta{Name: secret.Name}
			if _, err := d.Client.CoreV1().Secrets(ns.Name).Create(ctx, &secret, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// removeNamespace deletes a namespace, and waits until it does not exist.
func removeNamespace(t *testing.T, namespace string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	if err := await.Poll(ctx, func() error {
		err := d.Client.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, fmt.Errorf("namespace %s exists", namespace))
	}); err != nil {
		t.Fatal(err)
	}
}

// checkFirstPod runs the page's first pod, and removes it.
func checkFirstPod(t *testing.T, page *page, published []release.Published) {
	t.Helper()
	kubetest.AwaitServiceAccount(t, d.Client, "shop")
	if output := page.run(t, "whoami.yaml"); !strings.Contains(output, "assumed-role/shop-cart/credence") {
		t.Errorf("the first pod printed %q", output)
	}
	pod, err := d.Client.CoreV1().Pods("shop").Get(t.Context(), "whoami", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := kubetest.Status(t, pod, stack.SidecarName).ImageID, reference(t, published, "sidecar"); got != want {
		t.Errorf("the sidecar is %s, want %s", got, want)
	}
	page.command(t, "kubectl -n shop delete pod whoami")
}

// checkImages compares the digests that run with those that were published.
func checkImages(t *testing.T, published []release.Published) {
	t.Helper()
	for _, component := range []string{"broker", "webhook"} {
		want := reference(t, published, component)
		pods, err := d.Pods(t.Context(), component)
		if err != nil || len(pods) == 0 {
			t.Fatalf("%d pods of the %s: %v", len(pods), component, err)
		}
		for _, pod := range pods {
			if got := kubetest.Status(t, &pod, component).ImageID; got != want {
				t.Errorf("pod %s runs %s, want %s", pod.Name, got, want)
			}
		}
	}
}

// reference returns the name by which the nodes know a published image.
func reference(t *testing.T, published []release.Published, component string) string {
	t.Helper()
	for _, p := range published {
		if _, path, ok := strings.Cut(p.Name, "/"); ok && strings.HasSuffix(path, "/credence-"+component) {
			return registryOf + "/" + path + "@" + p.Digest
		}
	}
	t.Fatalf("the %s is not published: %v", component, published)
	return ""
}

// page is docs/install.md with its commands and files.
type page struct {
	version  string
	commands []string
	files    map[string]string

	folder       string
	replacements *strings.Replacer
}

func readPage(t *testing.T) *page {
	t.Helper()
	text, err := os.ReadFile(installPage)
	if err != nil {
		t.Fatal(err)
	}
	p := &page{files: map[string]string{}, folder: t.TempDir()}
	for _, block := range regexp.MustCompile("(?ms)^```(bash|yaml)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		if block[1] == "bash" {
			p.commands = append(p.commands, block[2])
		} else if file := regexp.MustCompile(`^# (\S+\.yaml)\n`).FindStringSubmatch(block[2]); file != nil {
			p.files[file[1]] = block[2] // The last of two is for keys in a Secret.
		} else if strings.Contains(block[2], "kind: Pod\n") {
			p.files["whoami.yaml"] = block[2]
		}
	}
	version := regexp.MustCompile(`helm install credence oci://\S+ --version (\S+)`).FindStringSubmatch(string(text))
	if version == nil || len(p.commands) != 7 {
		t.Fatalf("%s has version %q and %d blocks of commands, want the 7 that this test runs", installPage, version, len(p.commands))
	}
	p.version = version[1]
	return p
}

// prepare writes the page's files, with doubles in place of AWS, the registry and the page of downloads.
func (p *page) prepare(t *testing.T, address, files string) {
	t.Helper()
	id, secret := d.STS.Keys()
	p.files["aws.env"] = "AWS_ACCESS_KEY_ID=" + id + "\nAWS_SECRET_ACCESS_KEY=" + secret.Reveal() + "\n"
	p.files["values.yaml"] = strings.Replace(p.files["values.yaml"], "aws:\n", fmt.Sprintf("aws:\n  stsEndpoint: %q\n", d.STS.URL()), 1)
	pod := regexp.MustCompile(`(?m)^( +)image: amazon/aws-cli\n +args: .*$`)
	if !pod.MatchString(p.files["whoami.yaml"]) {
		t.Fatalf("%s has no pod with the AWS CLI", installPage)
	}
	p.files["whoami.yaml"] = pod.ReplaceAllString(p.files["whoami.yaml"], fmt.Sprintf("${1}image: %s\n${1}imagePullPolicy: Never\n${1}args: [whoami]\n"+
		"${1}env: [{name: AWS_ENDPOINT_URL_STS, value: %q}]", deployment.AppImage, d.STS.URL()))
	for file, content := range p.files {
		if err := os.WriteFile(filepath.Join(p.folder, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p.replacements = strings.NewReplacer(
		"oci://"+registryOf+"/", "--plain-http oci://"+address+"/",
		"https://github.com/credence-iam/credence/releases/download/v"+p.version, files,
		"AWS_REGION=eu-central-1\n", "AWS_REGION=eu-central-1 AWS_ENDPOINT_URL_STS="+d.STS.URL()+"\n",
	)
}

// run runs the commands of the page that have these texts, in this order, and returns their output.
func (p *page) run(t *testing.T, texts ...string) (output string) {
	t.Helper()
	for _, text := range texts {
		found := 0
		for _, commands := range p.commands {
			if strings.Contains(commands, text) {
				output += p.command(t, p.replacements.Replace(commands))
				found++
			}
		}
		if found != 1 {
			t.Fatalf("%s has %d blocks of commands with %q, want 1", installPage, found, text)
		}
	}
	return output
}

// command runs commands of the shell in the folder of the page's files.
func (p *page) command(t *testing.T, commands string) string {
	t.Helper()
	path := filepath.Dir(d.Helm) + ":" + filepath.Dir(d.Kubectl)
	output, err := d.Run(t.Context(), "", "bash", "-euo", "pipefail", "-c", "PATH="+path+":$PATH; cd "+p.folder+"; "+commands)
	if err != nil {
		t.Fatal(err)
	}
	return output
}
