//go:build unix

package integration

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/process"
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
