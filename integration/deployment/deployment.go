//go:build linux

// Package deployment puts Credence on a cluster with nodes as its users do: images, cert-manager and the
// chart, by Helm. Beside it there are an STS that tests command, and a MinIO whose objects its keys open, both
// of which pods can reach.
//
// Everything runs in the cluster's own networks, and ends with the cluster.
package deployment

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/certmanager"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/tools"
)

// What is the same in every deployment.
const (
	// Namespace is where the broker and the webhook run.
	Namespace = "credence"
	// Region is the AWS region in use.
	Region = "eu-central-1"
	// Account is the account of the broker, and of roles written as names.
	Account = "123456789012"
	// AppImage is the image of awsclient, an application that knows nothing of Credence.
	AppImage = "localhost/awsclient:1"
	// AppProgram is its program.
	AppProgram = "/awsclient"

	module      = "github.com/credence-iam/credence"
	release     = "credence"
	tag         = "local"
	keysSecret  = "credence-aws-keys" // of the broker's own AWS user
	helmTimeout = "3m"                // loading Go programs from a disk that others use too

	trustTimeout = time.Minute // it takes a second
	pollInterval = 50 * time.Millisecond
)

// Config configures [Prepare].
type Config struct {
	// Cluster is where Credence is put. It has nodes. Required.
	Cluster *cluster.Cluster
	// STS configures the STS. Its account is set, and its keys are minted by MinIO. Default: every role can
	// be assumed.
	STS ststest.Config
	// Buckets are made in MinIO. The role of a bucket's name may do everything in it, and nothing else; other
	// roles may do nothing.
	Buckets []string
	// Progress gets a line when a program is being built. Default: nobody is told.
	Progress io.Writer
}

// A Deployment is everything that Credence needs on a cluster, and what it is installed with. Its methods can
// be called concurrently, but for those that install and remove.
type Deployment struct {
	// STS is the STS that the broker asks.
	STS *ststest.Server
	// Store has the objects that roles open.
	Store *minio.Server
	// Client has all rights on the cluster.
	Client kubernetes.Interface
	// Helm and Kubectl are the paths of the programs.
	Helm, Kubectl string
	// CertManager and Credence are what helm is called with to install each, and wait for it.
	CertManager, Credence []string

	cluster *cluster.Cluster
}

// Prepare builds the images and gives them to the nodes, starts the STS and MinIO, and writes the values that
// the charts are installed with. Nothing is installed yet. ctx is the STS's life, too.
func Prepare(ctx context.Context, cfg Config) (*Deployment, error) {
	if cfg.Progress == nil {
		cfg.Progress = io.Discard
	}
	config := cfg.Cluster.Config()
	config.WarningHandler = rest.NoWarnings{} // client-go would log them, over the caller's own output
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("making a client: %w", err)
	}
	d := &Deployment{Client: client, cluster: cfg.Cluster}
	for tool, path := range map[tools.Tool]*string{tools.Helm: &d.Helm, tools.Kubectl: &d.Kubectl} {
		if *path, err = tools.Path(ctx, tool, cfg.Progress); err != nil {
			return nil, err
		}
	}
	if err := d.loadImages(ctx, cfg.Progress); err != nil {
		return nil, err
	}
	if err := d.startServers(ctx, cfg); err != nil {
		return nil, err
	}
	if d.CertManager, err = certmanager.Helm(ctx, d.dir()); err != nil {
		return nil, err
	}
	return d, d.writeCredence(ctx)
}

// dir is the folder of the deployment's files.
func (d *Deployment) dir() string { return filepath.Join(d.cluster.Run().Dir(), "deployment") }

// loadImages builds all images, for this machine's processor, and loads them.
func (d *Deployment) loadImages(ctx context.Context, progress io.Writer) error {
	folder := filepath.Join(d.dir(), "images")
	archives, err := images.Build(ctx, images.Config{Folder: folder, Tag: tag, Architectures: []string{runtime.GOARCH}, Progress: progress})
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintln(progress, "building awsclient")
	app, err := images.BuildLocal(ctx, folder, AppImage, module+"/integration/awsclient")
	if err != nil {
		return err
	}
	issuer, err := certmanager.Archive(ctx, folder, progress)
	if err != nil {
		return err
	}
	for _, archive := range append(archives, app, issuer) {
		if err := d.cluster.LoadImage(ctx, archive.Path); err != nil {
			return err
		}
	}
	return nil
}

// startServers starts MinIO, with the buckets, and an STS in front of it.
func (d *Deployment) startServers(ctx context.Context, cfg Config) (err error) {
	host := d.cluster.Host()
	if d.Store, err = minio.Start(ctx, d.cluster.Run(), host, cfg.Progress); err != nil {
		return err
	}
	accessKey, secretKey := d.Store.Root()
	root := s3.New(s3.Options{
		Region: Region, BaseEndpoint: aws.String(d.Store.Endpoint()), UsePathStyle: true, HTTPClient: d.Store.Client(),
		Credentials: awscredentials.NewStaticCredentialsProvider(accessKey, secretKey, ""),
	})
	policies := make(map[string]string)
	for _, bucket := range cfg.Buckets {
		if _, err := root.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &bucket}); err != nil {
			return fmt.Errorf("making bucket %s: %w", bucket, err)
		}
		key, body := "only-for-"+bucket+".txt", strings.NewReader("hello "+bucket+"\n")
		if _, err := root.PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: body}); err != nil {
			return fmt.Errorf("filling bucket %s: %w", bucket, err)
		}
		policies[RoleARN(bucket)] = fmt.Sprintf(`{"Version":"2012-10-17","Statement":[`+
			`{"Effect":"Allow","Action":["s3:*"],"Resource":["arn:aws:s3:::%[1]s","arn:aws:s3:::%[1]s/*"]}]}`, bucket)
	}
	cfg.STS.Account = Account
	cfg.STS.MinIO = &ststest.MinIO{
		Endpoint: d.Store.Endpoint(), AccessKey: accessKey, SecretKey: credential.NewSecret(secretKey),
		Policies: policies, Client: d.Store.Client(),
	}
	listener, err := host.Listen(ctx, "tcp", net.JoinHostPort(host.Address(), "0"))
	if err != nil {
		return fmt.Errorf("listening for STS: %w", err)
	}
	d.STS, err = ststest.StartOn(ctx, listener, host.Dial, cfg.STS)
	return err
}

// RoleARN is the ARN of a role of the broker's account.
func RoleARN(role string) string { return "arn:aws:iam::" + Account + ":role/" + role }

// writeCredence writes the values of our chart, and makes the namespace with the keys of the broker's AWS
// user, as somebody outside AWS would.
func (d *Deployment) writeCredence(ctx context.Context) error {
	chart, err := chart()
	if err != nil {
		return err
	}
	id, secret := d.STS.Keys()
	if _, err := d.Client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: Namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making namespace %s: %w", Namespace, err)
	}
	if _, err := d.Client.CoreV1().Secrets(Namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: keysSecret},
		StringData: map[string]string{"id": id, "secret": secret.Reveal()},
	}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("storing the broker's AWS keys: %w", err)
	}
	key := func(name, key string) any {
		return map[string]any{"name": name, "valueFrom": map[string]any{"secretKeyRef": map[string]any{"name": keysSecret, "key": key}}}
	}
	image := func(name string) any {
		return map[string]any{"repository": "localhost/credence-" + name, "tag": tag}
	}
	content, err := yaml.Marshal(map[string]any{
		"images": map[string]any{"broker": image("broker"), "webhook": image("webhook"), "sidecar": image("sidecar")},
		"aws": map[string]any{
			"region": Region, "stsEndpoint": d.STS.URL(), "baseARN": RoleARN(""),
		},
		"broker": map[string]any{"env": []any{key("AWS_ACCESS_KEY_ID", "id"), key("AWS_SECRET_ACCESS_KEY", "secret")}},
	})
	if err != nil {
		return fmt.Errorf("encoding the chart's values: %w", err)
	}
	values, err := d.write("credence-values.yaml", content)
	d.Credence = []string{
		"upgrade", "--install", release, chart, "--namespace=" + Namespace,
		"--values=" + values, "--wait", "--timeout=" + helmTimeout,
	}
	return err
}

// chart finds the chart in the checkout around the working folder.
func chart() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the chart: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		path := filepath.Join(dir, "charts", "credence")
		if _, err := os.Stat(filepath.Join(path, "Chart.yaml")); err == nil {
			return path, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("finding the chart: no charts/credence at or above the working folder (run it from within the checkout)")
		}
	}
}

func (d *Deployment) write(name string, content []byte) (string, error) {
	path := filepath.Join(d.dir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return "", fmt.Errorf("writing a file of the deployment: %w", err)
	}
	return path, nil
}

// Install installs cert-manager, and Credence. More arguments for Credence, such as --set, follow those in d.
func (d *Deployment) Install(ctx context.Context, more ...string) error {
	if _, err := d.Run(ctx, "", d.Helm, d.CertManager...); err != nil {
		return err
	}
	return d.Upgrade(ctx, more...)
}

// Upgrade installs Credence, or changes the installed one, and returns when pods can be injected.
func (d *Deployment) Upgrade(ctx context.Context, more ...string) error {
	if _, err := d.Run(ctx, "", d.Helm, append(append([]string(nil), d.Credence...), more...)...); err != nil {
		return err
	}
	// Helm does not wait for cert-manager to tell the API server whom to trust.
	ctx, cancel := context.WithTimeout(ctx, trustTimeout)
	defer cancel()
	for {
		hook, err := d.Client.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, release, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("waiting for the webhook's roots: %w", err)
		}
		if len(hook.Webhooks) > 0 && len(hook.Webhooks[0].ClientConfig.CABundle) > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the webhook's roots: %w", context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

// Uninstall removes Credence, and returns when it is gone.
func (d *Deployment) Uninstall(ctx context.Context) error {
	_, err := d.Run(ctx, "", d.Helm, "uninstall", release, "--namespace="+Namespace, "--wait", "--timeout="+helmTimeout)
	return err
}

// Run runs a program that can reach the cluster, such as kubectl, and returns all that it has written, beside
// an error too.
func (d *Deployment) Run(ctx context.Context, stdin, path string, args ...string) (string, error) {
	cmd := d.cluster.Command(ctx, path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := d.cluster.Host().Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s", filepath.Base(path), strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

// AppEnv is what an application's environment has in addition to what injection adds: the region, and the
// local services in the place of AWS's.
func (d *Deployment) AppEnv() []corev1.EnvVar {
	return []corev1.EnvVar{
		{Name: "AWS_REGION", Value: Region},
		{Name: "AWS_ENDPOINT_URL_STS", Value: d.STS.URL()},
		{Name: "AWS_ENDPOINT_URL_S3", Value: d.Store.Endpoint()},
	}
}
