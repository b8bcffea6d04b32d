//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/stack"
)

// The keys that users write, and names in injected pods.
const (
	injectLabel     = "iam.amazonaws.com/inject"
	permittedKey    = "iam.amazonaws.com/permitted"
	roleKey         = "iam.amazonaws.com/role"
	durationKey     = "iam.amazonaws.com/duration"
	startTimeoutKey = "iam.amazonaws.com/start-timeout"

	sidecarName = "credence-sidecar"

	// Messages of the sidecar's log.
	messageReceived    = "Received credentials"
	messageUnavailable = "Could not get credentials"
	messageNotInjected = "start without credentials"
)

// namespace creates a namespace named after the test and deletes it at the end. Unless change changes that, it is opted in,
// permits all roles and enforces the strictest PodSecurity level.
func namespace(t *testing.T, change ...func(*corev1.Namespace)) string {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	name = strings.TrimPrefix(name, "test")
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name:        name[:min(len(name), 63)],
		Labels:      map[string]string{injectLabel: "enabled", "pod-security.kubernetes.io/enforce": "restricted"},
		Annotations: map[string]string{permittedKey: ".*"},
	}}
	for _, c := range change {
		c(ns)
	}
	if _, err := d.Client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The nodes need the memory of its pods.
		if err := d.Client.CoreV1().Namespaces().Delete(context.WithoutCancel(t.Context()), ns.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	awaitServiceAccount(t, ns.Name)
	return ns.Name
}

// awaitServiceAccount waits for the ServiceAccount that a pod needs.
func awaitServiceAccount(t *testing.T, namespace string) {
	t.Helper()
	await.Until(t, "namespace "+namespace+" has its ServiceAccount", func() error {
		_, err := d.Client.CoreV1().ServiceAccounts(namespace).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
}

func unrestricted(ns *corev1.Namespace) { delete(ns.Labels, "pod-security.kubernetes.io/enforce") }

// app returns a pod whose application runs awsclient with these arguments, within the strictest PodSecurity level.
func app(name string, annotations map[string]string, args ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			SecurityContext: &corev1.PodSecurityContext{
				RunAsNonRoot: new(true), RunAsUser: new(int64(1000)), SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
			TerminationGracePeriodSeconds: new(int64(5)),
			Containers:                    []corev1.Container{container("app", args...)},
		},
	}
}

func container(name string, args ...string) corev1.Container {
	return corev1.Container{
		Name: name, Image: deployment.AppImage, ImagePullPolicy: corev1.PullNever, Args: args, Env: d.AppEnv(),
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: new(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
	}
}

// once sets that the pod is not restarted.
func once(pod *corev1.Pod) *corev1.Pod {
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	return pod
}

// paused returns a pod whose application does nothing.
func paused(name string, annotations map[string]string) *corev1.Pod {
	pod := app(name, annotations)
	pod.Spec.Containers[0].Image = pauseImage
	return pod
}

// annotated returns the annotation of the role that may use the bucket.
func annotated() map[string]string { return map[string]string{roleKey: bucket} }

// create creates a pod and returns it as stored.
func create(t *testing.T, namespace string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	stored, err := d.Client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// tryDry creates the pod in a dry run.
func tryDry(t *testing.T, namespace string, pod *corev1.Pod) (*corev1.Pod, error) {
	t.Helper()
	return d.Client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
}

// podsOf returns the pods of a component of Credence.
func podsOf(ctx context.Context, component string) ([]corev1.Pod, error) {
	list, err := d.Client.CoreV1().Pods(deployment.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

func get(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return d.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

// ready returns nil if the pod is ready. A failed pod never becomes ready.
func ready(pod *corev1.Pod) error {
	if pod.Status.Phase == corev1.PodFailed {
		return await.Never{Err: fmt.Errorf("pod %s has failed: %s", pod.Name, states(pod))}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return fmt.Errorf("pod %s is not ready: %s", pod.Name, states(pod))
}

func states(pod *corev1.Pod) string {
	var text strings.Builder
	fmt.Fprintf(&text, "phase %s %s", pod.Status.Phase, pod.Status.Message)
	for _, c := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		fmt.Fprintf(&text, "; %s:", c.Name)
		switch s := c.State; {
		case s.Running != nil:
			fmt.Fprintf(&text, " running")
		case s.Waiting != nil:
			fmt.Fprintf(&text, " waiting: %s %s", s.Waiting.Reason, s.Waiting.Message)
		case s.Terminated != nil:
			fmt.Fprintf(&text, " ended with %d %s %s", s.Terminated.ExitCode, s.Terminated.Reason, s.Terminated.Message)
		}
		fmt.Fprintf(&text, ", %d restarts", c.RestartCount)
	}
	return text.String()
}

// awaitReady waits until the pod is ready, and returns it.
func awaitReady(t *testing.T, namespace, name string) (pod *corev1.Pod) {
	t.Helper()
	await.Until(t, "pod "+namespace+"/"+name+" is ready", func() (err error) {
		if pod, err = get(t.Context(), namespace, name); err != nil {
			return err
		}
		return ready(pod)
	})
	return pod
}

// awaitEnd waits until the pod has succeeded, and returns it.
func awaitEnd(t *testing.T, namespace, name string) (pod *corev1.Pod) {
	t.Helper()
	await.Until(t, "pod "+namespace+"/"+name+" succeeds", func() (err error) {
		if pod, err = get(t.Context(), namespace, name); err != nil {
			return err
		}
		if pod.Status.Phase == corev1.PodFailed {
			return await.Never{Err: fmt.Errorf("it failed: %s\n%s", states(pod), logs(t, namespace, name, "app"))}
		}
		if pod.Status.Phase != corev1.PodSucceeded {
			err = errors.New(states(pod))
		}
		return err
	})
	return pod
}

// logs returns the output of a container.
func logs(t *testing.T, namespace, name, container string) string {
	t.Helper()
	text, err := d.Client.CoreV1().Pods(namespace).GetLogs(name, &corev1.PodLogOptions{Container: container}).DoRaw(t.Context())
	if err != nil {
		return "no logs: " + err.Error()
	}
	return string(text)
}

// assumed is the start of the ARN that STS gives a session of the role.
func assumed(role string) string {
	return "arn:aws:sts::" + stack.Account + ":assumed-role/" + role + "/"
}

// status returns the status of a container.
func status(t *testing.T, pod *corev1.Pod, container string) corev1.ContainerStatus {
	t.Helper()
	for _, s := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		if s.Name == container {
			return s
		}
	}
	t.Fatalf("pod %s has no status of container %s", pod.Name, container)
	return corev1.ContainerStatus{}
}

// awaitGone waits until the pod is deleted.
func awaitGone(t *testing.T, namespace, name string) {
	t.Helper()
	await.Until(t, "pod "+namespace+"/"+name+" is deleted", func() error {
		_, err := get(t.Context(), namespace, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("it exists"))
	})
}

// caller adds a container to the pod that calls the broker as the pod's sidecar does, many times a second.
func caller(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	keys, err := policy.NewKeys(policy.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	key, err := policy.Pod{Request: keys.Request(pod.Annotations)}.RoutingKey()
	if err != nil {
		t.Fatal(err)
	}
	const volume, path = "caller", "/identity"
	c := container("caller")
	c.Image = callerImage
	c.VolumeMounts = []corev1.VolumeMount{{Name: volume, MountPath: path}}
	c.Env = []corev1.EnvVar{
		{Name: "CREDENCE_BROKER", Value: "credence-broker." + deployment.Namespace + ".svc:9443"},
		{Name: "CREDENCE_ROUTING_KEY", Value: string(key)},
		{Name: "CREDENCE_TOKEN_FILE", Value: path + "/token"},
		{Name: "CREDENCE_ROOTS_FILE", Value: path + "/roots.pem"},
	}
	pod.Spec.Containers = append(pod.Spec.Containers, c)
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: volume, VolumeSource: corev1.VolumeSource{
		Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "credence-broker", ExpirationSeconds: new(int64(3600)), Path: "token"}},
			{ConfigMap: &corev1.ConfigMapProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: "credence-trust"},
				Items:                []corev1.KeyToPath{{Key: "roots.pem", Path: "roots.pem"}},
			}},
		}},
	}})
	return pod
}

// calm checks that no call of the pod's caller has failed and no container was restarted since the pod started, and that
// the caller still calls.
func calm(t *testing.T, namespace, name string) {
	t.Helper()
	before := strings.Count(logs(t, namespace, name, "caller"), "calls ")
	await.Until(t, "the caller calls again", func() error {
		if now := strings.Count(logs(t, namespace, name, "caller"), "calls "); now <= before {
			return fmt.Errorf("it printed %d lines", now)
		}
		return nil
	})
	if output := logs(t, namespace, name, "caller"); strings.Contains(output, "FAILED") {
		t.Errorf("calls to the broker have failed:\n%s", output)
	}
	pod, err := get(t.Context(), namespace, name)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"app", "caller", sidecarName} {
		if s := status(t, pod, c); s.RestartCount != 0 {
			t.Errorf("container %s has failed: %s", c, states(pod))
		}
	}
}

// scale sets the number of replicas of a component, and waits until that many pods are ready and no others exist.
func scale(t *testing.T, component string, replicas int) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context()) // cleanups call it too
	patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, replicas)
	if _, err := d.Client.AppsV1().Deployments(deployment.Namespace).Patch(ctx, "credence-"+component, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := await.Poll(ctx, func() error {
		pods, err := podsOf(ctx, component)
		good := 0
		for _, pod := range pods {
			if pod.DeletionTimestamp == nil && ready(&pod) == nil {
				good++
			}
		}
		if err == nil && (good != replicas || len(pods) != good) {
			err = fmt.Errorf("%d of %d pods are ready", good, len(pods))
		}
		return err
	}); err != nil {
		t.Fatalf("scaling the %s to %d: %v", component, replicas, err)
	}
}

// stop removes all replicas of a component until the returned function is called or the test ends.
func stop(t *testing.T, component string) (start func()) {
	t.Helper()
	const usual = 2
	start = func() { t.Helper(); scale(t, component, usual) }
	t.Cleanup(start)
	scale(t, component, 0)
	return start
}

// keys returns the number of access keys that awsclient's watch has seen.
func keys(t *testing.T, namespace, name string) int {
	t.Helper()
	return len(strings.Fields(logs(t, namespace, name, "app")))
}

// variableOf returns the value of a container's environment variable.
func variableOf(c corev1.Container, name string) string {
	for _, v := range c.Env {
		if v.Name == name {
			return v.Value
		}
	}
	return ""
}

func sidecarOf(pod *corev1.Pod) corev1.Container {
	i := slices.IndexFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == sidecarName })
	if i < 0 {
		panic(fmt.Sprintf("pod %s has no sidecar", pod.Name))
	}
	return pod.Spec.InitContainers[i]
}
