//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/credence-iam/credence/broker/assume/ststest"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/deployment"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/integration/stack"
)

// TestCheckCommand shows that "credence check" has no finding about an installation that works, not even one that it could
// not look at, and that the first failure is the cause if a part does not work.
func TestCheckCommand(t *testing.T) {
	stop(t, "broker")() // New brokers, whose metrics have no failures of other tests.
	ns := d.Namespace(t, func(labels, annotations map[string]string) {
		annotations[permittedKey] = "arn:aws:iam::" + stack.Account + ":role/(" + bucket + "|untrusting)"
		delete(labels, injectLabel)
	})
	kubetest.Create(t, d.Client, ns, paused("early", annotated())) // which is not injected
	optIn := []byte(`{"metadata":{"labels":{"` + injectLabel + `":"enabled"}}}`)
	if _, err := d.Client.CoreV1().Namespaces().Patch(t.Context(), ns, types.MergePatchType, optIn, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	program := command(t)
	// check returns the findings that are not ok, as STATE CHECK: TEXT.
	check := func(args ...string) (bad []string) {
		t.Helper()
		out, failed := d.Run(t.Context(), "", program, append([]string{"check", "-o", "json", "-n", ns}, args...)...)
		_, text, found := strings.Cut(out, "{")
		var result struct {
			Groups []struct {
				Findings []struct{ Step, Subject, State, Text string }
			}
		}
		if err := json.Unmarshal([]byte("{"+text), &result); err != nil || !found {
			t.Fatalf("%v, %v: %s", failed, err, out)
		}
		for _, g := range result.Groups {
			for _, f := range g.Findings {
				if f.State != "ok" {
					bad = append(bad, f.State+" "+f.Step+": "+f.Subject+" "+f.Text)
				}
			}
		}
		if (failed != nil) != (len(bad) > 0) {
			t.Errorf("%v with findings %q", failed, bad)
		}
		return bad
	}
	first := func(want string, bad []string) {
		t.Helper()
		if len(bad) == 0 || !strings.HasPrefix(bad[0], want) {
			t.Errorf("findings %q, want first %q", bad, want)
		}
	}
	first("failed pods-not-injected:  1 pod of opted-in namespaces annotated but without a sidecar, ", check("--wait=5s"))

	if err := d.Client.CoreV1().Pods(ns).Delete(t.Context(), "early", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	kubetest.AwaitDeleted(t, d.Client, ns, "early")
	kubetest.Create(t, d.Client, ns, paused("app", annotated()))
	kubetest.AwaitReady(t, d.Client, ns, "app")
	if bad := check("--wait=3m"); len(bad) > 0 {
		t.Errorf("an installation that works has findings: %q", bad)
	}

	d.STS.SetRole(stack.RoleARN("untrusting"), ststest.Behavior{Deny: true})
	kubetest.Create(t, d.Client, ns, paused("refused", map[string]string{roleKey: "untrusting"}))
	await.Until(t, "the refused role is found", func() error {
		want := "warning sessions:  1 session that AWS refuses: " + stack.RoleARN("untrusting") + " (STS_ACCESS_DENIED, of namespace " + ns + ")"
		if bad := check(); len(bad) != 1 || bad[0] != want {
			return fmt.Errorf("findings %q, want %q", bad, want)
		}
		return nil
	})
	if err := d.Client.CoreV1().Pods(ns).Delete(t.Context(), "refused", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	kubetest.AwaitDeleted(t, d.Client, ns, "refused")

	bindings := d.Client.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
	if err := bindings.Delete(t.Context(), "credence-injected", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	first("failed admission-policies: validatingadmissionpolicy/credence-injected has no binding that denies", check())
	if err := d.Upgrade(t.Context(), "--force-conflicts"); err != nil {
		t.Fatal(err)
	}

	startWebhook := stop(t, "webhook")
	first("failed webhook-pods: deployment/credence-webhook no webhook is wanted", check())
	startWebhook()

	startBroker := stop(t, "broker")
	if err := d.Client.CoreV1().ConfigMaps(ns).Delete(t.Context(), "credence-trust", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	bad := check()
	first("failed broker-pods: deployment/credence-broker no broker is wanted", bad)
	if all := strings.Join(bad, "\n"); !strings.Contains(all, "failed trust:  ConfigMap credence-trust is missing in 1 opted-in namespace, whose pods cannot start: "+ns) {
		t.Errorf("without the trust of a namespace: %s", all)
	}
	startBroker()
	if bad := check("--wait=3m", "--credence-namespace="+deployment.Namespace); len(bad) > 0 {
		t.Errorf("an installation that works again has findings: %q", bad)
	}
}
