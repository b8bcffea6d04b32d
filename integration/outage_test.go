//go:build unix

package integration

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/certs/certstest"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/process"
	"github.com/credence-iam/credence/integration/stack"
)

// The tests of this file stop or restart what all tests share, so they do not run in parallel.

func TestSidecarServesWhileTheBrokerIsUnavailable(t *testing.T) {
	env, _ := app(t, create(t, namespace(t, ".*"), "app", role("cart")))
	credence.Broker.ShutDown()
	got, err := command(t, env, "", awsclient, "whoami")
	if startErr := credence.StartBroker(t.Context()); startErr != nil {
		t.Fatal(startErr)
	}
	if got != assumed("cart") {
		t.Errorf("while the broker was stopped an SDK saw %q, %v", got, err)
	}
}

func TestBrokerServesWhileTheAPIServerIsUnavailable(t *testing.T) {
	text := token(t, create(t, namespace(t, ".*"), "app", role("cart")))
	if _, err := call(t, text); err != nil {
		t.Fatal(err)
	}
	control.StopAPIServer()
	if _, err := credence.Client.Discovery().ServerVersion(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the stopped API server: got %v, want connection refused", err)
	}
	lease, err := call(t, text)
	if startErr := control.StartAPIServer(t.Context()); startErr != nil {
		t.Fatal(startErr)
	}
	if err != nil || lease.Role.String() != arn("cart") {
		t.Errorf("while the API server was stopped a running pod got %s, %v", lease.Role, err)
	}
}

func TestReplacedCertificatesAreServedAndTrustedWithoutRestart(t *testing.T) {
	ns := namespace(t, ".*")
	// With a short session, the running sidecar calls the broker again within the test.
	env, sidecar := app(t, create(t, ns, "app", map[string]string{roleKey: "rotating", durationKey: "15m"}))
	before, err := command(t, env, "", awsclient, "watch", "0.1s")
	if err != nil {
		t.Fatal(err)
	}
	if err := credence.RotateCertificates(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := sidecar.WriteVolumes(t.Context()); err != nil { // as a kubelet does when the ConfigMap changes
		t.Fatal(err)
	}
	for _, address := range []string{credence.Broker.Address, credence.Webhook.Address} {
		await.Until(t, address+" serves the new certificate", func() error {
			newest, err := credence.ServedBy(t.Context(), address)
			if err == nil && !newest {
				err = errors.New("it serves the old one")
			}
			return err
		})
	}
	create(t, ns, "next", role("cart")) // the API server reaches the webhook
	// The sidecar was not restarted. It renews when 0.45 of the session are left at the latest.
	out, err := command(t, env, "", awsclient, "watch", (shortLife * 6 / 10).String())
	if err != nil {
		t.Fatal(err)
	}
	if keys := strings.Fields(out); keys[len(keys)-1] == before {
		t.Errorf("the sidecar still has session %s from before the rotation", before)
	}
}

// TestInstallationIsChecked runs the check that the chart runs after an installation.
func TestInstallationIsChecked(t *testing.T) {
	const checkName, long, short = "credence-check", time.Minute, 3 * time.Second
	succeeds := func() {
		t.Helper()
		if out, err := credence.CheckWebhook(t.Context(), long); err != nil || !strings.Contains(out, "the webhook injects pods") {
			t.Errorf("the check of a good installation: %v\n%s", err, out)
		}
	}
	fails := func(want string) {
		t.Helper()
		if out, err := credence.CheckWebhook(t.Context(), short); err == nil || !strings.Contains(out, want) {
			t.Errorf("the check: %v, want %q\n%s", err, want, out)
		}
	}
	succeeds()
	templates, err := credence.Client.CoreV1().PodTemplates(stack.SystemNamespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(templates.Items) > 0 {
		t.Errorf("the check has stored %d objects: %v", len(templates.Items), err)
	}

	credence.Webhook.ShutDown()
	fails("check the pods of Deployment credence-webhook")
	if err := credence.StartWebhook(t.Context()); err != nil {
		t.Fatal(err)
	}

	configurations := credence.Client.AdmissionregistrationV1().MutatingWebhookConfigurations()
	good, err := configurations.Get(t.Context(), checkName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	set := func(webhooks []admissionregistrationv1.MutatingWebhook) {
		t.Helper()
		current, err := configurations.Get(t.Context(), checkName, metav1.GetOptions{})
		if err == nil {
			current.Webhooks = webhooks
			_, err = configurations.Update(t.Context(), current, metav1.UpdateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for want, change := range map[string]func([]admissionregistrationv1.MutatingWebhook) []admissionregistrationv1.MutatingWebhook{
		"the API server lacks the webhook's current root": func(w []admissionregistrationv1.MutatingWebhook) []admissionregistrationv1.MutatingWebhook {
			w[0].ClientConfig.CABundle = certstest.NewCA(t).PEM
			return w
		},
		"the API server does not call the webhook": func([]admissionregistrationv1.MutatingWebhook) []admissionregistrationv1.MutatingWebhook {
			return nil
		},
	} {
		set(change(good.DeepCopy().Webhooks))
		await.Until(t, "the check reports that "+want, func() error { // the API server watches the configuration
			if out, err := credence.CheckWebhook(t.Context(), short); err == nil || !strings.Contains(out, want) {
				return fmt.Errorf("the check ended with %w: %s", err, out)
			}
			return nil
		})
	}
	set(good.Webhooks)
	succeeds()
}

func TestSessionsOfOneRoleAreDroppedOnRequest(t *testing.T) {
	port, err := process.FreePort(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	debug := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	restartBroker(t, "--debug-listen="+debug)
	ns := namespace(t, ".*")
	key := func(token string) string {
		t.Helper()
		lease, err := call(t, token)
		if err != nil {
			t.Fatal(err)
		}
		return lease.AccessKeyID
	}
	dropped, other := token(t, create(t, ns, "dropped", role("dropped"))), token(t, create(t, ns, "other", role("other")))
	droppedKey, otherKey := key(dropped), key(other)
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+debug+"/debug/grants/drop?role="+url.QueryEscape(arn("dropped")), http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err := errors.Join(err, response.Body.Close()); err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("the broker responded %s: %s (%v)", response.Status, body, err)
	}
	if key(dropped) == droppedKey || key(other) != otherKey {
		t.Error("the dropped role still has its session, or the other role has another one")
	}
}
