//go:build linux

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// sidecarProcess returns the folder in /proc of a pod's sidecar. The kubelet names the cgroups of containers by the UID of
// their pod.
func sidecarProcess(t *testing.T, pod *corev1.Pod) (folder string) {
	t.Helper()
	await.Until(t, "the sidecar's process exists", func() error {
		lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return err
		}
		for _, line := range lines {
			command, err := os.ReadFile(line)
			if err != nil || string(command) != "/credence-sidecar\x00" {
				continue // another program, or a process that has ended
			}
			folder = filepath.Dir(line)
			groups, err := os.ReadFile(filepath.Join(folder, "cgroup"))
			if err == nil && strings.Contains(string(groups), "pod"+string(pod.UID)) {
				return nil
			}
		}
		return errors.New("no process is in a cgroup of that pod")
	})
	return folder
}

// kill kills a process as the kernel does when memory is short.
func kill(t *testing.T, folder string) {
	t.Helper()
	pid, err := strconv.Atoi(filepath.Base(folder))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// sidecarUser is the user of all containers in pods of function app, the sidecar included.
const sidecarUser = 1000

// writable reports whether the sidecar's user can write to the file at path.
func writable(path string, entry fs.DirEntry) (bool, error) {
	info, err := entry.Info()
	if err != nil {
		return false, err
	}
	var system syscall.Statfs_t
	if err := syscall.Statfs(path, &system); err != nil {
		return false, err
	}
	const readOnly = 1 // ST_RDONLY of statfs(2)
	owner, mode := info.Sys().(*syscall.Stat_t), info.Mode().Perm()
	may := mode&0o002 != 0 || owner.Uid == sidecarUser && mode&0o200 != 0 || owner.Gid == sidecarUser && mode&0o020 != 0
	return may && system.Flags&readOnly == 0, nil
}

// TestSidecarHasNoRightsOrStorage shows that the sidecar has no token of the Kubernetes API, no file that it can write to,
// and no volume except its own.
func TestSidecarHasNoRightsOrStorage(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	kubetest.Create(t, d.Client, ns, d.App("app", annotated(), "watch", "1h"))
	pod := kubetest.AwaitReady(t, d.Client, ns, "app")
	for _, volume := range pod.Spec.Volumes {
		if volume.EmptyDir != nil {
			t.Errorf("volume %s is an emptyDir, which keeps the autoscaler from removing the node", volume.Name)
		}
	}
	sidecar := sidecarProcess(t, pod)
	root := filepath.Join(sidecar, "root")
	seen := false
	if err := filepath.WalkDir(root+"/", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		inside := strings.TrimPrefix(path, root)
		switch {
		case inside == "/dev" || inside == "/proc" || inside == "/sys":
			return fs.SkipDir // the container runtime mounts these in all containers
		case entry.Type() == fs.ModeSymlink:
			return nil
		}
		seen = seen || inside == "/credence-sidecar"
		may, err := writable(path, entry)
		if may {
			t.Errorf("the sidecar can write to %s", inside)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if !seen {
		t.Error("the sidecar's program was not found: the test looks in the wrong place")
	}
	files, err := os.ReadDir(filepath.Join(root, "var/run/secrets/kubernetes.io/serviceaccount"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, file := range files {
		if !strings.HasPrefix(file.Name(), "..") { // the kubelet's own files, to which the others link
			names = append(names, file.Name())
		}
	}
	if !slices.Equal(names, []string{"roots.pem", "token"}) {
		t.Errorf("the folder of the API token has %v", names)
	}
	for _, m := range kubetest.Container(t, pod, stack.SidecarName).VolumeMounts {
		if strings.HasPrefix(m.Name, "kube-api-access") {
			t.Errorf("the sidecar mounts the API token from volume %s", m.Name)
		}
	}
	status, err := os.ReadFile(filepath.Join(sidecar, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{fmt.Sprintf("Uid:\t%d", sidecarUser), "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the sidecar's process lacks %q:\n%s", want, status)
		}
	}
}

// TestKilledSidecarComesBack shows that a killed sidecar requests its session again, and that no other container of its pod
// is restarted.
func TestKilledSidecarComesBack(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	kubetest.Create(t, d.Client, ns, paused("app", annotated()))
	kill(t, sidecarProcess(t, kubetest.AwaitReady(t, d.Client, ns, "app")))
	await.Until(t, "the new sidecar has credentials", func() error {
		pod, err := get(t.Context(), ns, "app")
		if err != nil {
			return err
		}
		if s := kubetest.Status(t, pod, "app"); s.RestartCount != 0 {
			return await.Never{Err: errors.New("the application was restarted: " + kubetest.States(pod))}
		}
		if s := kubetest.Status(t, pod, stack.SidecarName); s.RestartCount != 1 {
			return errors.New("the sidecar was not restarted: " + kubetest.States(pod))
		}
		if output := kubetest.Logs(t, d.Client, ns, "app", stack.SidecarName); !strings.Contains(output, messageReceived) {
			return fmt.Errorf("it logged:\n%s", output)
		}
		return kubetest.Ready(pod)
	})
}

// TestManyClientsAreServedInTheSidecarsMemory shows that the sidecar serves any number of concurrent requests within its
// memory limit.
func TestManyClientsAreServedInTheSidecarsMemory(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		memory, atOnce, times, all string
	}{
		"default": {atOnce: "10000", times: "1", all: "10000"},
		"minimum": {memory: "12Mi", atOnce: "16", times: "200", all: "3200"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := d.Namespace(t)
			annotations, want := annotated(), "16Mi"
			if tc.memory != "" {
				annotations["iam.amazonaws.com/sidecar-memory"], want = tc.memory, tc.memory
			}
			pod := deployment.Once(d.App("app", annotations, "crowd", tc.atOnce, tc.times))
			pod.Spec.Containers[0].Image = plainImage
			stored := kubetest.Create(t, d.Client, ns, pod)
			limit := kubetest.Container(t, stored, stack.SidecarName).Resources.Limits[corev1.ResourceMemory]
			if limit.String() != want {
				t.Errorf("the sidecar's memory is limited to %s, want %s", limit.String(), want)
			}
			ended := kubetest.AwaitEnd(t, d.Client, ns, "app")
			if output := strings.TrimSpace(kubetest.Logs(t, d.Client, ns, "app", "app")); output != tc.all {
				t.Errorf("%q requests were served, want %s", output, tc.all)
			}
			if s := kubetest.Status(t, ended, stack.SidecarName); s.RestartCount != 0 || s.State.Terminated == nil || s.State.Terminated.ExitCode != 0 {
				t.Errorf("with a limit of %s the sidecar has failed: %s", limit.String(), kubetest.States(ended))
			}
		})
	}
}

// TestTerminatingPodIsRenewed shows that a pod which terminates slowly has credentials until its end.
func TestTerminatingPodIsRenewed(t *testing.T) {
	t.Parallel()
	ns := d.Namespace(t)
	pod := d.App("app", map[string]string{roleKey: bucket, durationKey: "15m"}, "watch", "1h")
	pod.Spec.TerminationGracePeriodSeconds = new(int64(3600))
	// The kubelet sends SIGTERM to the application after this hook.
	pod.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 3500}}}
	kubetest.Create(t, d.Client, ns, pod)
	kubetest.AwaitReady(t, d.Client, ns, "app")
	await.Until(t, "the application has seen a session", func() error {
		if output := kubetest.Logs(t, d.Client, ns, "app", "app"); len(strings.Fields(output)) != 1 { // its access key only
			return fmt.Errorf("it printed %q", output)
		}
		return nil
	})
	pods := d.Client.CoreV1().Pods(ns)
	if err := pods.Delete(t.Context(), "app", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pods.Delete(context.WithoutCancel(t.Context()), "app", metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}); err != nil {
			t.Error(err)
		}
	})
	before := keys(t, ns, "app")
	await.Until(t, "the application has seen another session", func() error {
		pod, err := get(t.Context(), ns, "app")
		if err != nil {
			return await.Never{Err: err}
		}
		if s := kubetest.Status(t, pod, "app"); s.State.Running == nil || s.RestartCount != 0 || pod.DeletionTimestamp == nil {
			return await.Never{Err: errors.New("the application does not run while its pod terminates: " + kubetest.States(pod))}
		}
		if now := keys(t, ns, "app"); now <= before {
			return fmt.Errorf("it has seen %d access keys, before the deletion %d", now, before)
		}
		return nil
	})
}
