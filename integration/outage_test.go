//go:build unix

package integration

import (
	"strings"
	"testing"
	"time"
)

// The tests of this file take away what all others use, so they do not run in parallel.

func TestSidecarServesWhileTheBrokerIsAway(t *testing.T) {
	ns := namespace(t, ".*")
	env := app(t, run(t, create(t, ns, "app", map[string]string{roleKey: "cart"})))
	credence.StopBroker()
	got, err := command(t, env, "", awsclient, "whoami")
	if startErr := credence.StartBroker(t.Context()); startErr != nil {
		t.Fatal(startErr)
	}
	if got != assumed("cart") {
		t.Errorf("while the broker was away an SDK saw %q, %v", got, err)
	}
}

func TestBrokerAnswersWhileTheAPIServerIsAway(t *testing.T) {
	ns := namespace(t, ".*")
	text := token(t, create(t, ns, "app", map[string]string{roleKey: "cart"}))
	if _, err := ask(t, text); err != nil {
		t.Fatal(err)
	}
	control.StopAPIServer()
	lease, err := ask(t, text)
	if startErr := control.StartAPIServer(t.Context()); startErr != nil {
		t.Fatal(startErr)
	}
	if err != nil || lease.Role.String() != arn("cart") {
		t.Errorf("while the API server was away a running pod was answered %s, %v", lease.Role, err)
	}
}

func TestReplacedCertificatesAreServedAndTrustedWithoutRestart(t *testing.T) {
	ns := namespace(t, ".*")
	// Short sessions, so that the running sidecar must call the broker again within the test.
	pod := create(t, ns, "app", map[string]string{roleKey: "rotating", durationKey: "15m"})
	sidecar := run(t, pod)
	env := app(t, sidecar)
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
	for _, address := range []string{credence.BrokerAddress(), credence.WebhookAddress()} {
		for range 200 { // files are looked at once a second
			newest, err := credence.ServedBy(t.Context(), address)
			if err != nil {
				t.Fatal(err)
			}
			if newest {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if newest, err := credence.ServedBy(t.Context(), address); !newest {
			t.Errorf("%s still serves the old certificate (%v)", address, err)
		}
	}
	// The API server reaches the webhook.
	create(t, ns, "next", map[string]string{roleKey: "cart"})
	// The sidecar, which has not been restarted, renews: it comes back when 0.45 of the session's life
	// remain at the latest.
	out, err := command(t, env, "", awsclient, "watch", (shortLife * 6 / 10).String())
	if err != nil {
		t.Fatal(err)
	}
	if keys := strings.Fields(out); keys[len(keys)-1] == before {
		t.Errorf("the sidecar still has session %s of before the rotation", before)
	}
}
