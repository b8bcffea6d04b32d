//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/deployment"
)

func TestFirstLineFindsCredentials(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	pod := once(app("job", annotated(), "whoami"))
	// The user's own init container runs before the application, and has credentials too.
	pod.Spec.InitContainers = []corev1.Container{container("init", "whoami")}
	create(t, ns, pod)
	ended := awaitEnd(t, ns, "job")
	for _, name := range []string{"init", "app"} {
		if said := logs(t, ns, "job", name); !strings.HasPrefix(said, assumed(bucket)) {
			t.Errorf("container %s said %q", name, said)
		}
	}
	// The order in which the kubelet has started and ended them.
	sidecar, init, own := status(t, ended, sidecarName), status(t, ended, "init"), status(t, ended, "app")
	if sidecar.State.Terminated == nil || sidecar.State.Terminated.ExitCode != 0 || sidecar.RestartCount != 0 {
		t.Fatalf("the sidecar has not ended well: %s", states(ended))
	}
	begin, end := sidecar.State.Terminated.StartedAt, sidecar.State.Terminated.FinishedAt
	if init.State.Terminated.StartedAt.Before(&begin) || end.Before(&own.State.Terminated.FinishedAt) {
		t.Errorf("the sidecar ran from %v to %v, the init container from %v, the application to %v",
			begin, end, init.State.Terminated.StartedAt, own.State.Terminated.FinishedAt)
	}
}

// A pod whose sidecar is as it says, in a namespace whose LimitRange would refuse the default one, has credentials too.
func TestSidecarOfItsOwn(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	least := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("20m"), corev1.ResourceMemory: resource.MustParse("24Mi")}
	if _, err := d.Client.CoreV1().LimitRanges(ns).Create(t.Context(), &corev1.LimitRange{
		ObjectMeta: metav1.ObjectMeta{Name: "limits"}, Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{
			Type: corev1.LimitTypeContainer, Min: least, DefaultRequest: least,
			Default: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("500m"), corev1.ResourceMemory: resource.MustParse("128Mi")},
		}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	says := annotated()
	for key, value := range map[string]string{
		"sidecar-memory": "24Mi", "sidecar-cpu-request": "20m", "sidecar-cpu-limit": "0", "sidecar-port": "9790", "sidecar-log-level": "warn",
	} {
		says["iam.amazonaws.com/"+key] = value
	}
	create(t, ns, once(app("job", says, "whoami")))
	awaitEnd(t, ns, "job")
	if said := logs(t, ns, "job", "app"); !strings.HasPrefix(said, assumed(bucket)) {
		t.Errorf("the application said %q", said)
	}
	if said := logs(t, ns, "job", sidecarName); strings.Contains(said, `"level":"INFO"`) {
		t.Errorf("the sidecar said %q", said)
	}
}

// Each kind of workload runs, and its application finds credentials, where PodSecurity restricted is enforced.
func TestEveryKindOfWorkloadRuns(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	template := func(name string, args ...string) (corev1.PodTemplateSpec, *metav1.LabelSelector) {
		pod := app(name, annotated(), args...)
		return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations}, Spec: pod.Spec},
			&metav1.LabelSelector{MatchLabels: pod.Labels}
	}
	long := []string{"watch", "1h"}
	apps, batch := d.Client.AppsV1(), d.Client.BatchV1()
	lasting := map[string]func(name string) error{
		"pod": func(name string) error {
			_, err := d.Client.CoreV1().Pods(ns).Create(t.Context(), app(name, annotated(), long...), metav1.CreateOptions{})
			return err
		},
		"deployment": func(name string) error {
			pod, selector := template(name, long...)
			_, err := apps.Deployments(ns).Create(t.Context(), &appsv1.Deployment{
				ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.DeploymentSpec{Template: pod, Selector: selector},
			}, metav1.CreateOptions{})
			return err
		},
		"statefulset": func(name string) error {
			pod, selector := template(name, long...)
			_, err := apps.StatefulSets(ns).Create(t.Context(), &appsv1.StatefulSet{
				ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.StatefulSetSpec{Template: pod, Selector: selector},
			}, metav1.CreateOptions{})
			return err
		},
		"daemonset": func(name string) error {
			pod, selector := template(name, long...)
			_, err := apps.DaemonSets(ns).Create(t.Context(), &appsv1.DaemonSet{
				ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: appsv1.DaemonSetSpec{Template: pod, Selector: selector},
			}, metav1.CreateOptions{})
			return err
		},
	}
	for name, make := range lasting {
		if err := make(name); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	pod, _ := template("cronjob", "whoami")
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	if _, err := batch.CronJobs(ns).Create(t.Context(), &batchv1.CronJob{
		ObjectMeta: metav1.ObjectMeta{Name: "cronjob"},
		Spec:       batchv1.CronJobSpec{Schedule: "* * * * *", JobTemplate: batchv1.JobTemplateSpec{Spec: batchv1.JobSpec{Template: pod}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for name := range lasting {
		eventually(t, name+" runs", func(ctx context.Context) error {
			pods, err := d.Client.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=" + name})
			if err != nil {
				return err
			}
			if len(pods.Items) != 1 {
				return fmt.Errorf("it has %d pods", len(pods.Items))
			}
			if err := ready(&pods.Items[0]); err != nil {
				return err
			}
			// The application's first line is the key that it has found.
			if said := logs(t, ns, pods.Items[0].Name, "app"); said == "" {
				return errors.New("the application has not said anything")
			}
			if s := status(t, &pods.Items[0], "app"); s.RestartCount != 0 {
				return fatalError{fmt.Errorf("the application has failed: %s", states(&pods.Items[0]))}
			}
			return nil
		})
	}
	eventually(t, "the CronJob's Job completes", func(ctx context.Context) error {
		jobs, err := batch.Jobs(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, job := range jobs.Items {
			if job.Status.Succeeded > 0 {
				return nil
			}
			if job.Status.Failed > 0 {
				return fatalError{errors.New("it failed")}
			}
		}
		return errors.New("none has")
	})
}

// The sidecar serves an SDK for Go in an image of a single program, and the AWS CLI of the node's machine in the
// pod's network, which copies to a bucket and back.
func TestObjectsGoUpAndComeBack(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	create(t, ns, once(app("list", annotated(), "ls", bucket)))
	awaitEnd(t, ns, "list")
	if said := logs(t, ns, "list", "app"); !strings.Contains(said, "only-for-"+bucket) {
		t.Errorf("the application listed %q", said)
	}
}

func TestAWSCLIInThePodsNetwork(t *testing.T) {
	t.Parallel()
	aws, err := exec.LookPath("aws")
	if err != nil {
		t.Skip("the AWS CLI is not installed on this machine (on Debian: apt-get install awscli)")
	}
	if aws, err = filepath.EvalSymlinks(aws); err != nil {
		t.Fatal(err)
	}
	ns := namespace(t, unrestricted)
	script := strings.Join([]string{
		"set -e", "cd /tmp", `export HOME=/root AWS_PAGER= AWS_CONFIG_FILE=/dev/null AWS_SHARED_CREDENTIALS_FILE=/dev/null`,
		aws + " sts get-caller-identity --query Arn --output text",
		"echo up and down | " + aws + " s3 cp - s3://" + bucket + "/from-the-cli.txt",
		aws + " s3 cp s3://" + bucket + "/from-the-cli.txt -",
	}, "\n")
	// Old CLIs know another variable for the region. The webhook sets both.
	pod := once(app("cli", map[string]string{roleKey: bucket, "iam.amazonaws.com/region": deployment.Region}))
	pod.Spec.SecurityContext = nil
	pod.Spec.Volumes = []corev1.Volume{{Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}}}
	c := &pod.Spec.Containers[0]
	c.Image, c.SecurityContext = chrootImage, &corev1.SecurityContext{RunAsUser: new(int64(0))}
	c.Args = []string{"/node", "/bin/sh", "-c", script}
	c.Env = slices.DeleteFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "AWS_REGION" })
	c.Env = append(c.Env, corev1.EnvVar{Name: "PATH", Value: filepath.Dir(aws) + ":/usr/local/bin:/usr/bin:/bin"})
	c.VolumeMounts = []corev1.VolumeMount{{Name: "node", MountPath: "/node", ReadOnly: true}}
	create(t, ns, pod)
	awaitEnd(t, ns, "cli")
	said := strings.Split(strings.TrimSpace(logs(t, ns, "cli", "app")), "\n")
	if len(said) < 2 || !strings.HasPrefix(said[0], assumed(bucket)) || said[len(said)-1] != "up and down" {
		t.Errorf("the CLI said %q", said)
	}
}

// A pod whose containers all run as one user can read its own projected tokens when it is injected, as it can without.
func TestOwnProjectedTokens(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	said := map[string]string{}
	for name, annotations := range map[string]map[string]string{"plain": nil, "injected": annotated()} {
		pod := once(app(name, annotations, "read", "/var/run/mode/token", "/var/run/default/token"))
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
		create(t, ns, pod)
		ended := awaitEnd(t, ns, name)
		if has := len(ended.Spec.InitContainers) == 1; has != (annotations != nil) {
			t.Fatalf("pod %s has a sidecar: %t", name, has)
		}
		said[name] = logs(t, ns, name, "app")
	}
	if said["injected"] != said["plain"] || strings.Count(said["plain"], "-rw------- uid 1000, some text: true") != 2 {
		t.Errorf("without the sidecar:\n%s\nwith it:\n%s", said["plain"], said["injected"])
	}
}

// Pods with a DNS of their own find the broker by its full name, if their name server is the cluster's.
func TestOwnDNS(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	dns, err := d.Client.CoreV1().Services(metav1.NamespaceSystem).Get(t.Context(), "kube-dns", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	own := func(name string, config *corev1.PodDNSConfig) *corev1.Pod {
		pod := once(app(name, annotated(), "whoami"))
		pod.Spec.DNSPolicy, pod.Spec.DNSConfig = corev1.DNSNone, config
		return pod
	}
	create(t, ns, own("none", &corev1.PodDNSConfig{Nameservers: []string{dns.Spec.ClusterIP}}))
	create(t, ns, own("searches", &corev1.PodDNSConfig{Nameservers: []string{dns.Spec.ClusterIP}, Searches: []string{"cluster.local"}}))
	host := once(app("with-host-net", annotated(), "whoami"))
	host.Spec.DNSPolicy = corev1.DNSClusterFirstWithHostNet
	create(t, ns, host)
	for _, name := range []string{"none", "searches", "with-host-net"} {
		eventually(t, "the sidecar of pod "+name+" has credentials", func(context.Context) error {
			if said := logs(t, ns, name, sidecarName); !strings.Contains(said, "Received credentials") {
				return errors.New(said)
			}
			return nil
		})
	}
	node := app("default", annotated(), "whoami")
	node.Spec.DNSPolicy = corev1.DNSDefault
	if _, err := d.Client.CoreV1().Pods(ns).Create(t.Context(), node, metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "dnsPolicy Default") {
		t.Errorf("a pod with dnsPolicy Default: %v", err)
	}
}

// A copy of a pod as kubectl debug makes it, with the sidecar and without label and annotations, starts at once.
func TestCopyForDebugging(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	annotations := annotated()
	annotations[startTimeoutKey] = "1h"
	create(t, ns, app("app", annotations, "watch", "1h"))
	original := awaitReady(t, ns, "app")
	debugged := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "copy"}, Spec: *original.Spec.DeepCopy()}
	debugged.Spec.NodeName = ""
	debugged.Spec.Containers[0].Image, debugged.Spec.Containers[0].Args = pauseImage, nil
	create(t, ns, debugged)
	awaitReady(t, ns, "copy")
	if said := logs(t, ns, "copy", sidecarName); !strings.Contains(said, "POD_NOT_INJECTED") || !strings.Contains(said, "start without credentials") {
		t.Errorf("its sidecar said:\n%s", said)
	}
}
