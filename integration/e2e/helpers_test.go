//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/deployment"
)

// Keys, as users write them.
const (
	injectLabel     = "iam.amazonaws.com/inject"
	permittedKey    = "iam.amazonaws.com/permitted"
	roleKey         = "iam.amazonaws.com/role"
	durationKey     = "iam.amazonaws.com/duration"
	startTimeoutKey = "iam.amazonaws.com/start-timeout"

	sidecarName = "credence-sidecar"
)

// patience bounds every wait. It only keeps a failed test from hanging: on a loaded machine a pod may take a
// minute to start.
const patience = 6 * time.Minute

// eventually polls until check is content.
func eventually(t *testing.T, what string, check func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return
		}
		if fatal, ok := errors.AsType[fatalError](err); ok {
			t.Fatalf("%s: %v", what, fatal.error)
		}
		if sleep(ctx) != nil {
			t.Fatalf("still not so: %s: %v", what, err)
		}
	}
}

// sleep waits a little between two looks at something, and returns an error once ctx has ended.
func sleep(ctx context.Context) error {
	timer := time.NewTimer(100 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// fatalError ends a wait that cannot succeed any more.
type fatalError struct{ error }

// namespace makes a namespace named after the test; opted in, with all roles permitted, and enforcing the
// strictest PodSecurity level, unless change says otherwise.
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
		// t.Context has ended here. The pods' memory is wanted back.
		if err := d.Client.CoreV1().Namespaces().Delete(context.Background(), ns.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	awaitServiceAccount(t, ns.Name)
	return ns.Name
}

// awaitServiceAccount waits for the ServiceAccount without which no pod can be made.
func awaitServiceAccount(t *testing.T, namespace string) {
	t.Helper()
	eventually(t, "namespace "+namespace+" has its ServiceAccount", func(ctx context.Context) error {
		_, err := d.Client.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

func unrestricted(ns *corev1.Namespace) { delete(ns.Labels, "pod-security.kubernetes.io/enforce") }

// app is a pod whose application runs awsclient with these arguments, as restricted as Kubernetes can ask for.
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

// once makes a pod one that ends.
func once(pod *corev1.Pod) *corev1.Pod {
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	return pod
}

// annotated asks for the role that may use the bucket.
func annotated() map[string]string { return map[string]string{roleKey: bucket} }

// create makes a pod and returns it as stored.
func create(t *testing.T, namespace string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	stored, err := d.Client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

func get(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return d.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

// ready says what a pod lacks to be ready. A pod that has failed never will be.
func ready(pod *corev1.Pod) error {
	if pod.Status.Phase == corev1.PodFailed {
		return fatalError{fmt.Errorf("pod %s has failed: %s", pod.Name, states(pod))}
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

// awaitReady returns the pod once it is ready.
func awaitReady(t *testing.T, namespace, name string) (pod *corev1.Pod) {
	t.Helper()
	eventually(t, "pod "+namespace+"/"+name+" is ready", func(ctx context.Context) (err error) {
		if pod, err = get(ctx, namespace, name); err != nil {
			return err
		}
		return ready(pod)
	})
	return pod
}

// awaitEnd returns the pod once it has succeeded.
func awaitEnd(t *testing.T, namespace, name string) (pod *corev1.Pod) {
	t.Helper()
	eventually(t, "pod "+namespace+"/"+name+" succeeds", func(ctx context.Context) (err error) {
		if pod, err = get(ctx, namespace, name); err != nil {
			return err
		}
		if pod.Status.Phase == corev1.PodFailed {
			return fatalError{fmt.Errorf("it failed: %s\n%s", states(pod), logs(t, namespace, name, "app"))}
		}
		if pod.Status.Phase != corev1.PodSucceeded {
			err = errors.New(states(pod))
		}
		return err
	})
	return pod
}

// logs returns what a container has written.
func logs(t *testing.T, namespace, name, container string) string {
	t.Helper()
	text, err := d.Client.CoreV1().Pods(namespace).GetLogs(name, &corev1.PodLogOptions{Container: container}).DoRaw(t.Context())
	if err != nil {
		return "no logs: " + err.Error()
	}
	return string(text)
}

// assumed is how STS knows a session of the role.
func assumed(role string) string {
	return "arn:aws:sts::" + deployment.Account + ":assumed-role/" + role + "/"
}

// status returns a container's status.
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

// awaitGone returns when the pod is gone.
func awaitGone(t *testing.T, namespace, name string) {
	t.Helper()
	eventually(t, "pod "+namespace+"/"+name+" is gone", func(ctx context.Context) error {
		_, err := get(ctx, namespace, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("it is there"))
	})
}
