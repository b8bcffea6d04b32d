//go:build unix

package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

// controlPlane is the demonstration without nodes: what a node would run, it runs.
type controlPlane struct {
	*demo

	store     *minio.Server
	stack     *stack.Stack
	awsclient string // the path of the program
	sidecar   *stack.Sidecar
}

func onControlPlane(d *demo) play {
	p := &controlPlane{demo: d}
	return play{
		opening: "Kubernetes control plane without nodes: what a node would run, runs here as local processes.",
		needs:   append(tools.ControlPlane(), tools.MinIO),
		steps: []step{
			{"Start a control plane, Credence, an STS and an object store", p.start},
			{"A namespace opts in, and says which roles its pods may have", p.optIn},
			{"A pod asks for a role", p.createPod},
			{"What the webhook has added to it", func(ctx context.Context) error { return p.showInjected(ctx, app) }},
			{"The token that says which pod this is", p.showToken},
			{"The injected sidecar, run as the pod's spec says", p.runSidecar},
			{"The application: an AWS SDK that knows nothing of Credence", p.runApplication},
			{"What is refused, while somebody is looking", p.showRefusals},
			{"What the broker has written down", func(ctx context.Context) error { return p.showAudit(ctx, p.readAudit) }},
		},
		kept: func() {},
	}
}

func (p *controlPlane) start(ctx context.Context) (err error) {
	// The cluster first: what it builds, kubectl is for the most part made of.
	if p.cluster, err = cluster.Start(ctx, cluster.Config{Runs: p.runs, Progress: p}); err != nil {
		return err
	}
	if p.kubectl, err = tools.Path(ctx, tools.Kubectl, p); err != nil {
		return err
	}
	p.say("etcd, kube-apiserver and kube-controller-manager run on the loopback address. Every command is run as it is shown.")
	if _, err := p.kube(ctx, "", "version"); err != nil {
		return err
	}
	if p.store, err = minio.Start(ctx, p.cluster.Run(), p.cluster.Host(), p); err != nil {
		return err
	}
	policies, err := p.fillStore(ctx)
	if err != nil {
		return err
	}
	p.say(fmt.Sprintf("MinIO runs, with the buckets %s. Each opens to the role of its name alone.", strings.Join(buckets, " and ")))
	accessKey, secretKey := p.store.Root()
	if p.stack, err = stack.Start(ctx, stack.Config{Cluster: p.cluster, Progress: p, STS: ststest.Config{MinIO: &ststest.MinIO{
		Endpoint: p.store.Endpoint(), AccessKey: accessKey, SecretKey: credential.NewSecret(secretKey), Policies: policies,
	}}}); err != nil {
		return err
	}
	p.say("The broker and the webhook run, and an STS that speaks AWS's protocol; MinIO makes its keys.")
	_, _ = fmt.Fprintln(p, "building awsclient")
	p.awsclient = filepath.Join(p.cluster.Run().Dir(), "bin", "awsclient")
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", p.awsclient, "github.com/credence-iam/credence/integration/awsclient") //nolint:gosec // The path is ours.
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the AWS client: %w\n%s", err, out)
	}
	return nil
}

// fillStore makes the buckets with an object in each, and returns what roles may do in them.
func (p *controlPlane) fillStore(ctx context.Context) (policies map[string]string, err error) {
	accessKey, secretKey := p.store.Root()
	root := s3.New(s3.Options{
		Region: stack.Region, BaseEndpoint: aws.String(p.store.Endpoint()), UsePathStyle: true,
		Credentials: awscredentials.NewStaticCredentialsProvider(accessKey, secretKey, ""),
	})
	policies = make(map[string]string)
	for _, name := range buckets {
		if _, err := root.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &name}); err != nil {
			return nil, fmt.Errorf("making bucket %s: %w", name, err)
		}
		key, body := "only-for-"+name+".txt", strings.NewReader("hello "+name+"\n")
		if _, err := root.PutObject(ctx, &s3.PutObjectInput{Bucket: &name, Key: &key, Body: body}); err != nil {
			return nil, fmt.Errorf("filling bucket %s: %w", name, err)
		}
		policies[roles+name] = fmt.Sprintf(`{"Version":"2012-10-17","Statement":[`+
			`{"Effect":"Allow","Action":["s3:*"],"Resource":["arn:aws:s3:::%[1]s","arn:aws:s3:::%[1]s/*"]}]}`, name)
	}
	return policies, nil
}

// optIn lets the namespace opt in, and waits for what the broker then does.
func (p *controlPlane) optIn(ctx context.Context) error {
	if err := p.demo.optIn(ctx); err != nil {
		return err
	}
	if err := p.stack.AwaitTrust(ctx, namespace); err != nil {
		return err
	}
	p.say("The broker has published its certificate authority there, as ConfigMap credence-trust.")
	return nil
}

func (p *controlPlane) createPod(ctx context.Context) error {
	annotation, err := p.annotation()
	if err != nil {
		return err
	}
	manifest := `apiVersion: v1
kind: Pod
metadata:
  name: ` + app + `
  annotations:
    ` + annotation + `
spec:
  containers:
  - name: app
    image: ` + image + `
    args: [s3, ls, "s3://` + p.bucket() + `"]
`
	out, err := p.kube(ctx, manifest, "apply", "-n", namespace, "-f", "-")
	if err != nil && strings.Contains(out, "denied the request: credence:") {
		return refusal()
	}
	return err
}

func (p *controlPlane) showToken(ctx context.Context) error {
	p.say("A kubelet requests such a token for the volume, and renews it. Requested by hand:")
	projection, _ := p.projected()
	token, err := p.quietKube(ctx, "", "create", "token", p.pod.Spec.ServiceAccountName, "-n", namespace, "--audience="+projection.Audience,
		fmt.Sprintf("--duration=%ds", *projection.ExpirationSeconds),
		"--bound-object-kind=Pod", "--bound-object-name="+p.pod.Name, "--bound-object-uid="+string(p.pod.UID))
	if err != nil {
		return err
	}
	var claims struct {
		Audience   []string `json:"aud"`
		Issuer     string   `json:"iss"`
		Subject    string   `json:"sub"`
		Expires    int64    `json:"exp"`
		Kubernetes struct {
			Pod struct{ Name, UID string } `json:"pod"`
		} `json:"kubernetes.io"`
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return errors.New("kubectl create token has not answered a JSON Web Token")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return fmt.Errorf("decoding the token's claims: %w", err)
	}
	expires := time.Unix(claims.Expires, 0)
	p.say("It is a secret, and not shown. Its claims, which the API server has signed:")
	p.output("iss  " + claims.Issuer)
	p.output("aud  " + strings.Join(claims.Audience, ", "))
	p.output("sub  " + claims.Subject)
	p.output(fmt.Sprintf("pod  %s, uid %s", claims.Kubernetes.Pod.Name, claims.Kubernetes.Pod.UID))
	p.output(fmt.Sprintf("exp  %s, in %v", expires.UTC().Format(time.RFC3339), time.Until(expires).Round(time.Second)))
	return nil
}

func (p *controlPlane) runSidecar(ctx context.Context) (err error) {
	began := time.Now()
	if p.sidecar, err = p.stack.RunSidecar(ctx, p.pod); err != nil {
		return err
	}
	p.say(fmt.Sprintf("%s runs as process %d, with the command, env and volumes of the pod. Only its port and the place of "+
		"its files differ, since pods here share one machine. After %d ms its startup probe has passed: it holds credentials.",
		stack.SidecarName, p.sidecar.PID(), time.Since(began).Milliseconds()))
	return nil
}

func (p *controlPlane) runApplication(ctx context.Context) error {
	env, err := p.sidecar.AppEnv()
	if err != nil {
		return err
	}
	p.say("awsclient is a small program around the AWS SDK for Go. It runs with the container's env and no other settings, but " +
		"that AWS_REGION is set, and AWS_ENDPOINT_URL_STS and AWS_ENDPOINT_URL_S3 name the local services.")
	env = append(env, "AWS_REGION="+stack.Region, "AWS_ENDPOINT_URL_STS="+p.stack.STS.URL(), "AWS_ENDPOINT_URL_S3="+p.store.Endpoint())
	return p.showCalls(func(stdin string, args ...string) (string, error) {
		return p.command(ctx, p.awsclient, env, stdin, args...)
	})
}

func (p *controlPlane) readAudit(context.Context) (string, error) {
	log, err := os.ReadFile(p.stack.BrokerLog())
	if err != nil {
		return "", fmt.Errorf("reading the broker's log: %w", err)
	}
	return string(log), nil
}
