//go:build linux

package e2e

import (
	"context"
	"errors"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
)

// TestUninstallBlocksNoPod shows that an uninstalled release blocks no running and no new pod, and leaves nothing behind.
// integration/chart/admission has the list of cluster-scoped objects. The cleanup installs it again.
func TestUninstallBlocksNoPod(t *testing.T) {
	ns := namespace(t)
	create(t, ns, app("before", annotated(), "watch", "1h"))
	awaitReady(t, ns, "before")
	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Upgrade(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	})
	await.Until(t, "an annotated pod is admitted", func() error { // the API server watches policies
		_, err := d.Client.CoreV1().Pods(ns).Create(t.Context(), paused("after", annotated()), metav1.CreateOptions{})
		return err
	})
	if pod := awaitReady(t, ns, "after"); len(pod.Spec.InitContainers) != 0 {
		t.Errorf("the pod has init containers %v", pod.Spec.InitContainers)
	}
	await.Until(t, "its keys can change", func() error {
		_, err := d.Run(t.Context(), "", d.Kubectl, "annotate", "pod", "after", "-n", ns, "--overwrite", roleKey+"=other")
		return err
	})
	running := awaitReady(t, ns, "before")
	if s := status(t, running, "app"); s.RestartCount != 0 {
		t.Errorf("the application of a running pod has failed: %s", states(running))
	}
	if err := d.Client.CoreV1().Pods(ns).Delete(t.Context(), "before", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, ns, "before")
	await.Until(t, "the published roots are deleted", func() error {
		_, err := d.Client.CoreV1().ConfigMaps(ns).Get(t.Context(), "credence-trust", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("they exist"))
	})
	// Helm does not wait for the pods of deleted Deployments.
	await.Until(t, "our namespace is empty", func() error {
		inside, err := d.Run(t.Context(), "", d.Kubectl, "get", "-o", "name", "-n", deployment.Namespace, "pods,services,certificates,issuers,poddisruptionbudgets")
		if err == nil && strings.TrimSpace(inside) != "" {
			err = errors.New("there is " + inside)
		}
		return err
	})
}
