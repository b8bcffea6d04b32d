//go:build unix

package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/process"
)

// SidecarName is the name of the injected container.
const SidecarName = "credence-sidecar"

// Sidecar is the injected container of a stored pod, run as a program.
type Sidecar struct {
	*process.Process

	stack     *Stack
	pod       *corev1.Pod
	container corev1.Container
	port      int // instead of the port in the pod
}

// RunSidecar runs the injected container of pod with the command, the environment and the volumes of its spec. It returns
// when the startup probe has passed, which waits for the first credentials.
//
// Two things differ from a kubelet, because these pods share one machine's files and loopback address: RunSidecar replaces
// a mount path by a folder, and the pod's own port by a free one, wherever they occur in a value.
func (s *Stack) RunSidecar(ctx context.Context, pod *corev1.Pod) (*Sidecar, error) {
	i := slices.IndexFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == SidecarName })
	if i < 0 {
		return nil, fmt.Errorf("pod %s/%s has no container %s", pod.Namespace, pod.Name, SidecarName)
	}
	c := &Sidecar{stack: s, pod: pod, container: pod.Spec.InitContainers[i]}
	var err error
	if c.port, err = process.FreePort(ctx); err != nil {
		return nil, err
	}
	if err := c.WriteVolumes(ctx); err != nil {
		return nil, err
	}
	env, err := c.Env(c.container)
	if err != nil {
		return nil, err
	}
	command := process.Command{Name: "sidecar-" + string(pod.UID), Env: append(env, raceEnv)}
	command.Path, command.Args = s.command(c.container.Command[0], c.container.Command[1:])
	if c.Process, err = s.run.Start(command); err != nil {
		return nil, err
	}
	if err := c.probe(ctx, c.container.StartupProbe.Exec.Command, command.Env); err != nil {
		c.Stop(stopGrace)
		return nil, fmt.Errorf("starting the sidecar of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return c, nil
}

// probe runs the startup probe's command until it succeeds or the sidecar ends.
func (c *Sidecar) probe(ctx context.Context, command, env []string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-c.Done():
			cancel(fmt.Errorf("the sidecar ended: %w", c.Err()))
		case <-ctx.Done():
		}
	}()
	path, args := c.stack.command(command[0], command[1:])
	for {
		probe := exec.CommandContext(ctx, path, args...) //nolint:gosec // Our own program.
		probe.Env = env
		output, err := probe.CombinedOutput()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			return nil
		case !bytes.Contains(output, []byte("no credentials")): // otherwise it is a report, after which a kubelet probes again
			return fmt.Errorf("probing: %w: %s", err, output)
		}
	}
}

// program is the built program that an image would have at path.
func (s *Stack) program(path string) string { return filepath.Join(s.programs, filepath.Base(path)) }

// WriteVolumes writes the projected volumes of the pod with a new token and the current ConfigMap, as a kubelet does when
// a pod starts and when a source changes.
func (c *Sidecar) WriteVolumes(ctx context.Context) error {
	for _, volume := range c.pod.Spec.Volumes {
		if volume.Projected == nil {
			continue
		}
		files := make(map[string][]byte)
		for _, source := range volume.Projected.Sources {
			if t := source.ServiceAccountToken; t != nil {
				token, err := c.stack.Token(ctx, c.pod, t.Audience, *t.ExpirationSeconds)
				if err != nil {
					return err
				}
				files[t.Path] = []byte(token)
			}
			if source.ConfigMap != nil {
				m, err := c.configMap(ctx, source.ConfigMap.Name)
				if err != nil {
					return err
				}
				for _, item := range source.ConfigMap.Items {
					files[item.Path] = []byte(m.Data[item.Key])
				}
			}
		}
		dir := c.volume(volume.Name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making a volume: %w", err)
		}
		if err := certificates(func() { certstest.WriteVolume(tb{}, dir, files) }); err != nil {
			return err
		}
	}
	return nil
}

// configMap reads a ConfigMap. It waits until the ConfigMap exists, as a kubelet does.
func (c *Sidecar) configMap(ctx context.Context, name string) (m *corev1.ConfigMap, err error) {
	if err := await.Poll(ctx, func() error {
		m, err = c.stack.Client.CoreV1().ConfigMaps(c.pod.Namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	}); err != nil {
		return nil, fmt.Errorf("reading ConfigMap %s/%s: %w", c.pod.Namespace, name, err)
	}
	return m, nil
}

func (c *Sidecar) volume(name string) string {
	return filepath.Join(c.stack.run.Dir(), "pods", string(c.pod.UID), name)
}

// Env returns the environment of one of the pod's containers.
func (c *Sidecar) Env(container corev1.Container) (env []string, err error) {
	var replace []string
	for _, mount := range c.container.VolumeMounts {
		replace = append(replace, mount.MountPath, c.volume(mount.Name))
	}
	for _, e := range c.container.Env {
		if _, port, err := net.SplitHostPort(e.Value); e.Name == "CREDENCE_LISTEN" && err == nil {
			replace = append(replace, loopback+":"+port, net.JoinHostPort(loopback, strconv.Itoa(c.port)))
		}
	}
	replacer := strings.NewReplacer(replace...)
	for _, e := range container.Env {
		value := replacer.Replace(e.Value)
		if from := e.ValueFrom; from != nil {
			if value, err = c.field(from); err != nil {
				return nil, fmt.Errorf("variable %s: %w", e.Name, err)
			}
		}
		env = append(env, e.Name+"="+value)
	}
	return env, nil
}

// field returns the value of a field of the pod, as a kubelet does.
func (c *Sidecar) field(from *corev1.EnvVarSource) (string, error) {
	if from.FieldRef == nil {
		return "", errors.New("the source is not a field")
	}
	path := from.FieldRef.FieldPath
	if label, ok := strings.CutPrefix(path, "metadata.labels['"); ok {
		return c.pod.Labels[strings.TrimSuffix(label, "']")], nil
	}
	if path != "metadata.uid" {
		return "", fmt.Errorf("the field %s is not supported here", path)
	}
	return string(c.pod.UID), nil
}

// AppEnv returns the environment of the pod's first container, as an AWS SDK in it sees it.
func (c *Sidecar) AppEnv() ([]string, error) { return c.Env(c.pod.Spec.Containers[0]) }

// TokenSeconds is the shortest lifetime that the TokenRequest API gives.
const TokenSeconds = int64(10 * time.Minute / time.Second)

// Token requests a token that is bound to pod, as a kubelet does for a projected volume.
func (s *Stack) Token(ctx context.Context, pod *corev1.Pod, audience string, seconds int64) (string, error) {
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: &seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	if audience != "" {
		request.Spec.Audiences = []string{audience}
	}
	response, err := s.Client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, pod.Spec.ServiceAccountName, request, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("requesting a token for pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return response.Status.Token, nil
}
