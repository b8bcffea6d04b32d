//go:build linux

// Package deployment installs Credence on a cluster with nodes as users do: images, cert-manager and the chart, with Helm.
// Beside it run an STS that tests control, and an S3 double whose buckets the STS's sessions open. Pods can reach both.
//
// Everything runs in the cluster's own networks, and ends with the cluster.
package deployment

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/certmanager"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/s3test"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// These are the same in every deployment.
const (
	// Namespace is the namespace of the broker and the webhook.
	Namespace = "credence"
	// AppImage is the image of awsclient, an application that uses an AWS SDK and does not know Credence.
	AppImage = "localhost/awsclient:1"
	// AppProgram is the program in AppImage.
	AppProgram = "/awsclient"

	module      = "github.com/credence-iam/credence"
	release     = "credence"
	tag         = "local"
	keysSecret  = "credence-aws-keys" // of the broker's own AWS user
	helmTimeout = "3m"                // the disk that programs are loaded from may be busy
)

// Config configures [Prepare].
type Config struct {
	// Cluster is the cluster on which Credence is installed. It has nodes. Required.
	Cluster *cluster.Cluster
	// STS configures the STS. Prepare sets its account. Default: every role can be assumed.
	STS ststest.Config
	// Buckets are made in the S3 double. Only the role of a bucket's name may use it.
	Buckets []string
	// Images are further images for the nodes: by reference, the package of the program in folder integration.
	Images map[string]string
	// Progress gets a line for each program that is built. Default: discarded.
	Progress io.Writer
}

// Deployment is everything that Credence needs on a cluster, and the commands that install it. Methods may be called
// concurrently, except those that install and uninstall.
type Deployment struct {
	// Cluster is the cluster.
	Cluster *cluster.Cluster
	// STS is the STS that the broker calls.
	STS *ststest.Server
	// Store has the buckets.
	Store *s3test.Server
	// Client has all rights on the cluster.
	Client kubernetes.Interface
	// Helm and Kubectl are the paths of the programs.
	Helm, Kubectl string
	// CertManager and Credence are the arguments with which helm installs each and waits for it.
	CertManager, Credence []string
}

// Prepare builds the images and loads them on the nodes, starts the STS and the S3 double, and writes the values of the
// charts. It installs nothing. Both doubles run until ctx ends.
func Prepare(ctx context.Context, cfg Config) (*Deployment, error) {
	if cfg.Progress == nil {
		cfg.Progress = io.Discard
	}
	config := cfg.Cluster.Config()
	config.WarningHandler = rest.NoWarnings{} // client-go would log them, between the caller's own output
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	d := &Deployment{Client: client, Cluster: cfg.Cluster}
	for tool, path := range map[tools.Tool]*string{tools.Helm: &d.Helm, tools.Kubectl: &d.Kubectl} {
		if *path, err = tools.Path(ctx, tool, cfg.Progress); err != nil {
			return nil, err
		}
	}
	if err := d.loadImages(ctx, cfg); err != nil {
		return nil, err
	}
	if err := d.startServers(ctx, cfg); err != nil {
		return nil, err
	}
	if d.CertManager, err = certmanager.Helm(ctx, d.dir()); err != nil {
		return nil, err
	}
	return d, d.prepareCredence(ctx)
}

// dir is the folder of the deployment's files.
func (d *Deployment) dir() string { return filepath.Join(d.Cluster.Run().Dir(), "deployment") }

// loadImages builds all images for this machine's processor, and loads them on the nodes.
func (d *Deployment) loadImages(ctx context.Context, cfg Config) error {
	folder := filepath.Join(d.dir(), "images")
	archives, err := images.Build(ctx, images.Config{Folder: folder, Tag: tag, Architectures: []string{runtime.GOARCH}, Progress: cfg.Progress})
	if err != nil {
		return err
	}
	programs := map[string]string{AppImage: "awsclient"}
	maps.Copy(programs, cfg.Images)
	for reference, pkg := range programs {
		_, _ = fmt.Fprintln(cfg.Progress, "building", path.Base(pkg))
		archive, err := images.BuildLocal(ctx, folder, reference, module+"/integration/"+pkg)
		if err != nil {
			return err
		}
		archives = append(archives, archive)
	}
	issuer, err := certmanager.Archive(ctx, folder, cfg.Progress)
	if err != nil {
		return err
	}
	for _, archive := range append(archives, issuer) {
		if err := d.Cluster.LoadImage(ctx, archive.Path); err != nil {
			return err
		}
	}
	return nil
}

// startServers starts the STS and the S3 double.
func (d *Deployment) startServers(ctx context.Context, cfg Config) error {
	host := d.Cluster.Host()
	var listeners [2]net.Listener
	for i := range listeners {
		var err error
		if listeners[i], err = host.Listen(ctx, "tcp", net.JoinHostPort(host.Address(), "0")); err != nil {
			return fmt.Errorf("listening for STS and S3: %w", err)
		}
	}
	cfg.STS.Account = stack.Account
	var err error
	if d.STS, err = ststest.StartOn(ctx, listeners[0], host.Dial, cfg.STS); err != nil {
		return err
	}
	d.Store = s3test.Start(ctx, listeners[1], d.STS, cfg.Buckets...)
	return nil
}

// prepareCredence makes the namespace with the keys of the broker's AWS user, as outside AWS, and writes the values of
// the chart.
func (d *Deployment) prepareCredence(ctx context.Context) error {
	chartFolder, err := chart.Folder()
	if err != nil {
		return err
	}
	if _, err := d.Client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: Namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making namespace %s: %w", Namespace, err)
	}
	id, secret := d.STS.Keys()
	if _, err := d.Client.CoreV1().Secrets(Namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: keysSecret},
		StringData: map[string]string{"id": id, "secret": secret.Reveal()},
	}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("storing the broker's AWS keys: %w", err)
	}
	values := filepath.Join(d.dir(), "credence-values.yaml")
	if err := os.WriteFile(values, []byte(fmt.Sprintf(credenceValues, tag, stack.Region, d.STS.URL(), stack.RoleARN(""), keysSecret)), 0o600); err != nil {
		return fmt.Errorf("writing the chart's values: %w", err)
	}
	d.Credence = []string{
		"upgrade", "--install", release, chartFolder, "--namespace=" + Namespace,
		"--values=" + values, "--wait", "--timeout=" + helmTimeout,
		"--set=check.timeout=2m", // less than that of Helm, so that Helm shows the cause
	}
	return nil
}

// credenceValues are the values of the chart.
const credenceValues = `images:
  broker: {repository: localhost/credence-broker, tag: %[1]s}
  webhook: {repository: localhost/credence-webhook, tag: %[1]s}
  sidecar: {repository: localhost/credence-sidecar, tag: %[1]s}
aws:
  region: %[2]s
  stsEndpoint: %[3]q
  baseARN: %[4]q
broker:
  env:
  - {name: AWS_ACCESS_KEY_ID, valueFrom: {secretKeyRef: {name: %[5]s, key: id}}}
  - {name: AWS_SECRET_ACCESS_KEY, valueFrom: {secretKeyRef: {name: %[5]s, key: secret}}}
`

// Install installs cert-manager and Credence. Further arguments for Credence, such as --set, follow those in d.
func (d *Deployment) Install(ctx context.Context, more ...string) error {
	if _, err := d.Run(ctx, "", d.Helm, d.CertManager...); err != nil {
		return err
	}
	return d.Upgrade(ctx, more...)
}

// Upgrade installs Credence, or changes the installed one. It returns when pods can be injected, because the chart's check
// waits for that.
func (d *Deployment) Upgrade(ctx context.Context, more ...string) error {
	_, err := d.Run(ctx, "", d.Helm, slices.Concat(d.Credence, more)...)
	return err
}

// Uninstall removes Credence if it is installed, and returns when it is removed.
func (d *Deployment) Uninstall(ctx context.Context) error {
	_, err := d.Run(ctx, "", d.Helm, "uninstall", release, "--ignore-not-found", "--namespace="+Namespace, "--wait", "--timeout="+helmTimeout)
	return err
}

// Run runs a program that can reach the cluster, such as kubectl, and returns its output. It returns the output with an
// error, too.
func (d *Deployment) Run(ctx context.Context, stdin, path string, args ...string) (string, error) {
	cmd := d.Cluster.Command(ctx, path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := d.Cluster.Host().Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s", filepath.Base(path), strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}
