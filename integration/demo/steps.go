//go:build unix

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/stack"
)

const (
	namespace = "shop"
	app       = "app" // the name of the application: a pod, or a Deployment
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

// command shows a command and runs it, in an environment that has nothing of the user's own. It
// returns what the command has written.
func (d *demo) command(ctx context.Context, program string, env []string, stdin string, args ...string) (string, error) {
	d.typed(stdin, append([]string{filepath.Base(program)}, args...)...)
	cmd := d.cluster.Command(ctx, program, args...)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := d.cluster.Host().Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w", filepath.Base(program), args[0], err)
	}
	return out.String(), err
}

// kube runs kubectl and shows what it answers.
func (d *demo) kube(ctx context.Context, stdin string, args ...string) (string, error) {
	out, err := d.quietKube(ctx, stdin, args...)
	d.output(out)
	return out, err
}

func (d *demo) quietKube(ctx context.Context, stdin string, args ...string) (string, error) {
	return d.command(ctx, d.kubectl, nil, stdin, args...)
}

// showInjected shows what was added to the pod that kubectl gets by these arguments.
func (d *demo) showInjected(ctx context.Context, pods ...string) error {
	out, err := d.quietKube(ctx, "", append([]string{"get", "pods", "-n", namespace, "-o", "json"}, pods...)...)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	// One pod by its name, or a list.
	var answer struct {
		corev1.Pod

		Items []corev1.Pod `json:"items"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return fmt.Errorf("decoding the pod: %w", err)
	}
	d.pod = &answer.Pod
	if len(answer.Items) > 0 {
		d.pod = &answer.Items[0]
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

// optIn makes the namespace.
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
	return nil
}

// annotation is the line of a manifest that asks for the role.
func (d *demo) annotation() (string, error) {
	role, err := yaml.Marshal(d.role) // quoted if YAML asks for it
	if err != nil {
		return "", fmt.Errorf("writing the role %q: %w", d.role, err)
	}
	return "iam.amazonaws.com/role: " + strings.TrimSpace(string(role)), nil
}

// refusal is the end of a demonstration of a role that the namespace does not permit.
func refusal() error {
	return fmt.Errorf("%w, so there is nothing more to show: try DEMO_ROLE=%s", errRefused, strings.Join(buckets, " or DEMO_ROLE="))
}

// showRefusals shows how pods are refused that are made by hand.
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

// showCalls lets the application say who it is, write to its own bucket and read from it, and try the bucket of
// another role. run runs awsclient.
func (d *demo) showCalls(run func(stdin string, args ...string) (string, error)) error {
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
		out, err := run(c.stdin, c.args...)
		d.output(out)
		if err != nil || !strings.Contains(out, c.want) {
			return fmt.Errorf("awsclient %s should answer %q: %w", c.args[0], c.want, cmp.Or(err, errNot))
		}
	}
	d.say("The bucket of another role stays closed:")
	out, err := run("", "ls", d.foreign())
	d.output(out)
	if err == nil || !strings.Contains(out, "AccessDenied") {
		return fmt.Errorf("bucket %s should be closed to role %s: %w", d.foreign(), own, cmp.Or(err, errNot))
	}
	return nil
}

// auditTimeout is how long a line may take to reach the broker's log, which it does at once.
const auditTimeout = 10 * time.Second

// showAudit shows the line that a broker has written of the pod. read returns what brokers have written.
func (d *demo) showAudit(ctx context.Context, read func(context.Context) (string, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, auditTimeout, errors.New("the broker has written no audit line of the pod"))
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		log, err := read(ctx)
		if err != nil {
			return err
		}
		for line := range strings.Lines(log) {
			var entry struct {
				Decision string `json:"decision"`
				PodUID   string `json:"pod_uid"`
			}
			if json.Unmarshal([]byte(line), &entry) == nil && entry.Decision == "allow" && entry.PodUID == string(d.pod.UID) {
				d.say("One line for each decision. The access key's id is what AWS CloudTrail knows the session by:")
				d.output(line)
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
