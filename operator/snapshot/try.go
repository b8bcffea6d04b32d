package snapshot

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"

	"github.com/credence-iam/credence/broker/clip"
	"github.com/credence-iam/credence/operator/installation"
	"github.com/credence-iam/credence/sidecar/contract"
)

const (
	// tryTimeout bounds a try: the kubelet starts a container, which then tries for 30 s.
	tryTimeout = time.Minute
	tryPause   = 500 * time.Millisecond
)

// Trial is the result of [Snapshot.Try].
type Trial struct {
	// Line is what the container said last.
	Line string
	// Succeeded: it got credentials.
	Succeeded bool
}

// Try requests credentials as an SDK does, from inside the pod: it adds an ephemeral container to the pod, which runs the
// sidecar's program with the argument "check", and waits for its end. Kubernetes cannot remove that container from the pod. It
// needs the right to update pods/ephemeralcontainers.
func (s *Snapshot) Try(ctx context.Context, client *installation.Client) error {
	sidecar := s.Sidecar()
	if s.Pod == nil || sidecar == nil {
		return errors.New("the pod has no sidecar to try")
	}
	var env []corev1.EnvVar
	for _, c := range s.Pod.Spec.Containers {
		if env == nil {
			env = variables(c)
		}
	}
	if env == nil {
		return errors.New("no container of the pod has the variables of the sidecar")
	}
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	pods, name := client.Kube.CoreV1().Pods(s.Pod.Namespace), "credence-try-"+rand.String(5)
	pod := s.Pod.DeepCopy()
	pod.Spec.EphemeralContainers = append(pod.Spec.EphemeralContainers, corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
		Name: name, Image: sidecar.Image, ImagePullPolicy: sidecar.ImagePullPolicy, Command: []string{contract.Binary, contract.CheckArgument},
		Env: env, SecurityContext: sidecar.SecurityContext,
	}})
	if _, err := pods.UpdateEphemeralContainers(ctx, pod.Name, pod, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("adding an ephemeral container to the pod: %w", err)
	}
	for {
		now, err := pods.Get(ctx, pod.Name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("waiting for container %s: %w", name, err)
		}
		for _, c := range now.Status.EphemeralContainerStatuses {
			if c.Name == name && c.State.Terminated != nil {
				text, err := pods.GetLogs(pod.Name, &corev1.PodLogOptions{Container: name, LimitBytes: new(int64(4096))}).DoRaw(ctx)
				if err != nil {
					return fmt.Errorf("reading the log of container %s: %w", name, err)
				}
				lines := strings.Split(strings.TrimSpace(string(text)), "\n")
				s.Trial = &Trial{Line: clip.Bytes(lines[len(lines)-1], 500), Succeeded: c.State.Terminated.ExitCode == 0}
				return nil
			}
		}
		pause := time.NewTimer(tryPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return fmt.Errorf("container %s has not ended within %s", name, tryTimeout)
		}
	}
}

// variables returns the variables of a container that lead to the sidecar; nil if it has none.
func variables(c corev1.Container) (env []corev1.EnvVar) {
	for _, v := range c.Env {
		if v.Name == "AWS_CONTAINER_CREDENTIALS_FULL_URI" || v.Name == "AWS_CONTAINER_AUTHORIZATION_TOKEN" {
			env = append(env, v)
		}
	}
	return env
}
