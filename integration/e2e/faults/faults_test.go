//go:build linux

package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
	"github.com/credence-iam/credence/operator/explain"
	"github.com/credence-iam/credence/operator/finding"
)

var update = flag.Bool("update", false, "write the texts of users to testdata")

// fault is an entry of faults.yaml, whose comment describes it.
type fault struct {
	Name, Subject, Step, Cause, What, Fix, Rights string
	Setup                                         []string
	Keep                                          bool
	State                                         finding.State
	Who                                           finding.Person
}

// alone matches the set-ups that break more than one namespace, so that no other test may run beside them.
var alone = regexp.MustCompile(`-n (credence|cert-manager)|mutatingwebhook|clusterrole|NetworkPolicy|helm: |certificate: |network: |sts: (stop|throttle|forget)`)

// TestFaults breaks a namespace or the installation, reads the cause, carries out the remedy, and waits for credentials.
func TestFaults(t *testing.T) {
	text, err := os.ReadFile("../../../operator/explain/testdata/faults.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var all []fault
	if err := yaml.UnmarshalStrict(text, &all); err != nil {
		t.Fatal(err)
	}
	all = append(all, further...)
	for _, name := range append(slices.Collect(maps.Keys(elsewhere)), long...) {
		if !slices.ContainsFunc(all, func(f fault) bool { return f.Name == name }) {
			t.Errorf("there is no fault %q", name)
		}
	}
	var inNamespaces, ofInstallation []*broken
	for i, f := range all {
		b := &broken{fault: f, app: fmt.Sprintf("cart%02d", i)}
		switch {
		case elsewhere[f.Name] != "":
			t.Logf("SKIP %s: %s", f.Name, elsewhere[f.Name])
		case slices.Contains(long, f.Name) && os.Getenv(deployment.Variable) != "soak":
			t.Logf("SKIP %s: make soak makes it", f.Name)
		case alone.MatchString(strings.Join(f.Setup, "\n")):
			b.alone = true
			ofInstallation = append(ofInstallation, b)
		default:
			inNamespaces = append(inNamespaces, b)
		}
	}
	t.Run("namespace", func(t *testing.T) {
		for _, b := range inNamespaces {
			t.Run(b.id(), func(t *testing.T) {
				t.Parallel()
				b.test(t)
			})
		}
	})
	t.Run("installation", func(t *testing.T) {
		for _, b := range ofInstallation {
			t.Run(b.id(), func(t *testing.T) {
				t.Cleanup(func() { b.restore(t) })
				b.test(t)
			})
		}
	})
}

// TestHealthy: a healthy cluster has no finding, neither of explain nor of check.
func TestHealthy(t *testing.T) {
	b := &broken{fault: fault{Keep: true}, app: "cart98"}
	b.deploy(t)
	b.awaitHealthy()
	if out, err := run(t.Context(), "credence check --quiet --wait=3m"); err != nil { // Brokers tell how many sessions they share after two minutes.
		t.Error(err)
	} else {
		t.Logf("\n%s", out)
	}
}

// TestClock: nodes whose clock is ten minutes behind that of AWS. The clock of one node alone cannot be changed here.
func TestClock(t *testing.T) {
	b := &broken{fault: fault{Keep: true}, app: "cart99"}
	d.STS.SetClock(10 * time.Minute)
	t.Cleanup(func() { d.STS.SetClock(0) })
	b.deploy(t)
	check := func(what string, found bool) {
		t.Helper()
		await.Until(t, what, func() error {
			out, _ := run(t.Context(), "credence check --quiet")
			if strings.Contains(out, "AWS's clock is 600 s ahead") != found {
				time.Sleep(time.Second)
				return fmt.Errorf("it says:\n%s", out)
			}
			t.Logf("\n%s", out)
			return nil
		})
	}
	check("the command names the clock", true)
	d.STS.SetClock(0)
	(&broken{fault: fault{Keep: true}, app: "cart97"}).deploy(t) // Brokers see the clock when they call STS.
	check("the command accepts the clock", false)
}

// broken is a fault in a namespace of the cluster. faults.yaml calls the namespace shop, and the Deployment and its role cart.
type broken struct {
	fault
	t              *testing.T
	namespace, app string
	alone          bool
	// person does what no command in the cluster can do, such as a change in AWS.
	person func()
}

var (
	shop = regexp.MustCompile(`\bshop\b`)
	cart = regexp.MustCompile(`\bcart\b`)
)

// id names the test and the file of the fault.
func (f fault) id() string {
	return strings.NewReplacer(" ", "-", ",", "", "'", "", ":", "").Replace(strings.ToLower(f.Name))
}

// real returns a text of faults.yaml with the names that the fault has here.
func (b *broken) real(text string) string {
	return cart.ReplaceAllString(shop.ReplaceAllString(text, b.namespace), b.app)
}

// test breaks, explains and fixes.
func (b *broken) test(t *testing.T) {
	b.deploy(t)
	started := time.Now()
	for _, line := range b.Setup {
		b.prepare(b.real(line))
	}
	if !b.Keep {
		b.shell("kubectl -n " + b.namespace + " scale deployment " + b.app + " --replicas=1")
	}
	b.awaitPod()
	t.Logf("%.0f s: broken", time.Since(started).Seconds())
	x := b.awaitCause()
	t.Logf("%.0f s: explained\n%s", time.Since(started).Seconds(), b.read(x, nil))
	b.compare(x)
	if b.alone {
		out, err := run(t.Context(), "credence check --quiet")
		t.Logf("check:\n%s", out)
		if err == nil && b.Step != "network" { // It reports sidecars that have waited for a minute.
			t.Error("check finds nothing wrong")
		}
	}
	for _, command := range b.remedy(x) {
		t.Logf("$ %s", command)
		if program, _, _ := strings.Cut(command, " "); program == "aws" || program == "timedatectl" {
			if b.person == nil {
				t.Errorf("nobody runs %s", command)
			}
			continue
		}
		b.shell(fill(command))
	}
	if b.person != nil {
		b.person()
	}
	b.awaitHealthy()
	t.Logf("%.0f s: healthy", time.Since(started).Seconds())
}

// deploy creates the namespace and the Deployment. If the fault is one of a running pod, it waits until the pod has
// credentials, otherwise the Deployment has no pod yet.
func (b *broken) deploy(t *testing.T) {
	t.Helper()
	b.t = t
	b.namespace = d.Namespace(t, func(labels, annotations map[string]string) {
		delete(labels, "pod-security.kubernetes.io/enforce")
		annotations["iam.amazonaws.com/permitted"] = stack.RoleARN(b.app)
	})
	pod := d.App(b.app, map[string]string{"iam.amazonaws.com/role": b.app}, "watch", "1h")
	pod.Spec.TerminationGracePeriodSeconds = new(int64(1))
	replicas := int32(0)
	if b.Keep {
		replicas = 1
	}
	if _, err := d.Client.AppsV1().Deployments(b.namespace).Create(b.t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: b.app},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: pod.Labels}, Strategy: appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations}, Spec: pod.Spec},
		},
	}, metav1.CreateOptions{}); err != nil {
		b.t.Fatal(err)
	}
	if b.Keep {
		await.Until(b.t, "the pod has credentials", func() error { return b.credentials() })
	}
}

// shell runs a line as users do.
func (b *broken) shell(line string) string {
	b.t.Helper()
	out, err := run(b.t.Context(), line)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

// run runs a line with a shell and returns its standard output, also with an error.
func run(ctx context.Context, line string) (string, error) {
	cmd := d.Cluster.Command(ctx, "bash", "-o", "pipefail", "-c", line)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = append(cmd.Env, "KUBE_EDITOR="+editor())
	err := d.Cluster.Host().Launch(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		_, secret := d.STS.Keys()
		err = fmt.Errorf("%s: %w\n%s%s", strings.ReplaceAll(line, secret.Reveal(), "SECRET_ACCESS_KEY"), err, stdout.String(), stderr.String())
	}
	return stdout.String(), err
}

// explain runs the command.
func (b *broken) explain() (x explain.Explanation, err error) {
	subject := "deployment/" + b.app
	if b.Subject != "" {
		subject = b.Subject
	}
	out, err := run(b.t.Context(), "credence explain "+subject+" -n "+b.namespace+" -o json")
	if parsed := json.Unmarshal([]byte(out), &x); parsed != nil {
		return x, fmt.Errorf("%w: %w", parsed, err)
	}
	if _, wrong := x.Cause(); wrong != (err != nil) {
		b.t.Errorf("the exit code does not fit: %v\n%s", err, out)
	}
	return x, nil
}

// awaitPod waits until the Deployment has a pod, or the API server has refused one.
func (b *broken) awaitPod() {
	b.t.Helper()
	await.Until(b.t, "a pod is created or refused", func() error {
		pods, err := d.Client.CoreV1().Pods(b.namespace).List(b.t.Context(), metav1.ListOptions{})
		refusals, err2 := d.Client.CoreV1().Events(b.namespace).List(b.t.Context(), metav1.ListOptions{FieldSelector: "reason=FailedCreate"})
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		if len(pods.Items)+len(refusals.Items) == 0 {
			return errors.New("there is neither a pod nor an Event")
		}
		return nil
	})
}

// awaitCause runs the command until it names the cause. Before that, it may see nothing wrong, but no other cause.
func (b *broken) awaitCause() (x explain.Explanation) {
	b.t.Helper()
	if b.State == "" {
		b.State = finding.Failed
	}
	other := ""
	await.Until(b.t, "the command explain names the cause", func() (err error) {
		if x, err = b.explain(); err != nil {
			return err
		}
		cause, ok := x.Cause()
		// The session of a pod that is older than the fault is valid until it expires.
		served := cause.State == finding.Warning && strings.HasPrefix(x.Conclusion, "The pod has credentials, but: ")
		if right := cause.State == finding.Failed && b.State == finding.Failed || served && (b.Keep || b.State == finding.Warning); ok && right &&
			cause.Step == b.Step && strings.Contains(cause.Text, b.real(b.Cause)) {
			return nil
		}
		if now := cause.Step + ": " + cause.Text; cause.State == finding.Failed && now != other {
			other = now
			// A broker that has just started does not know yet what it waits for, and calls can take too long on a busy machine.
			if cause.Text != "no broker is ready" && !strings.Contains(cause.Text, "deadline exceeded") {
				b.t.Fail()
			}
			b.t.Logf("it first named another cause:\n%s", b.read(x, nil))
		}
		time.Sleep(time.Second)
		return fmt.Errorf("it says:\n%s", b.read(x, nil))
	})
	return x
}

// remedy returns the commands that end the fault.
func (b *broken) remedy(x explain.Explanation) []string {
	b.t.Helper()
	cause, _ := x.Cause()
	if cause.Remedy == nil || cause.Remedy.Who != b.Who || !strings.Contains(cause.Remedy.What, b.What) {
		b.t.Errorf("the remedy is %+v, want one for the %s: %s", cause.Remedy, b.Who, b.What)
	}
	for _, f := range append([]finding.Finding{cause}, x.Findings...) {
		if f.Step == b.Step && f.Remedy != nil && strings.Contains(strings.Join(f.Remedy.Commands, "\n"), b.real(b.Fix)) {
			return f.Remedy.Commands
		}
	}
	b.t.Errorf("no remedy has the command %s", b.real(b.Fix))
	return nil
}

// credentials returns nil if an application of the Deployment has got credentials with its AWS SDK.
func (b *broken) credentials() error {
	pods, err := d.Client.CoreV1().Pods(b.namespace).List(b.t.Context(), metav1.ListOptions{LabelSelector: "app=" + b.app})
	if err != nil {
		return err
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil && p.Labels["iam.amazonaws.com/injected"] == "true" && kubetest.Ready(&p) == nil && kubetest.Logs(b.t, d.Client, b.namespace, p.Name, "app") != "" {
			return nil
		}
	}
	return fmt.Errorf("none of %d pods has credentials", len(pods.Items))
}

// awaitHealthy waits until the command finds nothing wrong and the application has credentials.
func (b *broken) awaitHealthy() {
	b.t.Helper()
	await.Until(b.t, "the remedy has fixed the fault", func() error {
		x, err := b.explain()
		if err == nil && !x.Healthy {
			err = fmt.Errorf("it says:\n%s", b.read(x, nil))
		}
		if err == nil && b.Subject == "" {
			err = b.credentials()
		}
		if err != nil {
			time.Sleep(time.Second)
		}
		return err
	})
}

// changing are parts of a text that differ between two runs, with what users may read in their place.
var changing = []struct {
	pattern *regexp.Regexp
	text    string
}{
	{regexp.MustCompile(`\b(cart|credence-broker|credence-webhook)-[0-9a-z]{6,10}-[0-9a-z]{5}\b`), "$1-POD"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(Z| UTC)`), "TIME"},
	{regexp.MustCompile(`\b\d+ (s|min|h|d)\b( \d+ min\b)?`), "AGE"},
	{regexp.MustCompile(`\b(\d+m)?\d+(\.\d+)?m?s\b`), "AGE"},
	{regexp.MustCompile(`\b\d+\.\d+\.\d+\.\d+(:\d{4,5})?\b`), "ADDRESS"},
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}`), "ID"},
	{regexp.MustCompile(`(cannot pull the sidecar's image \S+): .*?(\. What|\n)`), "$1: …$2"},
	{regexp.MustCompile(`\(request send failed, [^)]*\)`), "(request send failed, …)"},
	{regexp.MustCompile(`\(\d called, \d not\): (.*retrying: ).*?(\. What|\n)`), "(2 called, 0 not): $1…$2"},
}

// read returns what a user reads, without names and times. With keep, it has only the findings that keep accepts, and no step
// that is ok.
func (b *broken) read(x explain.Explanation, keep func(finding.Finding) bool) string {
	report := finding.Report{Subject: x.Subject}
	for _, f := range x.Findings {
		if keep == nil || keep(f) {
			report.Add(f)
		}
	}
	var out strings.Builder
	if err := report.Write(&out, finding.Style{Quiet: keep != nil}); err != nil {
		b.t.Fatal(err)
	}
	text := strings.NewReplacer(b.namespace, "shop", b.app, "cart").Replace(out.String() + "\n" + x.Conclusion + "\n")
	for _, c := range changing {
		text = c.pattern.ReplaceAllString(text, c.text)
	}
	return text
}

// compare compares what users read of the cause's step with testdata. Whether later steps have failed by now depends on the
// time.
func (b *broken) compare(x explain.Explanation) {
	b.t.Helper()
	cause, _ := x.Cause()
	text := b.read(x, func(f finding.Finding) bool {
		return f.Step == b.Step && (f.Text == cause.Text || f.State == finding.Unknown) // One cause of several.
	})
	file := filepath.Join("testdata", b.id()+".txt")
	if *update {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			b.t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		b.t.Fatal(err)
	}
	if text != string(want) {
		b.t.Errorf("users read\n%s\n%s has\n%s", text, file, want)
	}
}
