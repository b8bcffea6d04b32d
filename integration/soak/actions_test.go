//go:build linux

package soak

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/certmanager"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
)

// nothing waits for a time in which nothing fails.
func nothing(t *testing.T) { time.Sleep(90 * time.Second) }

// pods returns the running pods with that selector.
func pods(ctx context.Context, namespace, selector string) ([]corev1.Pod, error) {
	list, err := d.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// killTwice kills a container of all these pods twice at once.
func killTwice(namespace, selector, container string) func(*testing.T) {
	return func(t *testing.T) {
		for range 2 {
			victims, err := pods(t.Context(), namespace, selector)
			if err != nil {
				t.Fatal(err)
			}
			kill(t, container, victims...)
			time.Sleep(10 * time.Second)
		}
	}
}

// kill kills a container of these pods, as the kernel does when memory is short, and waits until all are ready again.
func kill(t *testing.T, container string, victims ...corev1.Pod) {
	t.Helper()
	if len(victims) == 0 {
		t.Fatal("there is no pod to kill")
	}
	for _, p := range victims {
		if err := syscall.Kill(processOf(t, p, container), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	awaitRestart(t, container, victims...)
}

// awaitRestart waits until a container of each pod was restarted and the pods are ready.
func awaitRestart(t *testing.T, container string, before ...corev1.Pod) {
	t.Helper()
	for _, p := range before {
		await.Until(t, "the killed container is ready again", func() error {
			now, err := d.Client.CoreV1().Pods(p.Namespace).Get(t.Context(), p.Name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if s := kubetest.Status(t, now, container); s.RestartCount <= kubetest.Status(t, &p, container).RestartCount || !s.Ready {
				return fmt.Errorf("container %s of pod %s was not restarted: %s", container, p.Name, kubetest.States(now))
			}
			return kubetest.Ready(now)
		})
	}
}

// processOf returns the number of the process of a container. Its cgroup is named after the container.
func processOf(t *testing.T, p corev1.Pod, container string) (pid int) {
	t.Helper()
	_, id, _ := strings.Cut(kubetest.Status(t, &p, container).ContainerID, "://")
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil || id == "" {
		t.Fatalf("container %s of pod %s does not run (%v)", container, p.Name, err)
	}
	for _, file := range files {
		if groups, err := os.ReadFile(file); err == nil && strings.Contains(string(groups), id) {
			if pid, err = strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
				return pid
			}
		}
	}
	t.Fatalf("container %s of pod %s has no process", container, p.Name)
	return 0
}

// memoryFiles are the files of a cgroup that has a memory limit.
type memoryFiles struct{ usage, limit string }

func (f memoryFiles) read() (string, error) {
	text, err := os.ReadFile(f.usage)
	return strings.TrimSpace(string(text)), err
}

// memoryCgroup returns the files of a process's memory cgroup, of version 1 or 2.
func memoryCgroup(t *testing.T, pid int) memoryFiles {
	t.Helper()
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	const root = "/sys/fs/cgroup"
	for line := range strings.Lines(string(groups)) {
		if _, path, ok := strings.Cut(strings.TrimSpace(line), ":memory:"); ok {
			return memoryFiles{filepath.Join(root, "memory", path, "memory.usage_in_bytes"), filepath.Join(root, "memory", path, "memory.limit_in_bytes")}
		}
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(groups)), "::")
	return memoryFiles{filepath.Join(root, path, "memory.current"), filepath.Join(root, path, "memory.max")}
}

// crashTwice kills programs of the cluster twice. Their supervisor starts them again after some time.
func crashTwice(after time.Duration, names ...string) func(*testing.T) {
	return func(t *testing.T) {
		for range 2 {
			for _, name := range names {
				if err := crash(name, after); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(20 * time.Second)
			healthy(t)
		}
	}
}

// withoutAPIServer kills the API server, does something, and starts it again.
func withoutAPIServer(t *testing.T, do func()) {
	t.Helper()
	d.Cluster.StopAPIServer()
	do()
	if err := d.Cluster.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	healthy(t)
}

// scaled does something while a Deployment has no replicas.
func scaled(t *testing.T, namespace string, names []string, do func()) {
	t.Helper()
	scale := func(replicas map[string]int32) {
		for name, count := range replicas {
			patch := fmt.Appendf(nil, `{"spec":{"replicas":%d}}`, count)
			if _, err := d.Client.AppsV1().Deployments(namespace).Patch(context.WithoutCancel(t.Context()), name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
				t.Error(err)
			}
		}
	}
	usual, none := map[string]int32{}, map[string]int32{}
	for _, name := range names {
		x, err := d.Client.AppsV1().Deployments(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		usual[name], none[name] = *x.Spec.Replicas, 0
	}
	scale(none)
	do()
	scale(usual)
	healthy(t)
}

// awaitRenewals waits until the sessions of applications are due for renewal: an outage that starts then is the worst. A
// broker renews a session when between 0.6 and 0.5 of its duration are left.
func awaitRenewals(t *testing.T) {
	t.Helper()
	for stalest := session; stalest > session*62/100; time.Sleep(5 * time.Second) {
		calls := d.STS.Calls()
		stalest = session
		for _, c := range clients[:2] {
			for _, call := range slices.Backward(calls) {
				if call.Action == "AssumeRole" && strings.HasSuffix(call.RoleARN, "role/"+c.name) && call.Status == 200 {
					stalest = min(stalest, session-time.Since(call.Time))
					break
				}
			}
		}
	}
}

// replaced does something, and waits until all brokers and webhooks serve other certificates than before.
func replaced(t *testing.T, do func()) {
	t.Helper()
	components := []string{"broker", "webhook"}
	before := map[string]bool{}
	for _, c := range components {
		serials, err := d.Served(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		maps.Copy(before, serials)
	}
	do()
	for _, c := range components {
		await.Until(t, "each "+c+" serves a new certificate", func() error {
			now, err := d.Served(t.Context(), c)
			for serial := range now {
				if before[serial] {
					err = errors.Join(err, errors.New("one serves the old certificate"))
				}
			}
			return err
		})
	}
}

// renew makes cert-manager renew the certificates of brokers and webhooks.
func renew(t *testing.T) {
	t.Helper()
	for _, component := range []string{"broker", "webhook"} {
		if err := d.RenewCertificate(t.Context(), component); err != nil {
			t.Fatal(err)
		}
	}
}

// deleteSecrets deletes Secrets of our namespace, and waits until cert-manager has made them again with other keys.
func deleteSecrets(t *testing.T, names ...string) {
	t.Helper()
	secrets := d.Client.CoreV1().Secrets(deployment.Namespace)
	for _, name := range names {
		old, err := secrets.Get(t.Context(), name, metav1.GetOptions{})
		if err == nil {
			err = secrets.Delete(t.Context(), name, metav1.DeleteOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		await.Until(t, "Secret "+name+" exists again", func() error {
			now, err := secrets.Get(t.Context(), name, metav1.GetOptions{})
			if err == nil && (len(now.Data["tls.key"]) == 0 || string(now.Data["tls.key"]) == string(old.Data["tls.key"])) {
				err = errors.New("it has the old key, or none")
			}
			return err
		})
	}
}

// onNode runs a program on a node.
func onNode(t *testing.T, name, path string, args ...string) {
	t.Helper()
	if _, err := node(name).Output(context.WithoutCancel(t.Context()), nil, path, args...); err != nil {
		t.Fatal(err)
	}
}

// network cuts a node's network, or heals it. The packets vanish.
func network(t *testing.T, name string, cut bool) {
	t.Helper()
	action := map[bool]string{true: "-I", false: "-D"}[cut]
	for _, rule := range [][]string{{"INPUT", "-i"}, {"OUTPUT", "-o"}, {"FORWARD", "-i"}, {"FORWARD", "-o"}} {
		onNode(t, name, "iptables", "-w", action, rule[0], rule[1], "eth0", "-j", "DROP")
	}
}

// kubectl runs kubectl.
func kubectl(t *testing.T, args ...string) {
	t.Helper()
	if out, err := d.Run(t.Context(), "", d.Kubectl, args...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

var certManager = []string{"cert-manager", "cert-manager-cainjector", "cert-manager-webhook"}

const certManagerNamespace = certmanager.Namespace
