//go:build unix

package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed" // for the manifest
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/stack"
)

//go:embed pod.yaml
var podYAML string

const app = "app" // the name of the application: a pod or a Deployment

// buckets are the buckets in the object store, and the roles that the namespace permits.
var buckets = []string{"reports", "other"}

// The explanations of steps that every demo has.
const (
	optInText = `The broker publishes its root certificate in each opted-in namespace, as ConfigMap credence-trust.`
	auditText = `The broker writes one line for each decision. AWS CloudTrail records the session under the access key ID.`
)

// errUnexpected says that a command succeeded but had other output than expected.
var errUnexpected = errors.New("unexpected output")

// errRefused says that Credence refused the user's role. That is not a failure of the demo.
var errRefused = errors.New("the pod is refused")

// refusal ends the demo of a role that the namespace does not permit.
func refusal() error {
	return fmt.Errorf("%w, so the demo ends here; try DEMO_ROLE=%s", errRefused, strings.Join(buckets, " or DEMO_ROLE="))
}

// bucket is the bucket of the pod's role, which may be a name or an ARN.
func (d *demo) bucket() string { return path.Base(d.role) }

// foreign is a bucket that the pod's role does not open.
func (d *demo) foreign() string {
	return buckets[slices.IndexFunc(buckets, func(b string) bool { return b != d.bucket() })]
}

// command shows a command and runs it. It returns the output.
func (d *demo) command(ctx context.Context, program string, env []string, stdin string, args ...string) (string, error) {
	d.typed(stdin, append([]string{filepath.Base(program)}, args...)...)
	return d.launch(ctx, program, env, stdin, args...)
}

// launch runs a command without the user's own environment, or with it on the user's own cluster.
func (d *demo) launch(ctx context.Context, program string, env []string, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // The steps name the programs.
	start := cmd.Start
	if d.cluster != nil {
		cmd = d.cluster.Command(ctx, program, args...)
		start = func() error { return d.cluster.Host().Launch(cmd) }
	}
	if env != nil {
		cmd.Env = append(cmd.Environ(), env...)
	}
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := start()
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w", filepath.Base(program), args[0], err)
	}
	return out.String(), err
}

// quietKube runs kubectl and does not show its output.
func (d *demo) quietKube(ctx context.Context, stdin string, args ...string) (string, error) {
	return d.command(ctx, d.kubectl, nil, stdin, slices.Concat(args, d.kubeFlags)...)
}

// kube runs kubectl and shows its output.
func (d *demo) kube(ctx context.Context, stdin string, args ...string) (string, error) {
	out, err := d.quietKube(ctx, stdin, args...)
	d.output(out)
	return out, err
}

// optIn makes the namespace.
func (d *demo) optIn(ctx context.Context) error {
	permitted := stack.RoleARN("(" + strings.Join(buckets, "|") + ")")
	if d.cluster == nil { // the user's account
		permitted = regexp.QuoteMeta(d.role)
	}
	for _, args := range [][]string{
		{"create", "namespace", d.namespace},
		{"label", "namespace", d.namespace, d.prefix + "/inject=enabled"},
		{"annotate", "namespace", d.namespace, d.prefix + "/permitted=" + permitted},
	} {
		if _, err := d.kube(ctx, "", args...); err != nil {
			return err
		}
	}
	return nil
}

// quoteYAML adds quotes if YAML needs them.
func quoteYAML(text string) string {
	quoted, _ := yaml.Marshal(text) // cannot fail for a string
	return strings.TrimSpace(string(quoted))
}

// podManifest is a pod that requests the role.
func (d *demo) podManifest() string {
	return strings.NewReplacer("PREFIX", d.prefix, "ROLE", quoteYAML(d.role), "BUCKET", d.bucket()).Replace(podYAML)
}

// findPod gets the pod of the application. run runs kubectl.
func (d *demo) findPod(ctx context.Context, run func(ctx context.Context, program string, env []string, stdin string, args ...string) (string, error)) error {
	out, err := run(ctx, d.kubectl, nil, "", "get", "pods", "-n", d.namespace, "-l", "app="+app, "-o", "json")
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	var pods corev1.PodList
	if err := json.Unmarshal([]byte(out), &pods); err != nil {
		return fmt.Errorf("decoding the pod: %w", err)
	}
	if len(pods.Items) == 0 {
		return errors.New("the pod is not stored")
	}
	d.pod = &pods.Items[0]
	return nil
}

// showInjected gets the pod, and shows what the webhook added to it.
func (d *demo) showInjected(ctx context.Context) error {
	if err := d.findPod(ctx, d.command); err != nil {
		return err
	}
	d.say("The sidecar, the env of the application and the volume, as stored:")
	return d.showAdded(d.pod)
}

// showAdded shows what the webhook added to a pod.
func (d *demo) showAdded(pod *corev1.Pod) error {
	at := slices.IndexFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == stack.SidecarName })
	volume := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return strings.HasPrefix(v.Name, "credence-") })
	if at < 0 || volume < 0 {
		return errors.New("the pod lacks the sidecar, or its token and roots")
	}
	sidecar, application := pod.Spec.InitContainers[at], pod.Spec.Containers[0]
	// Without the fields that every container has.
	added, err := yaml.Marshal(corev1.PodSpec{
		InitContainers: []corev1.Container{{
			Name: sidecar.Name, Command: sidecar.Command, RestartPolicy: sidecar.RestartPolicy, Env: sidecar.Env, VolumeMounts: sidecar.VolumeMounts,
			StartupProbe: &corev1.Probe{ProbeHandler: sidecar.StartupProbe.ProbeHandler},
		}},
		Containers: []corev1.Container{{Name: application.Name, Env: application.Env}},
		Volumes:    []corev1.Volume{pod.Spec.Volumes[volume]},
	})
	d.output(string(added))
	return err
}

// showRefusals shows how Credence refuses pods that a user makes.
func (d *demo) showRefusals(ctx context.Context) error {
	for _, pod := range []struct{ why, annotation, message string }{
		{"A role that the namespace does not permit:", "role=" + strings.TrimSuffix(d.role, d.bucket()) + "admin", "does not permit role"},
		{"A misspelled annotation, which would otherwise mean a pod without credentials:", "roel=" + d.role, "did you mean"},
	} {
		d.say(pod.why)
		args := []string{"run", "greedy", "-n", d.namespace, "--image=amazon/aws-cli", "--annotations=" + d.prefix + "/" + pod.annotation}
		if d.cluster == nil { // the user's
			args = append(args, "--dry-run=server")
		}
		out, err := d.kube(ctx, "", args...)
		if err == nil || !strings.Contains(out, pod.message) {
			return fmt.Errorf("the pod with %s should be refused with %q: %w", pod.annotation, pod.message, cmp.Or(err, errUnexpected))
		}
	}
	return nil
}

// showCalls lets the application get its identity, use its own bucket, and try another role's bucket. run runs awsclient.
func (d *demo) showCalls(run func(stdin string, args ...string) (string, error)) error {
	own, object := d.bucket(), "from-the-pod.txt"
	for _, c := range []struct {
		args  []string
		stdin string
		want  string // in the output
	}{
		{args: []string{"whoami"}, want: ":assumed-role/" + own + "/"},
		{args: []string{"put", own, object}, stdin: "written with the credentials of role " + own + "\n"},
		{args: []string{"ls", own}, want: object},
		{args: []string{"get", own, object}, want: "credentials of role " + own},
	} {
		out, err := run(c.stdin, c.args...)
		d.output(out)
		if err != nil || !strings.Contains(out, c.want) {
			return fmt.Errorf("awsclient %s should print %q: %w", c.args[0], c.want, cmp.Or(err, errUnexpected))
		}
	}
	d.say("The bucket of another role stays closed:")
	out, err := run("", "ls", d.foreign())
	d.output(out)
	if err == nil || !strings.Contains(out, "AccessDenied") {
		return fmt.Errorf("bucket %s should be closed to role %s: %w", d.foreign(), own, cmp.Or(err, errUnexpected))
	}
	return nil
}

// auditTimeout is how long the broker's log may take to show an audit line, which the broker writes at once.
const auditTimeout = 10 * time.Second

// showAudit shows the audit line of the pod. read returns the brokers' logs.
func (d *demo) showAudit(ctx context.Context, read func(context.Context) (string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, auditTimeout)
	defer cancel()
	if d.pod == nil {
		if err := d.findPod(ctx, d.launch); err != nil {
			return err
		}
	}
	return await.Poll(ctx, func() error {
		log, err := read(ctx)
		if err != nil {
			return await.Never{Err: err}
		}
		for line := range strings.Lines(log) {
			var entry struct {
				Decision string `json:"decision"`
				PodUID   string `json:"pod_uid"`
			}
			if json.Unmarshal([]byte(line), &entry) == nil && entry.Decision == "allow" && entry.PodUID == string(d.pod.UID) {
				d.output(line)
				return nil
			}
		}
		return errors.New("the broker has not written an audit line for the pod")
	})
}
