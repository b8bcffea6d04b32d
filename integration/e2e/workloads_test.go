//go:build linux

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// apply creates an object with kubectl.
func apply(t *testing.T, namespace string, object any) {
	t.Helper()
	text, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Run(t.Context(), string(text), d.Kubectl, "apply", "--namespace="+namespace, "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

// TestFirstLineFindsCredentials shows that credentials are there when the first container of a pod starts, and until the
// last one ends.
func TestFirstLineFindsCredentials(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	pod := deployment.Once(d.App("job", annotated(), "whoami"))
	// The user's init container runs before the application and has credentials too.
	pod.Spec.InitContainers = []corev1.Container{d.Container("init", "whoami")}
	kubetest.Create(t, d.Client, ns, pod)
	ended := kubetest.AwaitEnd(t, d.Client, ns, "job")
	for _, name := range []string{"init", "app"} {
		if output := kubetest.Logs(t, d.Client, ns, "job", name); !strings.HasPrefix(output, assumed(bucket)) {
			t.Errorf("container %s output %q", name, output)
		}
	}
	// The kubelet starts the sidecar first and stops it last.
	sidecar, init, own := kubetest.Status(t, ended, stack.SidecarName), kubetest.Status(t, ended, "init"), kubetest.Status(t, ended, "app")
	if sidecar.State.Terminated == nil || sidecar.State.Terminated.ExitCode != 0 || sidecar.RestartCount != 0 {
		t.Fatalf("the sidecar has failed: %s", kubetest.States(ended))
	}
	begin, end := sidecar.State.Terminated.StartedAt, sidecar.State.Terminated.FinishedAt
	if init.State.Terminated.StartedAt.Before(&begin) || end.Before(&own.State.Terminated.FinishedAt) {
		t.Errorf("the sidecar ran from %v to %v, the init container from %v, the application to %v",
			begin, end, init.State.Terminated.StartedAt, own.State.Terminated.FinishedAt)
	}
}

// TestSidecarOfItsOwn shows that a pod gets credentials if its annotations configure its sidecar, in a namespace whose
// LimitRange refuses the default sidecar.
func TestSidecarOfItsOwn(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	least := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("20m"), corev1.ResourceMemory: resource.MustParse("24Mi")}
	if _, err := d.Client.CoreV1().LimitRanges(ns).Create(t.Context(), &corev1.LimitRange{
		ObjectMeta: metav1.ObjectMeta{Name: "limits"}, Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{
			Type: corev1.LimitTypeContainer, Min: least, DefaultRequest: least,
			Default: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("500m"), corev1.ResourceMemory: resource.MustParse("128Mi")},
		}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	annotations := annotated()
	for key, value := range map[string]string{
		"sidecar-memory": "24Mi", "sidecar-cpu-request": "20m", "sidecar-cpu-limit": "0", "sidecar-port": "9790", "sidecar-log-level": "warn",
	} {
		annotations["iam.amazonaws.com/"+key] = value
	}
	kubetest.Create(t, d.Client, ns, deployment.Once(d.App("job", annotations, "whoami")))
	kubetest.AwaitEnd(t, d.Client, ns, "job")
	if output := kubetest.Logs(t, d.Client, ns, "job", "app"); !strings.HasPrefix(output, assumed(bucket)) {
		t.Errorf("the application output %q", output)
	}
	if output := kubetest.Logs(t, d.Client, ns, "job", stack.SidecarName); strings.Contains(output, `"level":"INFO"`) {
		t.Errorf("the sidecar output %q", output)
	}
}

// TestEveryKindOfWorkloadRuns shows that the application of each kind of workload finds credentials, in a namespace that
// enforces PodSecurity "restricted".
func TestEveryKindOfWorkloadRuns(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	lasting := []string{"Pod", "Deployment", "StatefulSet", "DaemonSet"}
	for _, kind := range lasting {
		name := strings.ToLower(kind)
		pod := d.App(name, annotated(), "watch", "1h")
		manifest := map[string]any{"apiVersion": "apps/v1", "kind": kind, "metadata": map[string]any{"name": name}, "spec": map[string]any{
			"selector": map[string]any{"matchLabels": pod.Labels},
			"template": map[string]any{"metadata": map[string]any{"labels": pod.Labels, "annotations": pod.Annotations}, "spec": pod.Spec},
		}}
		if kind == "Pod" {
			manifest["apiVersion"], manifest["metadata"], manifest["spec"] = "v1", pod.ObjectMeta, pod.Spec
		}
		apply(t, ns, manifest)
	}
	job := deployment.Once(d.App("cronjob", annotated(), "whoami"))
	apply(t, ns, map[string]any{"apiVersion": "batch/v1", "kind": "CronJob", "metadata": map[string]any{"name": "cronjob"}, "spec": map[string]any{
		"schedule":    "* * * * *",
		"jobTemplate": map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{"annotations": job.Annotations}, "spec": job.Spec}}},
	}})
	for _, kind := range lasting {
		name := strings.ToLower(kind)
		await.Until(t, name+" runs", func() error {
			pods, err := d.Client.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + name})
			if err != nil {
				return err
			}
			if len(pods.Items) != 1 {
				return fmt.Errorf("it has %d pods", len(pods.Items))
			}
			if err := kubetest.Ready(&pods.Items[0]); err != nil {
				return err
			}
			// The application's first line is its access key.
			if output := kubetest.Logs(t, d.Client, ns, pods.Items[0].Name, "app"); output == "" {
				return errors.New("the application has no output")
			}
			if s := kubetest.Status(t, &pods.Items[0], "app"); s.RestartCount != 0 {
				return await.Never{Err: fmt.Errorf("the application has failed: %s", kubetest.States(&pods.Items[0]))}
			}
			return nil
		})
	}
	await.Until(t, "the CronJob's Job completes", func() error {
		jobs, err := d.Client.BatchV1().Jobs(ns).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, job := range jobs.Items {
			if job.Status.Succeeded > 0 {
				return nil
			}
			if job.Status.Failed > 0 {
				return await.Never{Err: errors.New("it failed")}
			}
		}
		return errors.New("none has completed")
	})
}

// TestAWSCLIInThePodsNetwork runs the AWS CLI of the node's machine in a pod. It copies an object to a bucket and back.
func TestAWSCLIInThePodsNetwork(t *testing.T) {
	t.Parallel()
	aws, err := exec.LookPath("aws")
	if err != nil {
		t.Skip("the AWS CLI is not installed on this machine (on Debian: apt-get install awscli)")
	}
	if aws, err = filepath.EvalSymlinks(aws); err != nil {
		t.Fatal(err)
	}
	ns := d.Namespace(t, unrestricted)
	script := strings.Join([]string{
		"set -e", "cd /tmp", `export HOME=/root AWS_PAGER= AWS_CONFIG_FILE=/dev/null AWS_SHARED_CREDENTIALS_FILE=/dev/null`,
		aws + " sts get-caller-identity --query Arn --output text",
		"echo up and down | " + aws + " s3 cp - s3://" + bucket + "/from-the-cli.txt",
		aws + " s3 cp s3://" + bucket + "/from-the-cli.txt -",
	}, "\n")
	// Old CLIs read another variable for the region. The webhook sets both.
	pod := deployment.Once(d.App("cli", map[string]string{roleKey: bucket, "iam.amazonaws.com/region": stack.Region}))
	pod.Spec.SecurityContext = nil
	pod.Spec.Volumes = []corev1.Volume{{Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}}}
	c := &pod.Spec.Containers[0]
	c.Image, c.SecurityContext = chrootImage, &corev1.SecurityContext{RunAsUser: new(int64(0))}
	c.Args = []string{"/node", "/bin/sh", "-c", script}
	c.Env = slices.DeleteFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "AWS_REGION" })
	c.Env = append(c.Env, corev1.EnvVar{Name: "PATH", Value: filepath.Dir(aws) + ":/usr/local/bin:/usr/bin:/bin"})
	c.VolumeMounts = []corev1.VolumeMount{{Name: "node", MountPath: "/node", ReadOnly: true}}
	kubetest.Create(t, d.Client, ns, pod)
	kubetest.AwaitEnd(t, d.Client, ns, "cli")
	output := strings.Split(strings.TrimSpace(kubetest.Logs(t, d.Client, ns, "cli", "app")), "\n")
	if len(output) < 2 || !strings.HasPrefix(output[0], assumed(bucket)) || output[len(output)-1] != "up and down" {
		t.Errorf("the CLI output %q", output)
	}
}

// TestOwnProjectedTokens shows that a pod whose containers run as one user can read its own projected tokens with the
// sidecar as without it.
func TestOwnProjectedTokens(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	outputs := map[string]string{}
	for name, annotations := range map[string]map[string]string{"plain": nil, "injected": annotated()} {
		pod := deployment.Once(d.App(name, annotations, "read", "/var/run/mode/token", "/var/run/default/token"))
		pod.Spec.Containers[0].Image = plainImage
		for volume, mode := range map[string]*int32{"mode": new(int32(0o400)), "default": nil} {
			pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: volume, VolumeSource: corev1.VolumeSource{
				Projected: &corev1.ProjectedVolumeSource{DefaultMode: mode, Sources: []corev1.VolumeProjection{
					{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "vault", Path: "token"}},
				}},
			}})
			pod.Spec.Containers[0].VolumeMounts = append(pod.Spec.Containers[0].VolumeMounts,
				corev1.VolumeMount{Name: volume, MountPath: "/var/run/" + volume, ReadOnly: true})
		}
		kubetest.Create(t, d.Client, ns, pod)
		ended := kubetest.AwaitEnd(t, d.Client, ns, name)
		if has := len(ended.Spec.InitContainers) == 1; has != (annotations != nil) {
			t.Fatalf("pod %s has a sidecar: %t", name, has)
		}
		outputs[name] = kubetest.Logs(t, d.Client, ns, name, "app")
	}
	if outputs["injected"] != outputs["plain"] || strings.Count(outputs["plain"], "-rw------- uid 1000, some text: true") != 2 {
		t.Errorf("without the sidecar:\n%s\nwith it:\n%s", outputs["plain"], outputs["injected"])
	}
}

// TestOwnDNS shows that pods with their own DNS configuration find the broker by its full name, if they use the cluster's
// name server.
func TestOwnDNS(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	dns, err := d.Client.CoreV1().Services(metav1.NamespaceSystem).Get(t.Context(), "kube-dns", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	own := func(name string, config *corev1.PodDNSConfig) *corev1.Pod {
		pod := deployment.Once(d.App(name, annotated(), "whoami"))
		pod.Spec.DNSPolicy, pod.Spec.DNSConfig = corev1.DNSNone, config
		return pod
	}
	kubetest.Create(t, d.Client, ns, own("none", &corev1.PodDNSConfig{Nameservers: []string{dns.Spec.ClusterIP}}))
	kubetest.Create(t, d.Client, ns, own("searches", &corev1.PodDNSConfig{Nameservers: []string{dns.Spec.ClusterIP}, Searches: []string{"cluster.local"}}))
	host := deployment.Once(d.App("with-host-net", annotated(), "whoami"))
	host.Spec.DNSPolicy = corev1.DNSClusterFirstWithHostNet
	kubetest.Create(t, d.Client, ns, host)
	for _, name := range []string{"none", "searches", "with-host-net"} {
		await.Until(t, "the sidecar of pod "+name+" has credentials", func() error {
			if output := kubetest.Logs(t, d.Client, ns, name, stack.SidecarName); !strings.Contains(output, messageReceived) {
				return errors.New(output)
			}
			return nil
		})
	}
	node := d.App("default", annotated(), "whoami")
	node.Spec.DNSPolicy = corev1.DNSDefault
	if _, err := d.Client.CoreV1().Pods(ns).Create(t.Context(), node, metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "dnsPolicy Default") {
		t.Errorf("a pod with dnsPolicy Default: %v", err)
	}
}

// TestCopyForDebugging shows that a copy by kubectl debug, which has the sidecar but neither label nor annotations, starts
// immediately.
func TestCopyForDebugging(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	annotations := annotated()
	annotations[startTimeoutKey] = "1h"
	kubetest.Create(t, d.Client, ns, d.App("app", annotations, "watch", "1h"))
	original := kubetest.AwaitReady(t, d.Client, ns, "app")
	debugged := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "copy"}, Spec: *original.Spec.DeepCopy()}
	debugged.Spec.NodeName = ""
	debugged.Spec.Containers[0].Image, debugged.Spec.Containers[0].Args = pauseImage, nil
	kubetest.Create(t, d.Client, ns, debugged)
	kubetest.AwaitReady(t, d.Client, ns, "copy")
	if output := kubetest.Logs(t, d.Client, ns, "copy", stack.SidecarName); !strings.Contains(output, "POD_NOT_INJECTED") || !strings.Contains(output, messageNotInjected) {
		t.Errorf("its sidecar output:\n%s", output)
	}
}

// TestRefusalIsVisible shows that "kubectl describe" prints the refusal of a controller's pods.
func TestRefusalIsVisible(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t, func(_, annotations map[string]string) {
		annotations[permittedKey] = "arn:aws:iam::123456789012:role/" + bucket
	})
	manifest := fmt.Sprintf(`apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: greedy, namespace: %s}
spec:
  selector: {matchLabels: {app: greedy}}
  template:
    metadata: {labels: {app: greedy}, annotations: {%s: admin}}
    spec: {containers: [{name: app, image: app}]}
`, ns, roleKey)
	if _, err := d.Run(t.Context(), manifest, d.Kubectl, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "kubectl describe prints it", func() error {
		out, err := d.Run(t.Context(), "", d.Kubectl, "describe", "replicaset", "greedy", "-n", ns)
		if err == nil && !strings.Contains(out, "does not permit role") {
			err = fmt.Errorf("it prints:\n%s", out)
		}
		return err
	})
}
