//go:build linux

package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/chart"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/images"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/skew"
	"github.com/credence-iam/credence/integration/stack"
)

// previousTag is the tag of the images of the previous version.
const previousTag = "previous"

// products are the images that the chart installs, with the names of their values.
var products = []string{"broker", "webhook", "sidecar"}

// loadPrevious loads the previous version's images, and returns Helm's arguments that install its chart and these images.
func loadPrevious(t *testing.T, previous skew.Version) []string {
	t.Helper()
	references := map[string]string{skew.CallerProgram: callerImage}
	for _, product := range products {
		references["credence-"+product] = "localhost/credence-" + product
	}
	for program, reference := range references {
		image := images.Image{
			Reference: reference + ":" + previousTag, Name: program, Plain: true,
			Programs: map[string]string{runtime.GOARCH: filepath.Join(previous.Programs, program)},
		}
		archive, err := image.Write(filepath.Join(d.Cluster.Run().Dir(), "previous-"+program+".tar"))
		if err == nil {
			err = d.Cluster.LoadImage(t.Context(), archive.Path)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	ours, err := chart.Folder()
	if err != nil {
		t.Fatal(err)
	}
	args := slices.Clone(d.Credence)
	at := slices.Index(args, ours)
	if at < 0 {
		t.Fatalf("helm's arguments %q have no chart %s", args, ours)
	}
	args[at] = filepath.Join(previous.Source, "charts", "credence")
	args = slices.DeleteFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--set=check.") }) // It may have no check.
	for _, product := range products {
		args = append(args, "--set=images."+product+".tag="+previousTag)
	}
	return args
}

// TestUpgradeAndRollback installs the previous version, fails to upgrade it, upgrades it, rolls back, upgrades again and
// uninstalls. Meanwhile, the API server admits each pod with its sidecar, and no call of a running pod fails, whatever the
// version of its sidecar.
func TestUpgradeAndRollback(t *testing.T) {
	previous, err := skew.Previous(t.Context(), os.Stderr)
	if errors.Is(err, skew.ErrNoHistory) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Log("the previous version is commit", previous.Commit)
	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Run(t.Context(), "", d.Helm, loadPrevious(t, previous)...); err != nil {
		t.Fatal(err)
	}
	ns := d.Namespace(t)
	w := &watched{t: t, namespace: ns}
	w.add("installed", previousTag)
	f := startFlood(t, ns)

	// Brokers that cannot reach STS do not become ready, so the update of brokers stops. That of webhooks does not.
	if _, err := d.Run(t.Context(), "", d.Helm, append(slices.Clone(d.Credence), "--set=aws.stsEndpoint=http://127.0.0.1:1", "--timeout=5s")...); err == nil {
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
		if keys := strings.Fields(kubetest.Logs(t, d.Client, ns, "installed", "app")); len(keys) < 2 {
			return fmt.Errorf("its application has used %d access keys", len(keys))
		}
		return nil
	})

	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.CheckRunning(t, ns, w.names...)
	await.Until(t, "annotated pods are admitted without a sidecar", func() error { // the API server watches policies
		admitted, err := kubetest.Dry(t, d.Client, ns, app("after"))
		if err == nil && len(admitted.Spec.InitContainers) > 0 {
			err = await.Never{Err: errors.New("a pod has a sidecar")}
		}
		return err
	})
}

// callers are containers that call the brokers all the time, with the client of the sidecar of each version.
var callers = []string{"caller-" + previousTag, "caller-" + thisTag}

// watched are running pods in which nothing may fail.
type watched struct {
	t         *testing.T
	namespace string
	names     []string
}

// add creates a pod, and waits until its application uses credentials. Its sidecar must have the tag.
func (w *watched) add(name, tag string) {
	w.t.Helper()
	pod := app(name)
	for _, c := range callers {
		d.AddCaller(pod, c, callerImage+strings.Replace(c, "caller-", ":", 1), "")
	}
	pod = kubetest.Create(w.t, d.Client, w.namespace, pod)
	if got := pod.Spec.InitContainers[0].Image; got != "localhost/credence-sidecar:"+tag {
		w.t.Errorf("pod %s has a sidecar with image %s, want tag %s", name, got, tag)
	}
	w.names = append(w.names, name)
	await.Until(w.t, "pod "+name+" uses credentials", func() error {
		for _, container := range append(callers, "app") {
			if kubetest.Logs(w.t, d.Client, w.namespace, name, container) == "" {
				return fmt.Errorf("container %s has no output", container)
			}
		}
		return nil
	})
}

// check checks that no call and no container of any pod has failed, and prints what runs.
func (w *watched) check(after string) {
	w.t.Helper()
	d.CheckCallers(w.t, w.namespace, callers, w.names...)
	for _, name := range w.names {
		output := kubetest.Logs(w.t, d.Client, w.namespace, name, stack.SidecarName)
		if strings.Contains(output, `"level":"WARN"`) || strings.Contains(output, `"level":"ERROR"`) {
			w.t.Errorf("the sidecar of pod %s has output:\n%s", name, output)
		}
	}
	w.t.Logf("after %s:", after)
	for _, component := range []string{"broker", "webhook"} {
		pods, err := d.Pods(w.t.Context(), component)
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

// all returns nil if a component has two pods, which both have the tag.
func all(component, tag string) error {
	pods, err := d.Pods(context.Background(), component)
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
