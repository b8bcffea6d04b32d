//go:build unix

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awscredentials "github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/integration/cluster"
	"github.com/credence-iam/credence/integration/minio"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/integration/tools"
)

const (
	namespace = "shop"
	podName   = "app"
	// roles has the ARN of every role, and wants its name.
	roles = "arn:aws:iam::" + stack.Account + ":role/"
	// image is what the pod would run if there were a node.
	image = "amazon/aws-cli"
)

// buckets are what there is to open. The role of a bucket's name may do everything in it; other roles
// may do nothing.
var buckets = []string{"reports", "other"}

// errNot says that what should be is not, where no program has said more.
var errNot = errors.New("it is not so")

// errRefused says that the pod was refused because of the role that the user wants to see, which is no
// failure of ours.
var errRefused = errors.New("the pod is refused")

// bucket is the one of the pod's role, which may be written as a name or as an ARN.
func (d *demo) bucket() string { return path.Base(d.role) }

// foreign is a bucket that the pod's role must not open.
func (d *demo) foreign() string {
	return buckets[slices.IndexFunc(buckets, func(b string) bool { return b != d.bucket() })]
}

func (d *demo) start(ctx context.Context) (err error) {
	// The cluster first: what it builds, kubectl is for the most part made of.
	if d.cluster, err = cluster.Start(ctx, cluster.Config{Runs: d.runs, Progress: d}); err != nil {
		return err
	}
	if d.kubectl, err = tools.Path(ctx, tools.Kubectl, d); err != nil {
		return err
	}
	d.say("etcd, kube-apiserver and kube-controller-manager run on the loopback address. Every command is run as it is shown.")
	if _, err := d.kube(ctx, "", "version"); err != nil {
		return err
	}
	if d.store, err = minio.Start(ctx, d.cluster.Run(), d); err != nil {
		return err
	}
	policies, err := d.fillStore(ctx)
	if err != nil {
		return err
	}
	d.say(fmt.Sprintf("MinIO runs, with the buckets %s. Each opens to the role of its name alone.", strings.Join(buckets, " and ")))
	accessKey, secretKey := d.store.Root()
	if d.stack, err = stack.Start(ctx, stack.Config{Cluster: d.cluster, Progress: d, STS: ststest.Config{MinIO: &ststest.MinIO{
		Endpoint: d.store.Endpoint(), AccessKey: accessKey, SecretKey: credential.NewSecret(secretKey), Policies: policies,
	}}}); err != nil {
		return err
	}
	d.say("The broker and the webhook run, and an STS that speaks AWS's protocol; MinIO makes its keys.")
	_, _ = fmt.Fprintln(d, "building awsclient")
	d.awsclient = filepath.Join(d.cluster.Run().Dir(), "bin", "awsclient")
	build := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-o", d.awsclient, "github.com/credence-iam/credence/integration/awsclient") //nolint:gosec // The path is ours.
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the AWS client: %w\n%s", err, out)
	}
	return nil
}

// fillStore makes the buckets with an object in each, and returns what roles may do in them.
func (d *demo) fillStore(ctx context.Context) (policies map[string]string, err error) {
	accessKey, secretKey := d.store.Root()
	root := s3.New(s3.Options{
		Region: stack.Region, BaseEndpoint: aws.String(d.store.Endpoint()), UsePathStyle: true,
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

// command shows a command and runs it, in an environment that has nothing of the user's own. It
// returns what the command has written.
func (d *demo) command(ctx context.Context, program string, env []string, stdin string, args ...string) (string, error) {
	d.typed(stdin, append([]string{filepath.Base(program)}, args...)...)
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // kubectl, or our own program.
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + d.cluster.Run().Dir()}, env...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w", filepath.Base(program), args[0], err)
	}
	return string(out), err
}

// kube runs kubectl and shows what it answers.
func (d *demo) kube(ctx context.Context, stdin string, args ...string) (string, error) {
	out, err := d.quietKube(ctx, stdin, args...)
	d.output(out)
	return out, err
}

func (d *demo) quietKube(ctx context.Context, stdin string, args ...string) (string, error) {
	return d.command(ctx, d.kubectl, []string{"KUBECONFIG=" + d.cluster.Kubeconfig()}, stdin, args...)
}

func (d *demo) optIn(ctx context.Context) error {
	permitted := roles + "(" + strings.Join(buckets, "|") + ")"
	for _, args := range [][]string{
		{"create", "namespace", namespace},
		{"label", "namespace", namespace, "iam.amazonaws.com/inject=enabled"},
		{"annotate", "namespace", namespace, "iam.amazonaws.com/permitted=" + permitted},
	} {
		if _, err := d.kube(ctx, "", args...); err != nil {
			return err
		}
	}
	if err := d.stack.PublishTrust(ctx, namespace); err != nil {
		return err
	}
	d.say("The broker's certificate authority is published there, as ConfigMap credence-trust.")
	return nil
}

func (d *demo) createPod(ctx context.Context) error {
	role, err := yaml.Marshal(d.role) // quoted if YAML asks for it
	if err != nil {
		return fmt.Errorf("writing the role %q: %w", d.role, err)
	}
	manifest := `apiVersion: v1
kind: Pod
metadata:
  name: ` + podName + `
  annotations:
    iam.amazonaws.com/role: ` + strings.TrimSpace(string(role)) + `
spec:
  containers:
  - name: app
    image: ` + image + `
    args: [s3, ls, "s3://` + d.bucket() + `"]
`
	out, err := d.kube(ctx, manifest, "apply", "-n", namespace, "-f", "-")
	if err != nil && strings.Contains(out, "denied the request: credence:") {
		return fmt.Errorf("%w, so there is nothing more to show: try DEMO_ROLE=%s", errRefused, strings.Join(buckets, " or DEMO_ROLE="))
	}
	return err
}

func (d *demo) showInjected(ctx context.Context) error {
	out, err := d.quietKube(ctx, "", "get", "pod", podName, "-n", namespace, "-o", "json")
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	d.pod = new(corev1.Pod)
	if err := json.Unmarshal([]byte(out), d.pod); err != nil {
		return fmt.Errorf("decoding the pod: %w", err)
	}
	at := slices.IndexFunc(d.pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == stack.SidecarName })
	if at < 0 || d.pod.Spec.InitContainers[at].StartupProbe == nil || d.pod.Spec.InitContainers[at].RestartPolicy == nil {
		return errors.New("the stored pod has no sidecar")
	}
	sidecar := d.pod.Spec.InitContainers[at]
	d.say("Of its answer, what the webhook has added:")
	d.output(fmt.Sprintf("spec.initContainers[%d]: %s", at, sidecar.Name))
	d.output(fmt.Sprintf("  command        %s, restartPolicy %s", strings.Join(sidecar.Command, " "), *sidecar.RestartPolicy))
	d.output(fmt.Sprintf("  startupProbe   exec %s", strings.Join(sidecar.StartupProbe.Exec.Command, " ")))
	d.showEnv(sidecar)
	for _, mount := range sidecar.VolumeMounts {
		d.output(fmt.Sprintf("  volumeMounts   %s at %s", mount.Name, mount.MountPath))
	}
	app := d.pod.Spec.Containers[0]
	d.output("spec.containers[0]: " + app.Name)
	d.showEnv(app)
	d.output("spec.volumes: " + sidecar.VolumeMounts[0].Name)
	token, roots := d.projected()
	if token == nil || roots == nil {
		return errors.New("the stored pod has no token and roots for its sidecar")
	}
	d.output(fmt.Sprintf("  token          audience %s, valid for %s", token.Audience, time.Duration(*token.ExpirationSeconds)*time.Second))
	d.output(fmt.Sprintf("  %-14s from ConfigMap %s", roots.Items[0].Path, roots.Name))
	return nil
}

func (d *demo) showEnv(c corev1.Container) {
	for i, e := range c.Env {
		value := e.Value
		if e.ValueFrom != nil && e.ValueFrom.FieldRef != nil {
			value = "(the pod's " + e.ValueFrom.FieldRef.FieldPath + ")"
		}
		d.output(fmt.Sprintf("  %-14s %s=%s", []string{"env", ""}[min(i, 1)], e.Name, value))
	}
}

// projected is what the volumes that the webhook adds hold: a token and roots.
func (d *demo) projected() (token *corev1.ServiceAccountTokenProjection, roots *corev1.ConfigMapProjection) {
	for _, volume := range d.pod.Spec.Volumes {
		if volume.Projected == nil || !strings.HasPrefix(volume.Name, "credence-") {
			continue
		}
		for _, source := range volume.Projected.Sources {
			if source.ServiceAccountToken != nil {
				token = source.ServiceAccountToken
			}
			if source.ConfigMap != nil {
				roots = source.ConfigMap
			}
		}
	}
	return token, roots
}

func (d *demo) showToken(ctx context.Context) error {
	d.say("A kubelet requests such a token for the volume, and renews it. Requested by hand:")
	projection, _ := d.projected()
	token, err := d.quietKube(ctx, "", "create", "token", d.pod.Spec.ServiceAccountName, "-n", namespace, "--audience="+projection.Audience,
		fmt.Sprintf("--duration=%ds", *projection.ExpirationSeconds),
		"--bound-object-kind=Pod", "--bound-object-name="+d.pod.Name, "--bound-object-uid="+string(d.pod.UID))
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
	d.say("It is a secret, and not shown. Its claims, which the API server has signed:")
	d.output("iss  " + claims.Issuer)
	d.output("aud  " + strings.Join(claims.Audience, ", "))
	d.output("sub  " + claims.Subject)
	d.output(fmt.Sprintf("pod  %s, uid %s", claims.Kubernetes.Pod.Name, claims.Kubernetes.Pod.UID))
	d.output(fmt.Sprintf("exp  %s, in %v", expires.UTC().Format(time.RFC3339), time.Until(expires).Round(time.Second)))
	return nil
}

func (d *demo) runSidecar(ctx context.Context) (err error) {
	began := time.Now()
	if d.sidecar, err = d.stack.RunSidecar(ctx, d.pod); err != nil {
		return err
	}
	d.say(fmt.Sprintf("%s runs as process %d, with the command, env and volumes of the pod. Only its port and the place of "+
		"its files differ, since pods here share one machine. After %d ms its startup probe has passed: it holds credentials.",
		stack.SidecarName, d.sidecar.PID(), time.Since(began).Milliseconds()))
	return nil
}

func (d *demo) runApplication(ctx context.Context) error {
	env, err := d.sidecar.AppEnv()
	if err != nil {
		return err
	}
	d.say("awsclient is a small program around the AWS SDK for Go. It runs with the container's env and no other settings, but " +
		"that AWS_REGION is set, and AWS_ENDPOINT_URL_STS and AWS_ENDPOINT_URL_S3 name the local services.")
	env = append(env, "AWS_REGION="+stack.Region, "AWS_ENDPOINT_URL_STS="+d.stack.STS.URL(), "AWS_ENDPOINT_URL_S3="+d.store.Endpoint())
	own, object := d.bucket(), "from-the-pod.txt"
	for _, c := range []struct {
		args  []string
		stdin string
		want  string // is somewhere in the output
	}{
		{args: []string{"whoami"}, want: ":assumed-role/" + own + "/"},
		{args: []string{"put", own, object}, stdin: "written with the credentials of role " + own + "\n"},
		{args: []string{"ls", own}, want: object},
		{args: []string{"get", own, object}, want: "credentials of role " + own},
	} {
		out, err := d.command(ctx, d.awsclient, env, c.stdin, c.args...)
		d.output(out)
		if err != nil || !strings.Contains(out, c.want) {
			return fmt.Errorf("awsclient %s should answer %q: %w", c.args[0], c.want, cmp.Or(err, errNot))
		}
	}
	d.say("The bucket of another role stays closed:")
	out, err := d.command(ctx, d.awsclient, env, "", "ls", d.foreign())
	d.output(out)
	if err == nil || !strings.Contains(out, "AccessDenied") {
		return fmt.Errorf("bucket %s should be closed to role %s: %w", d.foreign(), own, cmp.Or(err, errNot))
	}
	return nil
}

func (d *demo) showRefusals(ctx context.Context) error {
	for _, pod := range []struct{ why, annotation, answer string }{
		{"A role that the namespace does not permit:", "role=admin", "does not permit role"},
		{"A misspelt annotation, which would otherwise mean a pod without credentials:", "roel=" + d.role, "did you mean"},
	} {
		d.say(pod.why)
		out, err := d.kube(ctx, "", "run", "greedy", "-n", namespace, "--image="+image, "--annotations=iam.amazonaws.com/"+pod.annotation)
		if err == nil || !strings.Contains(out, pod.answer) {
			return fmt.Errorf("the pod with %s should be refused with %q: %w", pod.annotation, pod.answer, cmp.Or(err, errNot))
		}
	}
	return nil
}

// auditTimeout is how long a line may take to reach the broker's log, which it does at once.
const auditTimeout = 10 * time.Second

func (d *demo) showAudit(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, auditTimeout, errors.New("the broker has written no audit line of the pod"))
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		log, err := os.ReadFile(d.stack.BrokerLog())
		if err != nil {
			return fmt.Errorf("reading the broker's log: %w", err)
		}
		for lines := bufio.NewScanner(bytes.NewReader(log)); lines.Scan(); {
			var entry struct {
				Decision string `json:"decision"`
				PodUID   string `json:"pod_uid"`
			}
			if json.Unmarshal(lines.Bytes(), &entry) == nil && entry.Decision == "allow" && entry.PodUID == string(d.pod.UID) {
				d.say("One line for each decision. The access key's id is what AWS CloudTrail knows the session by:")
				d.output(lines.Text())
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}
