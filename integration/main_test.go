//go:build unix

// Package integration tests Credence end to end on a real control plane: real webhook and broker
// programs, the injected sidecar run as its pod's spec says, unmodified AWS SDKs, and a real object
// store behind the credentials. Nothing here knows how the parts work inside.
package integration

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/certs"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/stack"
)

// What all tests share: one control plane, one Credence on it, one object store.
var (
	control   *cluster.Cluster
	credence  *stack.Stack
	store     *minio.Server
	awsclient string // the path of the program
)

const (
	// bucket is what the role "shelf" may read and write, and no other role may.
	bucket = "shelf"
	// annotation keys, as users write them.
	roleKey      = "iam.amazonaws.com/role"
	permittedKey = "iam.amazonaws.com/permitted"
	durationKey  = "iam.amazonaws.com/duration"
	injectLabel  = "iam.amazonaws.com/inject"
)

// shortLife is what a session asked for 15 minutes, the shortest that STS gives, really lasts here:
// long enough that the least RefreshAfter, 30 s, comes before half of it.
const shortLife = 70 * time.Second

func TestMain(m *testing.M) {
	flag.Parse()
	if missing := cluster.Missing(0); testing.Short() && len(missing) > 0 {
		fmt.Printf("SKIP: -short, and %v would have to be built first (go run ./integration/tools/install)\n", missing)
		return
	}
	ctx := context.Background()
	var failed error
	code := cluster.RunTests(ctx, cluster.Config{Progress: os.Stderr}, func(c *cluster.Cluster) {
		control = c
		failed = setUp(ctx)
	}, func() int {
		if failed != nil {
			fmt.Fprintln(os.Stderr, "setting up:", failed)
			return 1
		}
		defer credence.Close()
		return m.Run()
	})
	os.Exit(code)
}

// A result that Go's test cache holds is of the programs as they are.
func TestSourcesAreRead(t *testing.T) {
	t.Parallel()
	if n, err := stack.ReadSources(t.Context()); err != nil || n < 50 {
		t.Errorf("%d sources were read: %v", n, err)
	}
}

func setUp(ctx context.Context) (err error) {
	if store, err = minio.Start(ctx, control.Run(), control.Host(), os.Stderr); err != nil {
		return err
	}
	accessKey, secretKey := store.Root()
	admin := s3.New(s3.Options{
		Region: stack.Region, BaseEndpoint: aws.String(store.Endpoint()), UsePathStyle: true,
		Credentials: awscredentials.NewStaticCredentialsProvider(accessKey, secretKey, ""),
	})
	if _, err := admin.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: aws.String(bucket)}); err != nil {
		return fmt.Errorf("making a bucket: %w", err)
	}
	allow, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": []any{map[string]any{
		"Effect": "Allow", "Action": []string{"s3:*"}, "Resource": []string{"arn:aws:s3:::" + bucket, "arn:aws:s3:::" + bucket + "/*"},
	}}})
	if err != nil {
		return err
	}
	credence, err = stack.Start(ctx, stack.Config{Cluster: control, Progress: os.Stderr, STS: ststest.Config{
		MinIO: &ststest.MinIO{
			Endpoint: store.Endpoint(), AccessKey: accessKey, SecretKey: credential.NewSecret(secretKey),
			Policies: map[string]string{arn("shelf"): string(allow)},
		},
		SessionLife: func(requested time.Duration) time.Duration {
			if requested == 15*time.Minute {
				return shortLife
			}
			return requested
		},
	}})
	if err != nil {
		return err
	}
	awsclient = filepath.Join(control.Run().Dir(), "bin", "awsclient")
	build := exec.CommandContext(ctx, "go", "build", "-o", awsclient, "./awsclient")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the AWS client: %w\n%s", err, out)
	}
	return nil
}

// arn is the ARN of a role of the broker's account.
func arn(role string) string { return "arn:aws:iam::" + stack.Account + ":role/" + role }

// namespace makes an opted-in namespace that permits what the expression matches, named after the
// test.
func namespace(t *testing.T, permitted string) string {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	name = name[:min(len(name), 63)]
	if err := credence.Namespace(t.Context(), name, map[string]string{permittedKey: permitted}); err != nil {
		t.Fatal(err)
	}
	return name
}

// create makes a pod with these annotations and returns it as stored.
func create(t *testing.T, namespace, name string, annotations map[string]string) *corev1.Pod {
	t.Helper()
	pod, err := credence.Client.CoreV1().Pods(namespace).Create(t.Context(), stack.Pod(name, annotations), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// remove deletes a pod and returns when it is gone.
func remove(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	now := int64(0)
	if err := credence.Client.CoreV1().Pods(pod.Namespace).Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
}

// run runs the sidecar of a pod until the test ends.
func run(t *testing.T, pod *corev1.Pod) *stack.Sidecar {
	t.Helper()
	sidecar, err := credence.RunSidecar(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		sidecar.Stop(10 * time.Second)
		if err := sidecar.Err(); err != nil {
			t.Errorf("the sidecar did not end well: %v", err)
		}
	})
	return sidecar
}

// app is the environment of the pod's application, with the endpoints of the STS and the object store
// of this test in the place of AWS's own.
func app(t *testing.T, sidecar *stack.Sidecar) []string {
	t.Helper()
	env, err := sidecar.AppEnv()
	if err != nil {
		t.Fatal(err)
	}
	return append(append(env, stack.NoAWSFiles()...), "HOME="+t.TempDir(), "PATH="+os.Getenv("PATH"),
		"AWS_REGION="+stack.Region, "AWS_DEFAULT_REGION="+stack.Region,
		"AWS_ENDPOINT_URL_STS="+credence.STS.URL(), "AWS_ENDPOINT_URL_S3="+store.Endpoint())
}

// command runs a program with that environment and returns its output.
func command(t *testing.T, env []string, stdin, name string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env, cmd.Stdin = env, strings.NewReader(stdin)
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%s %q: %w: %s", filepath.Base(name), args, err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}

// token requests a token of the pod for the broker.
func token(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	text, err := credence.Token(t.Context(), pod, stack.Audience, stack.TokenSeconds)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// ask asks the broker for credentials as whoever the token says, over the client that sidecars use.
func ask(t *testing.T, token string) (credential.Lease, error) {
	t.Helper()
	c := dial(t, token)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return c.Credentials(ctx)
}

func dial(t *testing.T, token string) *client.Client {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Target: credence.BrokerAddress(), TLS: brokerTLS(t), TokenFile: file})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func brokerTLS(t *testing.T) *tls.Config {
	t.Helper()
	roots, err := certs.NewRoots(credence.WriteRoots(t.TempDir()), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	return certs.ClientConfig(roots, "")
}

// refused checks that err is a refusal of that reason, and that there is nothing beside it.
func refused(t *testing.T, lease credential.Lease, err error, reason credential.Reason) {
	t.Helper()
	if credential.ReasonOf(err) != reason || lease.AccessKeyID != "" {
		t.Errorf("answered %v with reason %q (%v), want a refusal with %q", lease.AccessKeyID, credential.ReasonOf(err), err, reason)
	}
}
