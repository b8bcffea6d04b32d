//go:build unix

package kube_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
	"github.com/credence-iam/credence/broker/kube/events"
	"github.com/credence-iam/credence/broker/policy"
)

func known(d *kube.Directory, p *corev1.Pod) bool {
	found, _, ok := d.Pod(p.Namespace + "/" + p.Name)
	return ok && found.UID == string(p.UID)
}

// roleOf returns the role that the pod requests; empty if its annotations are refused.
func roleOf(pod policy.Pod) string {
	settings, err := pod.Request.Settings()
	if err != nil {
		return ""
	}
	return settings.Role
}

// TestDirectoryKeepsWhatIsNeeded shows that the directory keeps only what a decision needs, follows changes, and removes
// a finished pod, such as a Job's, although it exists.
func TestDirectoryKeepsWhatIsNeeded(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	d := startDirectory(t, control.Config())
	p := pod(t, ns, "app", nil)
	eventually(t, "the directory has a new pod", func() bool { return known(d, p) })
	got, gotNS, _ := d.Pod(ns + "/app")
	if roleOf(got) != "cart" {
		t.Errorf("the pod requests role %q, want cart", roleOf(got))
	}
	if gotNS.Labels[injectKey] != "enabled" || len(gotNS.Labels) != 1 {
		t.Errorf("the directory keeps labels %v of the namespace, want ours only", gotNS.Labels)
	}
	bound, _, err := d.Bind(t.Context(), idOf(t, p))
	if err != nil || bound.UID != string(p.UID) || bound.ServiceAccount != "app" || roleOf(bound) != "cart" {
		t.Errorf("Bind returns %+v (%v)", bound, err)
	}
	p.Annotations[roleKey] = "till"
	if _, err := client.CoreV1().Pods(ns).Update(t.Context(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the directory has the changed annotation", func() bool {
		got, _, _ := d.Pod(ns + "/app")
		return roleOf(got) == "till"
	})
	stays := pod(t, ns, "stays", nil)
	finish(t, p)
	eventually(t, "the directory has the running pod and not the finished one", func() bool { return !known(d, p) && known(d, stays) })
}

// gate is a connection to the API server that a test can cut.
type gate struct {
	mu    sync.Mutex
	shut  bool
	conns []net.Conn
}

func (g *gate) config() *rest.Config {
	config := control.Config()
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.shut {
			return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err == nil {
			g.conns = append(g.conns, conn)
		}
		return conn, err
	}
	return config
}

func (g *gate) set(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = shut
	if shut {
		for _, conn := range g.conns {
			_ = conn.Close()
		}
		g.conns = nil
	}
}

// The other tests of this file stop the API server for all tests, so they do not run in parallel.

// TestAPIServerUnavailable shows what the directory and the verifiers do while they cannot reach the API server. They
// catch up after a cut connection, and after a restart, when the server has lost their watches.
func TestAPIServerUnavailable(t *testing.T) {
	ns := namespace(t)
	var way gate
	d := startDirectory(t, way.config())
	jwks, review := newJWKS(t, way.config()), newTokenReview(t, way.config())
	stays, goes := pod(t, ns, "stays", nil), pod(t, ns, "goes", nil)
	staysID, goesID := idOf(t, stays), idOf(t, goes)
	first, second, third := podToken(t, stays), podToken(t, stays), podToken(t, stays)
	eventually(t, "the directory has both pods", func() bool { return known(d, stays) && known(d, goes) && d.Age() == 0 })
	for _, v := range []identity.Verifier{jwks, review} {
		if _, err := v.Verify(t.Context(), identity.NewUnverifiedToken(first)); err != nil {
			t.Fatal(err)
		}
	}
	bind := func(what string, id identity.Pod, want string) {
		t.Helper()
		if _, _, err := d.Bind(t.Context(), id); outcome(err) != want {
			t.Errorf("Bind of %s returns %v, want %s", what, err, want)
		}
	}
	unavailable := func(unknown identity.Pod, token string) {
		t.Helper()
		eventually(t, "the directory's age shows the outage", func() bool { return d.Age() > 0 })
		bind("a known pod", staysID, accepted)
		bind("an unknown pod", unknown, string(credential.ReasonAPIServerUnavailable))
		if _, err := jwks.Verify(t.Context(), identity.NewUnverifiedToken(token)); err != nil {
			t.Errorf("jwks returns %v for a token", err)
		}
		if _, err := review.Verify(t.Context(), identity.NewUnverifiedToken(token)); credential.ReasonOf(err) != credential.ReasonAPIServerUnavailable {
			t.Errorf("tokenreview returns %v for a token, want %s", err, credential.ReasonAPIServerUnavailable)
		}
		if review.Age() == 0 {
			t.Error("the age of tokenreview does not show the outage")
		}
	}

	way.set(true)
	remove(t, goes)
	comes := pod(t, ns, "comes", nil)
	unavailable(idOf(t, comes), second)
	bind("a pod that was deleted meanwhile", goesID, accepted) // the directory cannot know it
	way.set(false)
	eventually(t, "the directory has caught up", func() bool { return known(d, comes) && !known(d, goes) && d.Age() == 0 })
	bind("the deleted pod", goesID, string(credential.ReasonPodNotFound))
	bind("the new pod", idOf(t, comes), accepted)

	unknown := staysID
	unknown.Name, unknown.UID = "other", "00000000-0000-4000-8000-000000000000"
	control.StopAPIServer()
	running := false
	t.Cleanup(func() {
		if !running {
			_ = control.StartAPIServer(context.Background())
		}
	})
	unavailable(unknown, third)
	if err := control.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	running = true
	fresh := pod(t, ns, "fresh", nil)
	remove(t, comes)
	eventually(t, "the directory has caught up again", func() bool { return known(d, fresh) && !known(d, comes) && d.Age() == 0 })
	bind("the unknown pod", unknown, string(credential.ReasonPodNotFound))
	if _, err := review.Verify(t.Context(), identity.NewUnverifiedToken(podToken(t, fresh))); err != nil || review.Age() != 0 {
		t.Errorf("tokenreview returns %v for a token, its age is %s", err, review.Age())
	}
}

// TestSigningKeyIsReplaced shows that the verifiers accept tokens of a new key, and no longer those of a removed one.
func TestSigningKeyIsReplaced(t *testing.T) {
	ns := namespace(t)
	p := pod(t, ns, "app", nil)
	old := podToken(t, p)
	jwks, review := newJWKS(t, control.Config()), newTokenReview(t, control.Config())
	verifiers := map[string]identity.Verifier{"jwks": jwks, "tokenreview": review}
	for by, v := range verifiers {
		if _, err := v.Verify(t.Context(), identity.NewUnverifiedToken(old)); err != nil {
			t.Fatalf("by %s: %v", by, err)
		}
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	restart := func(ctx context.Context, files map[string][]byte) {
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(control.Run().Dir(), name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		control.StopAPIServer()
		if err := control.StartAPIServer(ctx); err != nil {
			t.Fatal(err)
		}
	}
	// The controller manager and the other tests keep the old key.
	before := make(map[string][]byte)
	for _, name := range []string{privateFile, publicFile} {
		if before[name], err = os.ReadFile(filepath.Join(control.Run().Dir(), name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { restart(context.Background(), before) })
	restart(t.Context(), map[string][]byte{
		privateFile: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		publicFile:  pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}),
	})
	replaced := identity.NewUnverifiedToken(podToken(t, p))
	for by, v := range verifiers {
		// A verifier requests keys at most once in ten seconds, and caches a review as long.
		eventually(t, by+" accepts a token of the new key", func() bool {
			_, err := v.Verify(t.Context(), replaced)
			return err == nil
		})
		eventually(t, by+" refuses a token of the old key", func() bool {
			_, err := v.Verify(t.Context(), identity.NewUnverifiedToken(old))
			return credential.ReasonOf(err) == credential.ReasonTokenInvalid
		})
	}
	if _, _, err := startDirectory(t, control.Config()).Bind(t.Context(), idOf(t, p)); err != nil {
		t.Errorf("Bind of the pod returns %v", err)
	}
}

// TestEventsAreSeen shows that "kubectl describe" prints why a pod was refused.
func TestEventsAreSeen(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	p := pod(t, ns, "app", nil)
	recorder, err := events.New(control.Config(), "credence-broker-1", logger(t))
	if err != nil {
		t.Fatal(err)
	}
	background(t, recorder.Run)
	refused := policy.Pod{Namespace: ns, Name: p.Name, UID: string(p.UID)}
	denial := credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted, "role x is not permitted; ask for it")
	for range 3 {
		recorder.Refused(refused, denial)
	}
	eventually(t, "the Event is written", func() bool { return recorder.Stats().Written == 1 })
	if got := recorder.Stats(); got.Suppressed != 2 || got.Dropped != 0 {
		t.Errorf("three equal refusals: %+v", got)
	}
	// kubectl describe lists Events this way.
	list, err := client.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(p.UID) + ",involvedObject.kind=Pod,involvedObject.name=app"})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("there are %d Events (%v), want one", len(list.Items), err)
	}
	e := list.Items[0]
	for what, pair := range map[string][2]string{
		"type": {e.Type, "Warning"}, "reason": {e.Reason, "CredentialsRefused"},
		"message":  {e.Message, "ROLE_NOT_PERMITTED: role x is not permitted; ask for it"},
		"reporter": {e.ReportingController, "credence-iam.github.io/broker"}, "instance": {e.ReportingInstance, "credence-broker-1"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("its %s is %q, want %q", what, pair[0], pair[1])
		}
	}
	if e.EventTime.IsZero() {
		t.Error("it has no time")
	}

	// An API server accepts a new Event with a series, without the right to change Events.
	since := time.Now().Add(-time.Hour)
	recorder.Own(refused, events.ReasonImpaired, "STS_UNAVAILABLE: wait", since, 5)
	recorder.Own(refused, events.ReasonRecovered, "STS_UNAVAILABLE has ended", time.Time{}, 0)
	eventually(t, "the other Events are written", func() bool { return recorder.Stats().Written == 3 })
	list, err = client.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(p.UID) + ",reason=BrokerImpaired"})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("there are %d Events (%v), want one", len(list.Items), err)
	}
	if e := list.Items[0]; e.Series == nil || e.Series.Count != 5 || !e.EventTime.Time.Equal(since.Truncate(time.Microsecond)) || !e.Series.LastObservedTime.After(since) {
		t.Errorf("the series is %+v since %v, want 5 since %v", e.Series, e.EventTime, since)
	}
}

// TestCopiesAreNotInjected shows that Bind refuses a copy of an injected pod without the label or the annotations, and
// accepts a pod with both. The result is the same from the watch cache and from live reads.
func TestCopiesAreNotInjected(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	watching := startDirectory(t, control.Config())
	reading, err := kube.NewDirectory(control.Config(), keys(t), logger(t)) // It does not run, so all its reads are live.
	if err != nil {
		t.Fatal(err)
	}
	injected := pod(t, ns, "injected", nil)
	copies := map[string]*corev1.Pod{
		"neither": pod(t, ns, "copy", func(p *corev1.Pod) { p.Labels, p.Annotations = nil, nil }),
		"the label": pod(t, ns, "copy-with-label", func(p *corev1.Pod) {
			p.Annotations = map[string]string{policy.DefaultPrefix + "/service-account": "app", "example.com/other": "x"}
		}),
		"the annotations": pod(t, ns, "copy-with-annotations", func(p *corev1.Pod) { p.Labels = nil }),
	}
	eventually(t, "the directory has the pods with a label", func() bool {
		return known(watching, injected) && known(watching, copies["the label"])
	})
	for how, d := range map[string]*kube.Directory{"watching": watching, "reading": reading} {
		if _, _, err := d.Bind(t.Context(), idOf(t, injected)); err != nil {
			t.Errorf("%s: the injected pod: %v", how, err)
		}
		for what, p := range copies {
			if _, _, err := d.Bind(t.Context(), idOf(t, p)); credential.ReasonOf(err) != credential.ReasonPodNotInjected {
				t.Errorf("%s: a copy with %s: %v, want %s", how, what, err, credential.ReasonPodNotInjected)
			}
		}
	}
}
