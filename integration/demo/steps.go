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
	app       = "app" // the name of the application: a pod or a Deployment
)

// buckets are the buckets in the object store, and the roles that the namespace permits.
var buckets = []string{"reports", "other"}

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

// command shows a command and runs it, without the user's own environment. It returns the output.
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

// quietKube runs kubectl and does not show its output.
func (d *demo) quietKube(ctx context.Context, stdin string, args ...string) (string, error) {
	return d.command(ctx, d.kubectl, nil, stdin, args...)
}

// kube runs kubectl and shows its output.
func (d *demo) kube(ctx context.Context, stdin string, args ...string) (string, error) {
	out, err := d.quietKube(ctx, stdin, args...)
	d.output(out)
	return out, err
}

// every calls do each interval until it returns true or an error, or ctx ends.
func every(ctx context.Context, interval time.Duration, do func() (bool, error)) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if done, err := do(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

// optIn makes the namespace.
func (d *demo) optIn(ctx context.Context) error {
	for _, args := range [][]string{
		{"create", "namespace", namespace},
		{"label", "namespace", namespace, "iam.amazonaws.com/inject=enabled"},
		{"annotate", "namespace", namespace, "iam.amazonaws.com/permitted=" + stack.RoleARN("("+strings.Join(buckets, "|")+")")},
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

// showInjected gets a pod and shows what the webhook added to it.
func (d *demo) showInjected(ctx context.Context, pods ...string) error {
	out, err := d.quietKube(ctx, "", append([]string{"get", "pods", "-n", namespace, "-o", "json"}, pods...)...)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	var response struct { // one pod, or a list
		corev1.Pod

		Items []corev1.Pod `json:"items"`
	}
	if err := json.Unmarshal([]byte(out), &response); err != nil {
		return fmt.Errorf("decoding the pod: %w", err)
	}
	d.pod = &append(response.Items, response.Pod)[0]
	at := slices.IndexFunc(d.pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == stack.SidecarName })
	token, roots := d.projected()
	if at < 0 || token == nil || roots == nil {
		return errors.New("the stored pod lacks the sidecar, or its token and roots")
	}
	sidecar := d.pod.Spec.InitContainers[at]
	d.say("The webhook added:")
	d.output(fmt.Sprintf("spec.initContainers[%d]: %s", at, sidecar.Name))
	d.output(fmt.Sprintf("  command        %s, restartPolicy %s", strings.Join(sidecar.Command, " "), *sidecar.RestartPolicy))
	d.output("  startupProbe   exec " + strings.Join(sidecar.StartupProbe.Exec.Command, " "))
	d.showEnv(sidecar)
	for _, mount := range sidecar.VolumeMounts {
		d.output(fmt.Sprintf("  volumeMounts   %s at %s", mount.Name, mount.MountPath))
	}
	d.output("spec.containers[0]: " + d.pod.Spec.Containers[0].Name)
	d.showEnv(d.pod.Spec.Containers[0])
	d.output("spec.volumes: " + sidecar.VolumeMounts[0].Name)
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

// projected returns the token and the roots in the volumes that the webhook added.
func (d *demo) projected() (token *corev1.ServiceAccountTokenProjection, roots *corev1.ConfigMapProjection) {
	for _, volume := range d.pod.Spec.Volumes {
		if volume.Projected == nil || !strings.HasPrefix(volume.Name, "credence-") {
			continue
		}
		for _, source := range volume.Projected.Sources {
			token, roots = cmp.Or(source.ServiceAccountToken, token), cmp.Or(source.ConfigMap, roots)
		}
	}
	return token, roots
}

// showRefusals shows how Credence refuses pods that a user makes.
func (d *demo) showRefusals(ctx context.Context) error {
	for _, pod := range []struct{ why, annotation, message string }{
		{"A role that the namespace does not permit:", "role=admin", "does not permit role"},
		{"A misspelled annotation, which would otherwise mean a pod without credentials:", "roel=" + d.role, "did you mean"},
	} {
		d.say(pod.why)
		out, err := d.kube(ctx, "", "run", "greedy", "-n", namespace, "--image=amazon/aws-cli", "--annotations=iam.amazonaws.com/"+pod.annotation)
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
	ctx, cancel := context.WithTimeoutCause(ctx, auditTimeout, errors.New("the broker has not written an audit line for the pod"))
	defer cancel()
	return every(ctx, 50*time.Millisecond, func() (bool, error) {
		log, err := read(ctx)
		for line := range strings.Lines(log) {
			var entry struct {
				Decision string `json:"decision"`
				PodUID   string `json:"pod_uid"`
			}
			if json.Unmarshal([]byte(line), &entry) == nil && entry.Decision == "allow" && entry.PodUID == string(d.pod.UID) {
				d.say("The broker writes one line for each decision. AWS CloudTrail records the session under the access key ID:")
				d.output(line)
				return true, nil
			}
		}
		return false, err
	})
}
