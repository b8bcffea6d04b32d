//go:build unix

package kube_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/kube"
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

// TestDirectoryKeepsWhatIsNeeded: what a decision needs is kept of a pod, and nothing else.
func TestDirectoryKeepsWhatIsNeeded(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	d := startDirectory(t, control.Config())
	p := pod(t, ns, "app", nil)
	eventually(t, "a new pod is known", func() bool { return known(d, p) })
	got, gotNS, _ := d.Pod(ns + "/app")
	if roleOf(got) != "cart" {
		t.Errorf("the pod requests role %q, want cart", roleOf(got))
	}
	if gotNS.Labels[injectKey] != "enabled" || len(gotNS.Labels) != 1 {
		t.Errorf("of the namespace's labels %v are kept, want ours alone", gotNS.Labels)
	}
	bound, _, err := d.Bind(t.Context(), idOf(t, p))
	if err != nil || bound.UID != string(p.UID) || bound.ServiceAccount != "app" || roleOf(bound) != "cart" {
		t.Errorf("it is bound to %+v (%v)", bound, err)
	}
	p.Annotations[roleKey] = "till"
	if _, err := client.CoreV1().Pods(ns).Update(t.Context(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a changed annotation is known", func() bool {
		got, _, _ := d.Pod(ns + "/app")
		return roleOf(got) == "till"
	})
}

// TestFinishedPodsLeave: a Job's pod that has ended is gone to whoever keeps its session, though it exists.
func TestFinishedPodsLeave(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	d, err := kube.NewDirectory(control.Config(), keys(t), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	left := make(map[string]bool) // :: key → it was told of and is not there
	d.OnChange(func(key string) {
		_, _, ok := d.Pod(key)
		mu.Lock()
		defer mu.Unlock()
		left[key] = !ok
	})
	background(t, d.Run)
	var jobs []*corev1.Pod
	for i := range 20 {
		jobs = append(jobs, pod(t, ns, fmt.Sprintf("job-%d", i), nil))
	}
	stays := pod(t, ns, "stays", nil)
	for _, job := range jobs {
		eventually(t, "a Job's pod is known", func() bool { return known(d, job) })
	}
	for _, job := range jobs {
		finish(t, job)
	}
	for _, job := range jobs {
		eventually(t, "a pod that has finished leaves", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return left[ns+"/"+job.Name]
		})
	}
	if !known(d, stays) {
		t.Error("a pod that runs has left too")
	}
}

// TestNewNamespaceIsAwaited: the watch need not have brought a namespace for its pods to be answered.
func TestNewNamespaceIsAwaited(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	p := pod(t, ns, "app", nil)
	d, err := kube.NewDirectory(control.Config(), keys(t), logger(t))
	if err != nil {
		t.Fatal(err)
	}
	id := idOf(t, p)
	// Nothing is watched yet, and nothing known.
	if _, _, ok := d.Pod(ns + "/app"); ok || d.Synced() {
		t.Fatal("it knows something before it runs")
	}
	if _, got, err := d.Bind(t.Context(), id); err != nil || got.Name != ns {
		t.Errorf("a directory that has listed nothing answers %v, %v", got, err)
	}
	background(t, d.Run)
	if _, got, err := d.Bind(t.Context(), id); err != nil || got.Name != ns {
		t.Errorf("one that has just begun answers %v, %v", got, err)
	}
}

// gate is a way to the API server that can be shut.
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

// TestAPIServerOutOfReach: what happens in the cluster meanwhile is caught up with.
func TestAPIServerOutOfReach(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	var way gate
	d := startDirectory(t, way.config())
	stays, goes := pod(t, ns, "stays", nil), pod(t, ns, "goes", nil)
	staysID, goesID := idOf(t, stays), idOf(t, goes)
	eventually(t, "both pods are known", func() bool { return known(d, stays) && known(d, goes) })
	if age := d.Age(); age != 0 {
		t.Errorf("while all is well the watches are %s old", age)
	}
	way.set(true)
	remove(t, goes)
	comes := pod(t, ns, "comes", nil)
	comesID := idOf(t, comes)
	eventually(t, "it is noticed that nothing is heard", func() bool { return d.Age() > 0 })
	for _, id := range []identity.Pod{staysID, goesID} { // that it has gone cannot be known
		if _, _, err := d.Bind(t.Context(), id); err != nil {
			t.Errorf("pod %s, which was known, is answered %v", id, err)
		}
	}
	if _, _, err := d.Bind(t.Context(), comesID); credential.ReasonOf(err) != credential.ReasonAPIServerAway {
		t.Errorf("a pod that cannot be known is answered %v, want %s", err, credential.ReasonAPIServerAway)
	}
	way.set(false)
	eventually(t, "the new pod is known, and the deleted one gone", func() bool { return known(d, comes) && !known(d, goes) })
	eventually(t, "all watches are heard again", func() bool { return d.Age() == 0 })
	if _, _, err := d.Bind(t.Context(), goesID); credential.ReasonOf(err) != credential.ReasonPodNotFound {
		t.Errorf("the deleted pod is answered %v", err)
	}
	for _, id := range []identity.Pod{staysID, comesID} {
		if _, _, err := d.Bind(t.Context(), id); err != nil {
			t.Errorf("pod %s is answered %v", id, err)
		}
	}
}

// The tests that follow take the API server away from all others, so they do not run in parallel: parallel ones
// run after them.

// TestAPIServerStopsAndReturns: the same of a server that ends, and knows nothing of its watches when it returns.
func TestAPIServerStopsAndReturns(t *testing.T) {
	ns := namespace(t)
	d := startDirectory(t, control.Config())
	jwks, review := newJWKS(t, control.Config()), newTokenReview(t, control.Config())
	p := pod(t, ns, "app", nil)
	id, text := idOf(t, p), identity.NewUnverifiedToken(podToken(t, p))
	later := identity.NewUnverifiedToken(podToken(t, p))
	eventually(t, "the pod is known", func() bool { return known(d, p) })
	for _, v := range []identity.Verifier{jwks, review} {
		if _, err := v.Verify(t.Context(), text); err != nil {
			t.Fatal(err)
		}
	}
	control.StopAPIServer()
	running := false
	t.Cleanup(func() {
		if !running {
			_ = control.StartAPIServer(context.Background())
		}
	})
	eventually(t, "it is noticed that nothing is heard", func() bool { return d.Age() > 0 })
	if _, _, err := d.Bind(t.Context(), id); err != nil {
		t.Errorf("a known pod is answered %v", err)
	}
	if _, err := jwks.Verify(t.Context(), later); err != nil {
		t.Errorf("by the keys, a token is answered %v", err)
	}
	if _, err := review.Verify(t.Context(), later); credential.ReasonOf(err) != credential.ReasonAPIServerAway {
		t.Errorf("by review, a token is answered %v, want %s", err, credential.ReasonAPIServerAway)
	}
	if review.Age() == 0 {
		t.Error("that no token is reviewed does not show in the verifier's age")
	}
	unknown := id
	unknown.Name, unknown.UID = "other", "00000000-0000-4000-8000-000000000000"
	if _, _, err := d.Bind(t.Context(), unknown); credential.ReasonOf(err) != credential.ReasonAPIServerAway {
		t.Errorf("an unknown pod is answered %v, want %s", err, credential.ReasonAPIServerAway)
	}
	if err := control.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	running = true
	fresh := pod(t, ns, "fresh", nil)
	remove(t, p)
	eventually(t, "the new pod is known, and the deleted one gone", func() bool { return known(d, fresh) && !known(d, p) })
	eventually(t, "all watches are heard again", func() bool { return d.Age() == 0 })
	if _, _, err := d.Bind(t.Context(), unknown); credential.ReasonOf(err) != credential.ReasonPodNotFound {
		t.Errorf("the unknown pod is now answered %v", err)
	}
	if _, err := review.Verify(t.Context(), identity.NewUnverifiedToken(podToken(t, fresh))); err != nil || review.Age() != 0 {
		t.Errorf("by review, a token is now answered %v, and the age is %s", err, review.Age())
	}
}

// TestSigningKeyIsReplaced: tokens of a key that is gone stop to be accepted, and those of its successor are.
func TestSigningKeyIsReplaced(t *testing.T) {
	ns := namespace(t)
	p := pod(t, ns, "app", nil)
	old := podToken(t, p)
	jwks, review := newJWKS(t, control.Config()), newTokenReview(t, control.Config())
	verifiers := map[string]identity.Verifier{"the keys": jwks, "review": review}
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
	// The controller manager goes on with the key of before, and other tests with it.
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
		// Keys are asked for at most once in ten seconds, and a review that passed is kept as long.
		eventually(t, "a token of the new key is accepted by "+by, func() bool {
			_, err := v.Verify(t.Context(), replaced)
			return err == nil
		})
		eventually(t, "a token of the old key is refused by "+by, func() bool {
			_, err := v.Verify(t.Context(), identity.NewUnverifiedToken(old))
			return credential.ReasonOf(err) == credential.ReasonTokenInvalid
		})
	}
	if _, _, err := startDirectory(t, control.Config()).Bind(t.Context(), idOf(t, p)); err != nil {
		t.Errorf("the pod itself, which goes on: %v", err)
	}
}

// TestEventsAreSeen: whoever describes a pod reads why it was refused.
func TestEventsAreSeen(t *testing.T) {
	ns := namespace(t)
	p := pod(t, ns, "app", nil)
	events, err := kube.NewEvents(control.Config(), "credence-broker-1", logger(t))
	if err != nil {
		t.Fatal(err)
	}
	background(t, events.Run)
	refused := policy.Pod{Namespace: ns, Name: p.Name, UID: string(p.UID)}
	denial := credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted, "role x is not permitted; ask for it")
	for range 3 {
		events.Refused(refused, denial)
	}
	eventually(t, "it is written", func() bool { return events.Stats().Written == 1 })
	if got := events.Stats(); got.Suppressed != 2 || got.Dropped != 0 {
		t.Errorf("three equal refusals: %+v", got)
	}
	// As kubectl describe asks.
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
	// An API server that is away costs the Event, and nothing else.
	control.StopAPIServer()
	events.Refused(refused, credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationInvalid, "x"))
	eventually(t, "it is counted as dropped", func() bool { return events.Stats().Dropped == 1 })
	if err := control.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	events.Refused(refused, credential.Errorf(credential.ErrInvalid, credential.ReasonAnnotationInvalid, "x"))
	eventually(t, "the next one is written", func() bool { return events.Stats().Written == 2 })
}

// TestCopiesAreNotInjected: a copy of an injected pod, without its label or its annotations, is refused as not injected,
// and a pod that has both is not, whether the watch has brought it or not.
func TestCopiesAreNotInjected(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	watching := startDirectory(t, control.Config())
	reading, err := kube.NewDirectory(control.Config(), keys(t), logger(t)) // Its watches bring nothing.
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
	eventually(t, "the pods with a label are known", func() bool {
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
