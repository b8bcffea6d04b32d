//go:build linux

package e2e

import (
	"context"
	"errors"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/integration/deployment"
)

// An upgrade replaces brokers and webhooks one by one. Running pods notice nothing, and pods can be made all
// the time.
func TestUpgradeIsNotNoticed(t *testing.T) {
	ns := namespace(t)
	create(t, ns, caller(t, app("app", annotated(), "watch", "1h")))
	awaitReady(t, ns, "app")
	upgraded := make(chan error, 1)
	go func() { upgraded <- d.Upgrade(t.Context(), "--set=logLevel=debug") }()
	for asked := true; asked; {
		if _, err := d.Client.CoreV1().Pods(ns).Create(t.Context(), app("asked", annotated(), "whoami"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			t.Errorf("a pod was refused: %v", err)
		}
		select {
		case err := <-upgraded:
			if err != nil {
				t.Fatal(err)
			}
			asked = false
		default:
			pause(t.Context(), t)
		}
	}
	calm(t, ns, "app")
	create(t, ns, once(app("after", annotated(), "whoami")))
	awaitEnd(t, ns, "after")
}

// What is uninstalled holds up no pod: not those that run, nor those that are made afterwards. It can be
// installed again.
func TestUninstallBlocksNoPod(t *testing.T) {
	ns := namespace(t)
	create(t, ns, app("before", annotated(), "watch", "1h"))
	awaitReady(t, ns, "before")
	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// t.Context has ended here, and other tests need what was uninstalled.
		if err := d.Upgrade(context.Background()); err != nil {
			t.Fatal(err)
		}
	})
	pod := app("after", annotated())
	pod.Spec.Containers[0].Image = "localhost/credence-pause:1"
	// The API server learns of a removed policy by watching.
	eventually(t, "a pod with our annotations is let through", func(ctx context.Context) error {
		_, err := d.Client.CoreV1().Pods(ns).Create(ctx, pod, metav1.CreateOptions{})
		return err
	})
	if pod := awaitReady(t, ns, "after"); len(pod.Spec.InitContainers) != 0 {
		t.Errorf("the pod has init containers %v", pod.Spec.InitContainers)
	}
	eventually(t, "its keys can be changed", func(ctx context.Context) error {
		_, err := d.Run(ctx, "", d.Kubectl, "annotate", "pod", "after", "-n", ns, "--overwrite", roleKey+"=other")
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
	eventually(t, "the published roots are gone", func(ctx context.Context) error {
		_, err := d.Client.CoreV1().ConfigMaps(ns).Get(ctx, "credence-trust", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("they are there"))
	})
	left, err := d.Run(t.Context(), "", d.Kubectl, "get", "-o", "name", "--ignore-not-found",
		"mutatingwebhookconfigurations,validatingadmissionpolicies,validatingadmissionpolicybindings,clusterroles,clusterrolebindings",
		"-l", "app.kubernetes.io/part-of=credence")
	if err != nil || strings.TrimSpace(left) != "" {
		t.Errorf("left behind: %s (%v)", left, err)
	}
	// Helm does not wait for the pods of the Deployments that it has removed.
	eventually(t, "nothing is left in our namespace", func(ctx context.Context) error {
		inside, err := d.Run(ctx, "", d.Kubectl, "get", "-o", "name", "-n", deployment.Namespace, "pods,services,certificates,issuers,poddisruptionbudgets")
		if err == nil && strings.TrimSpace(inside) != "" {
			err = errors.New("there is " + inside)
		}
		return err
	})
}
