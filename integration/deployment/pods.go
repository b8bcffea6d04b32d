//go:build linux

package deployment

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// AppEnv is the environment of an application, without what injection adds: the region, and the local services in place
// of AWS's.
func (d *Deployment) AppEnv() []corev1.EnvVar {
	return []corev1.EnvVar{
		{Name: "AWS_REGION", Value: stack.Region},
		{Name: "AWS_ENDPOINT_URL_STS", Value: d.STS.URL()},
		{Name: "AWS_ENDPOINT_URL_S3", Value: d.Store.URL()},
	}
}

// Namespace creates an opted-in namespace of the test. Unless change changes that, it permits all roles and enforces the
// strictest PodSecurity level.
func (d *Deployment) Namespace(t *testing.T, change ...func(labels, annotations map[string]string)) string {
	t.Helper()
	labels := map[string]string{"iam.amazonaws.com/inject": "enabled", "pod-security.kubernetes.io/enforce": "restricted"}
	annotations := map[string]string{"iam.amazonaws.com/permitted": ".*"}
	for _, c := range change {
		c(labels, annotations)
	}
	return kubetest.Namespace(t, d.Client, labels, annotations)
}

// App returns a pod whose container app runs awsclient with these arguments, within the strictest PodSecurity level.
func (d *Deployment) App(name string, annotations map[string]string, args ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			SecurityContext: &corev1.PodSecurityContext{
				RunAsNonRoot: new(true), RunAsUser: new(int64(1000)), SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
			TerminationGracePeriodSeconds: new(int64(5)),
			Containers:                    []corev1.Container{d.Container("app", args...)},
		},
	}
}

// Container returns a container for pods of App.
func (d *Deployment) Container(name string, args ...string) corev1.Container {
	return corev1.Container{
		Name: name, Image: AppImage, ImagePullPolicy: corev1.PullNever, Args: args, Env: d.AppEnv(),
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: new(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
	}
}

// Once sets that the pod is not restarted, and returns it.
func Once(pod *corev1.Pod) *corev1.Pod {
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	return pod
}

// AddCaller adds a container to a pod of App, and returns the pod. Its image has the program integration/e2e/caller, which
// calls the brokers many times a second, as sidecars do. With a routing key, it calls the owners first.
func (d *Deployment) AddCaller(pod *corev1.Pod, name, image, routingKey string) *corev1.Pod {
	const volume, folder = "caller", "/identity"
	c := d.Container(name)
	c.Image = image
	c.VolumeMounts = []corev1.VolumeMount{{Name: volume, MountPath: folder}}
	c.Env = []corev1.EnvVar{
		{Name: "CREDENCE_BROKER", Value: "credence-broker." + Namespace + ".svc:9443"},
		{Name: "CREDENCE_ROUTING_KEY", Value: routingKey},
		{Name: "CREDENCE_TOKEN_FILE", Value: folder + "/token"},
		{Name: "CREDENCE_ROOTS_FILE", Value: folder + "/roots.pem"},
	}
	pod.Spec.Containers = append(pod.Spec.Containers, c)
	if slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == volume }) {
		return pod
	}
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: volume, VolumeSource: corev1.VolumeSource{
		Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: stack.Audience, ExpirationSeconds: new(int64(3600)), Path: "token"}},
			{ConfigMap: &corev1.ConfigMapProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: "credence-trust"},
				Items:                []corev1.KeyToPath{{Key: "roots.pem", Path: "roots.pem"}},
			}},
		}},
	}})
	return pod
}

// CheckCallers checks that no call of these callers of these pods has failed, that they still call, and that no container
// of the pods has failed.
func (d *Deployment) CheckCallers(t *testing.T, namespace string, callers []string, pods ...string) {
	t.Helper()
	lines := func() (counts []int) {
		for _, pod := range pods {
			for _, caller := range callers {
				counts = append(counts, strings.Count(kubetest.Logs(t, d.Client, namespace, pod, caller), "calls "))
			}
		}
		return counts
	}
	before := lines()
	await.Until(t, "each caller calls again", func() error {
		now := lines()
		for i := range now {
			if now[i] <= before[i] {
				return fmt.Errorf("before they printed %d lines, now %d", before, now)
			}
		}
		return nil
	})
	for _, pod := range pods {
		for _, caller := range callers {
			if output := kubetest.Logs(t, d.Client, namespace, pod, caller); strings.Contains(output, "FAILED") {
				t.Errorf("calls of pod %s to the broker have failed:\n%s", pod, output)
			}
		}
	}
	d.CheckRunning(t, namespace, pods...)
}

// CheckRunning checks that all containers of these pods run, and that none was restarted.
func (d *Deployment) CheckRunning(t *testing.T, namespace string, pods ...string) {
	t.Helper()
	for _, name := range pods {
		pod, err := d.Client.CoreV1().Pods(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
			if s.State.Running == nil || s.RestartCount != 0 {
				t.Errorf("container %s of pod %s has failed: %s", s.Name, name, kubetest.States(pod))
			}
		}
	}
}
