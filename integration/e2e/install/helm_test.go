//go:build linux

package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// TestHelmReturnsWhenPodsAreInjected shows that a pod can be injected as soon as Helm has installed the chart, and that Helm
// shows why not.
func TestHelmReturnsWhenPodsAreInjected(t *testing.T) {
	ns := d.Namespace(t)
	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A policy refuses the PodTemplate of the check.
	values := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(values, []byte(refusal), 0o600); err != nil {
		t.Fatal(err)
	}
	err := d.Upgrade(t.Context(), "--values="+values, "--set=check.timeout=10s")
	if err == nil || !strings.Contains(err.Error(), "pods cannot be injected after 10s") || !strings.Contains(err.Error(), "no PodTemplates today") {
		t.Errorf("with a check that fails, Helm returns %v", err)
	}
	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	pod, err := kubetest.Dry(t, d.Client, ns, app("app"))
	if err != nil {
		t.Fatal(err)
	}
	kubetest.Container(t, pod, stack.SidecarName)
	jobs, err := d.Client.BatchV1().Jobs(deployment.Namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(jobs.Items) > 0 {
		t.Errorf("the check has left %d Jobs: %v", len(jobs.Items), err)
	}
}

// refusal are values with a policy that refuses PodTemplates.
const refusal = `extraObjects:
- apiVersion: admissionregistration.k8s.io/v1
  kind: ValidatingAdmissionPolicy
  metadata: {name: no-templates}
  spec:
    matchConstraints:
      resourceRules:
      - {apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [podtemplates]}
    validations:
    - {expression: "false", message: no PodTemplates today}
- apiVersion: admissionregistration.k8s.io/v1
  kind: ValidatingAdmissionPolicyBinding
  metadata: {name: no-templates}
  spec: {policyName: no-templates, validationActions: [Deny]}
`

// TestWebhookOnTheHostsNetwork shows that pods are injected if the webhook uses the network of its node.
func TestWebhookOnTheHostsNetwork(t *testing.T) {
	ns := d.Namespace(t)
	enforce := func(level string) {
		t.Helper()
		if _, err := d.Run(context.WithoutCancel(t.Context()), "", d.Kubectl, "label", "namespace", deployment.Namespace, "--overwrite", "pod-security.kubernetes.io/enforce="+level); err != nil {
			t.Fatal(err)
		}
	}
	enforce("privileged")
	t.Cleanup(func() { enforce("restricted") })
	// The cluster has one node.
	if err := d.Upgrade(t.Context(), "--set=webhook.hostNetwork=true,webhook.replicas=1,webhook.port=10260,webhook.adminPort=10261"); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "only the webhook on the host's network runs", func() error {
		pods, err := d.Pods(t.Context(), "webhook")
		if err == nil && (len(pods) != 1 || pods[0].Status.PodIP != pods[0].Status.HostIP) {
			err = fmt.Errorf("there are %d pods", len(pods))
		}
		return err
	})
	pod := deployment.Once(app("app"))
	pod.Spec.Containers[0].Args = []string{"whoami"}
	kubetest.Container(t, kubetest.Create(t, d.Client, ns, pod), stack.SidecarName)
	kubetest.AwaitEnd(t, d.Client, ns, "app")
}

// TestHelmTest shows that "helm test" gets credentials in a pod, prints no secret, and shows a refusal of AWS.
func TestHelmTest(t *testing.T) {
	const good = "shelf"
	ns := d.Namespace(t)
	d.STS.SetRole(stack.RoleARN("untrusting"), ststest.Behavior{Deny: true})
	for role, want := range map[string]string{
		good:         "The pod has credentials of " + stack.RoleARN(good) + ", access key ID ...",
		"untrusting": "STS_ACCESS_DENIED: ",
	} {
		if err := d.Upgrade(t.Context(), "--set=test.namespace="+ns, "--set=test.role="+role); err != nil {
			t.Fatal(err)
		}
		out, err := d.Run(t.Context(), "", d.Helm, "test", "credence", "--namespace="+deployment.Namespace, "--timeout=5m")
		if !strings.Contains(out, want) || (err == nil) != (role == good) {
			t.Errorf("helm test with role %s: %v, want %q in\n%s", role, err, want, out)
		}
		t.Log(out)
	}
	jobs, err := d.Client.BatchV1().Jobs(ns).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(jobs.Items) > 1 {
		t.Errorf("there are %d Jobs, want at most that of the failed test: %v", len(jobs.Items), err)
	}
}

// TestUninstallBlocksNoPod shows that an uninstalled release blocks no running and no new pod, and leaves nothing behind.
// integration/chart/admission has the list of cluster-scoped objects.
func TestUninstallBlocksNoPod(t *testing.T) {
	if err := d.Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	ns := d.Namespace(t)
	kubetest.Create(t, d.Client, ns, app("before"))
	kubetest.AwaitReady(t, d.Client, ns, "before")
	if err := d.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "an annotated pod is admitted", func() error { // the API server watches policies
		pod := app("after")
		pod.Spec.Containers[0].Image = "localhost/credence-pause:1" // It does nothing.
		_, err := d.Client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{})
		return err
	})
	if pod := kubetest.AwaitReady(t, d.Client, ns, "after"); len(pod.Spec.InitContainers) != 0 {
		t.Errorf("the pod has init containers %v", pod.Spec.InitContainers)
	}
	await.Until(t, "its keys can change", func() error {
		_, err := d.Run(t.Context(), "", d.Kubectl, "annotate", "pod", "after", "-n", ns, "--overwrite", roleKey+"=other")
		return err
	})
	kubetest.AwaitReady(t, d.Client, ns, "before")
	d.CheckRunning(t, ns, "before")
	if err := d.Client.CoreV1().Pods(ns).Delete(t.Context(), "before", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	kubetest.AwaitDeleted(t, d.Client, ns, "before")
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
