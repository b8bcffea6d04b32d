//go:build linux

package helm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// TestUpgradeAndRollback installs the previous version, fails to upgrade it, upgrades it, rolls back, upgrades again and
// uninstalls. Meanwhile, the API server admits each pod with its sidecar, and no call of a running pod fails, whatever the
// version of its sidecar.
func TestUpgradeAndRollback(t *testing.T) {
	this := d.Credence
	var err error
	if d.Credence, err = previousArguments(); err != nil {
		t.Fatal(err)
	}
	if err := d.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.Credence = this
	ns := kubetest.Namespace(t, d.Client, map[string]string{"iam.amazonaws.com/inject": "enabled"}, map[string]string{"iam.amazonaws.com/permitted": ".*"})
	w := &watched{t: t, namespace: ns}
	w.add("installed", previousTag)
	f := startFlood(t, ns)

	// Brokers that cannot reach STS do not become ready, so the update of brokers stops. That of webhooks does not.
	if _, err := d.Run(t.Context(), "", d.Helm, append(this, "--set=aws.stsEndpoint=http://127.0.0.1:1", "--timeout=5s")...); err == nil {
		t.Fatal("an upgrade with a wrong address of STS succeeded")
	}
	await.Until(t, "the failed upgrade has replaced the webhooks", func() error { return all("webhook", thisTag) })
	if err := all("broker", previousTag); err == nil {
		t.Error("the failed upgrade has started no new broker, so it shows nothing")
	}
	w.add("failed", thisTag)
	w.check("failed upgrade")

	for n, step := range []struct {
		name, tag string
		do        func() error
	}{
		{"upgrade", thisTag, func() error { return d.Upgrade(t.Context()) }},
		{"rollback", previousTag, func() error {
			_, err := d.Run(t.Context(), "", d.Helm, "rollback", "credence", "1", "--namespace="+deployment.Namespace, "--wait", "--timeout=3m")
			return err
		}},
		{"second upgrade", thisTag, func() error { return d.Upgrade(t.Context()) }},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		for _, component := range []string{"broker", "webhook"} {
			await.Until(t, "old pods of the "+component+" have ended", func() error { return all(component, step.tag) })
		}
		w.add(fmt.Sprintf("step-%d", n), step.tag)
		w.check(step.name)
	}
	f.end()
	await.Until(t, "the first sidecar has renewed its session", func() error {
		if keys := strings.Fields(w.log("installed", "app")); len(keys) < 2 {
			return fmt.Errorf("its application has used %d access keys", len(keys))
		}
		return nil
	})

	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.unharmed("uninstallation")
	await.Until(t, "annotated pods are admitted without a sidecar", func() error { // the API server watches policies
		admitted, err := kubetest.Dry(t, d.Client, ns, app("after"))
		if err == nil && len(admitted.Spec.InitContainers) > 0 {
			err = await.Never{Err: errors.New("a pod has a sidecar")}
		}
		return err
	})
}

// app returns an annotated pod whose application uses credentials all the time. A caller of each tag calls the brokers all
// the time, with the client of the sidecar of that version.
func app(name string, callers ...string) *corev1.Pod {
	const volume, path = "caller", "/identity"
	pod := stack.Pod(name, map[string]string{"iam.amazonaws.com/role": "cart", "iam.amazonaws.com/duration": "15m"})
	pod.Spec.TerminationGracePeriodSeconds = new(int64(1))
	c := &pod.Spec.Containers[0]
	c.Image, c.Args, c.Env = deployment.AppImage, []string{"watch", "1h"}, d.AppEnv()
	for _, tag := range callers {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
			Name: "caller-" + tag, Image: callerImage + ":" + tag, VolumeMounts: []corev1.VolumeMount{{Name: volume, MountPath: path}},
			Env: []corev1.EnvVar{
				{Name: "CREDENCE_BROKER", Value: "credence-broker." + deployment.Namespace + ".svc:9443"},
				{Name: "CREDENCE_TOKEN_FILE", Value: path + "/token"}, {Name: "CREDENCE_ROOTS_FILE", Value: path + "/roots.pem"},
			},
		})
		pod.Spec.Volumes = []corev1.Volume{{Name: volume, VolumeSource: corev1.VolumeSource{
			Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
				{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: stack.Audience, ExpirationSeconds: new(int64(3600)), Path: "token"}},
				{ConfigMap: &corev1.ConfigMapProjection{
					LocalObjectReference: corev1.LocalObjectReference{Name: "credence-trust"},
					Items:                []corev1.KeyToPath{{Key: "roots.pem", Path: "roots.pem"}},
				}},
			}},
		}}}
	}
	return pod
}

// watched are running pods in which nothing may fail.
type watched struct {
	t         *testing.T
	namespace string
	names     []string
}

// add creates a pod, and waits until its application uses credentials. Its sidecar must have the tag.
func (w *watched) add(name, tag string) {
	w.t.Helper()
	pod := kubetest.Create(w.t, d.Client, w.namespace, app(name, previousTag, thisTag))
	if got := pod.Spec.InitContainers[0].Image; got != "localhost/credence-sidecar:"+tag {
		w.t.Errorf("pod %s has a sidecar with image %s, want tag %s", name, got, tag)
	}
	w.names = append(w.names, name)
	await.Until(w.t, "pod "+name+" uses credentials", func() error {
		for _, container := range []string{"app", "caller-" + previousTag, "caller-" + thisTag} {
			if w.log(name, container) == "" {
				return fmt.Errorf("container %s has no output", container)
			}
		}
		return nil
	})
}

func (w *watched) log(name, container string) string {
	text, err := d.Client.CoreV1().Pods(w.namespace).GetLogs(name, &corev1.PodLogOptions{Container: container}).DoRaw(w.t.Context())
	if err != nil {
		return ""
	}
	return string(text)
}

// unharmed checks that no container was restarted.
func (w *watched) unharmed(after string) {
	w.t.Helper()
	for _, name := range w.names {
		pod, err := d.Client.CoreV1().Pods(w.namespace).Get(w.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			w.t.Fatal(err)
		}
		for _, s := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
			if s.State.Running == nil || s.RestartCount != 0 {
				w.t.Errorf("after %s, container %s of pod %s has failed: %+v", after, s.Name, name, s)
			}
		}
	}
}

// check checks that no call and no container of any pod has failed, and prints what runs.
func (w *watched) check(after string) {
	w.t.Helper()
	w.unharmed(after)
	for _, name := range w.names {
		for _, tag := range []string{previousTag, thisTag} {
			before := strings.Count(w.log(name, "caller-"+tag), "calls ")
			await.Until(w.t, "the callers call again", func() error {
				if now := strings.Count(w.log(name, "caller-"+tag), "calls "); now <= before {
					return fmt.Errorf("the caller of pod %s printed %d lines", name, now)
				}
				return nil
			})
			if output := w.log(name, "caller-"+tag); strings.Contains(output, "FAILED") {
				w.t.Errorf("after %s, calls of pod %s with the client of %s have failed:\n%s", after, name, tag, output)
			}
		}
		if output := w.log(name, stack.SidecarName); strings.Contains(output, `"level":"WARN"`) || strings.Contains(output, `"level":"ERROR"`) {
			w.t.Errorf("after %s, the sidecar of pod %s has output:\n%s", after, name, output)
		}
	}
	w.t.Logf("after %s:", after)
	for _, component := range []string{"broker", "webhook"} {
		pods, err := podsOf(w.t.Context(), component)
		if err != nil {
			w.t.Fatal(err)
		}
		for _, pod := range pods {
			for _, s := range pod.Status.ContainerStatuses {
				w.t.Logf("  %s runs %s, %s", pod.Name, s.Image, s.ImageID)
			}
		}
	}
	if w.t.Failed() {
		w.t.FailNow()
	}
}

func podsOf(ctx context.Context, component string) ([]corev1.Pod, error) {
	list, err := d.Client.CoreV1().Pods(deployment.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// all returns nil if a component has two pods, which both have the tag.
func all(component, tag string) error {
	pods, err := podsOf(context.Background(), component)
	if err != nil {
		return err
	}
	for _, pod := range pods {
		if !strings.HasSuffix(pod.Spec.Containers[0].Image, ":"+tag) {
			return fmt.Errorf("pod %s has image %s", pod.Name, pod.Spec.Containers[0].Image)
		}
	}
	if len(pods) != 2 {
		return fmt.Errorf("the %s has %d pods", component, len(pods))
	}
	return nil
}

// flood creates pods all the time, as dry runs.
type flood struct {
	t        *testing.T
	stop     func()
	ended    sync.WaitGroup
	injected atomic.Int64
}

func startFlood(t *testing.T, namespace string) *flood {
	t.Helper()
	f := &flood{t: t}
	ctx, cancel := context.WithCancel(t.Context())
	f.stop = cancel
	f.ended.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
			admitted, err := d.Client.CoreV1().Pods(namespace).Create(ctx, app("flood"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err == nil && (len(admitted.Spec.InitContainers) != 1 || admitted.Spec.InitContainers[0].Name != stack.SidecarName) {
				err = fmt.Errorf("a pod was admitted with init containers %v", admitted.Spec.InitContainers)
			}
			if err != nil && ctx.Err() == nil {
				t.Errorf("after %d injected pods: %v", f.injected.Load(), err)
				return
			}
			f.injected.Add(1)
		}
	})
	return f
}

func (f *flood) end() {
	f.t.Helper()
	f.stop()
	f.ended.Wait()
	f.t.Logf("%d pods were injected meanwhile", f.injected.Load())
	if f.injected.Load() < 100 {
		f.t.Errorf("%d pods were injected, too few to show anything", f.injected.Load())
	}
}
