//go:build unix

package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/credence-iam/credence/broker/debugapi"
	"github.com/credence-iam/credence/integration/await"
	"github.com/credence-iam/credence/integration/kubelettest"
	"github.com/credence-iam/credence/integration/kubetest"
	"github.com/credence-iam/credence/operator/installation"
)

// brokerPod returns a pod that the chart's Deployment of brokers could have made.
func brokerPod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			"app.kubernetes.io/name": "credence", "app.kubernetes.io/component": "broker",
		}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "broker", Image: "registry.example/broker"}}},
	}
}

// port is the behavior of a pod whose debug pages are at that URL or address.
func port(target string) kubelettest.Pod {
	return kubelettest.Pod{Ports: map[int]string{installation.BrokerDebugPort: strings.TrimPrefix(target, "http://")}}
}

// pages serves handler until the test ends.
func pages(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	return server.URL
}

// silent returns an address that accepts connections and sends nothing.
func silent(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return listener.Addr().String()
}

// TestPodsAreReadByPortForward reads pages of pods that respond, break, are silent or are gone. Afterwards no connection
// and no goroutine is left.
func TestPodsAreReadByPortForward(t *testing.T) {
	kubelet := kubelettest.Start(t, credence.Client)
	ns := kubetest.Namespace(t, credence.Client, nil, nil)
	good := pages(t, func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("offset") == "0" {
			_, _ = fmt.Fprint(w, `{"matched":2,"left_out":1,"grants":[{"role":"r0"}]}`)
			return
		}
		_, _ = fmt.Fprint(w, `{"matched":2,"grants":[{"role":"r1"}]}`)
	})
	endless := pages(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, `{"left_out":1,"grants":[{}]}`) })
	for name, behavior := range map[string]kubelettest.Pod{
		"a-good":   port(good),
		"b-none":   {},
		"c-silent": port(silent(t)),
		"d-hangs":  {Hang: true},
		"e-breaks": port(pages(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			panic(http.ErrAbortHandler)
		})),
		"f-refuses": port(pages(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no\x1b[2J", http.StatusTeapot) })),
		"g-endless": port(endless),
		"h-long":    port(pages(t, func(w http.ResponseWriter, _ *http.Request) { endlessly(w) })),
		"i-header":  port(pages(t, func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) })),
		"j-strange": port(pages(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, "<html>") })),
	} {
		kubelet.Run(t, ns, brokerPod(name), behavior)
	}
	kubelet.Run(t, ns, brokerPod("k-deleted"), port(good))

	client, err := installation.NewClient(control.Config())
	if err != nil {
		t.Fatal(err)
	}
	brokers, err := client.Brokers(t.Context(), ns)
	if err != nil || len(brokers) != 11 {
		t.Fatalf("%d brokers, %v", len(brokers), err)
	}
	if err := credence.Client.CoreV1().Pods(ns).Delete(t.Context(), "k-deleted", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	kubetest.AwaitDeleted(t, credence.Client, ns, "k-deleted")
	before := runtime.NumGoroutine()
	hanging := brokers[3]
	brokers = slices.Delete(brokers, 3, 4)

	want := map[string]string{
		"a-good": "", "b-none": "connection refused", "c-silent": "deadline", "e-breaks": "EOF",
		"f-refuses": `status 418: "no\x1b[2J"`, "g-endless": installation.ErrCut.Error(), "h-long": "longer than", "i-header": "headers exceeded",
		"j-strange": "is not understood", "k-deleted": `pods "k-deleted" not found`,
	}
	type result struct {
		name string
		page debugapi.Page
		err  error
	}
	results := make(chan result)
	for _, b := range brokers {
		go func() {
			ctx := t.Context()
			if strings.Contains(want[b.Pod.Name], "deadline") {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 2*time.Second) // its reader is impatient
				defer cancel()
			}
			page, err := b.Grants(ctx, url.Values{"failing": {"true"}})
			results <- result{b.Pod.Name, page, err}
		}()
	}
	for range brokers {
		r := <-results
		if text := want[r.name]; fmt.Sprint(r.err) != "<nil>" && text == "" || !strings.Contains(fmt.Sprint(r.err), text) {
			t.Errorf("%s: error %v, want %q", r.name, r.err, text)
		}
		if r.name == "a-good" && (len(r.page.Grants) != 2 || r.page.Grants[0].Role != "r0" || r.page.Grants[1].Role != "r1") {
			t.Errorf("the good broker has %+v", r.page)
		}
	}
	await.Until(t, "all port-forwards and goroutines end", func() error {
		if now, all := kubelet.Forwards(); now > 0 || all != 9 {
			return fmt.Errorf("%d port-forwards are open, of %d", now, all)
		}
		if now := runtime.NumGoroutine(); now > before+2 {
			return fmt.Errorf("%d goroutines, before %d", now, before)
		}
		return nil
	})
	// This takes half a minute to end behind the reader's back: client-go waits that long for the confirmation of a stream.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := hanging.Grants(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%s: error %v, want that of the context", hanging.Pod.Name, err)
	}
}

// endlessly writes as much as is read.
func endlessly(w http.ResponseWriter) {
	text := make([]byte, 1<<20)
	for {
		if _, err := w.Write(text); err != nil {
			return
		}
	}
}

// TestRightsOfPortForward reads as users with some rights. A user with "create" alone needs SPDY, because a WebSocket
// begins with GET.
func TestRightsOfPortForward(t *testing.T) {
	kubelet := kubelettest.Start(t, credence.Client)
	ns := kubetest.Namespace(t, credence.Client, nil, nil)
	kubelet.Run(t, ns, brokerPod("broker-1"), port(pages(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, `{}`) })))
	for user, tt := range map[string]struct {
		rules []rbacv1.PolicyRule
		lacks string
	}{
		"nobody":  {nil, "list pods in namespace " + ns},
		"lists":   {[]rbacv1.PolicyRule{rule("pods", "list")}, "create pods/portforward in namespace " + ns},
		"gets":    {[]rbacv1.PolicyRule{rule("pods", "list"), rule("pods/portforward", "get")}, "create pods/portforward in namespace " + ns},
		"creates": {[]rbacv1.PolicyRule{rule("pods", "list"), rule("pods/portforward", "create")}, ""},
		"both":    {[]rbacv1.PolicyRule{rule("pods", "list"), rule("pods/portforward", "create", "get")}, ""},
	} {
		t.Run(user, func(t *testing.T) {
			client := clientOf(t, ns, user, tt.rules)
			_, err := func() (debugapi.Page, error) {
				brokers, err := client.Brokers(t.Context(), ns)
				if err != nil {
					return debugapi.Page{}, err
				}
				return brokers[0].Grants(t.Context(), nil)
			}()
			missing, ok := errors.AsType[*installation.ForbiddenError](err)
			if ok != (tt.lacks != "") || ok && missing.Right != tt.lacks || !ok && err != nil {
				t.Errorf("error %v, want missing right %q", err, tt.lacks)
			}
		})
	}
}

func rule(resource string, verbs ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{resource}, Verbs: verbs}
}

// clientOf returns a client of a user with these rights in the namespace. It returns when the API server knows them.
func clientOf(t *testing.T, namespace, user string, rules []rbacv1.PolicyRule) *installation.Client {
	t.Helper()
	config, err := control.User(user)
	if err != nil {
		t.Fatal(err)
	}
	if rules != nil {
		object := metav1.ObjectMeta{Name: user}
		if _, err := credence.Client.RbacV1().Roles(namespace).Create(t.Context(), &rbacv1.Role{ObjectMeta: object, Rules: rules}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := credence.Client.RbacV1().RoleBindings(namespace).Create(t.Context(), &rbacv1.RoleBinding{
			ObjectMeta: object, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: user},
			Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: user}},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	client, err := installation.NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	await.Until(t, "the API server knows the rights", func() error {
		if rules == nil {
			return nil
		}
		_, err := client.Brokers(t.Context(), namespace)
		return err
	})
	return client
}

// TestPodsSayWhatTheyServe: what a broker waits for, its certificate, and debug pages on another port.
func TestPodsSayWhatTheyServe(t *testing.T) {
	kubelet := kubelettest.Start(t, credence.Client)
	ns := kubetest.Namespace(t, credence.Client, nil, nil)
	secured := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(secured.Close)
	page := func(status int, text string) string {
		return strings.TrimPrefix(pages(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status); _, _ = fmt.Fprint(w, text) }), "http://")
	}
	moved, off := brokerPod("b-moved"), brokerPod("c-off")
	moved.Spec.Containers[0].Args = []string{"--debug-listen=127.0.0.1:9000"}
	off.Spec.Containers[0].Args = []string{"--debug-listen="}
	kubelet.Run(t, ns, brokerPod("a-waits"), kubelettest.Pod{Ports: map[int]string{
		8080: page(http.StatusServiceUnavailable, "AWS identity: refused\n\npods: not listed yet\n"), 9443: secured.Listener.Addr().String(), 9444: silent(t),
	}})
	kubelet.Run(t, ns, moved, kubelettest.Pod{Ports: map[int]string{8080: page(http.StatusOK, "ready"), 9000: page(http.StatusOK, `{"grants":[{"role":"r"}]}`)}})
	kubelet.Run(t, ns, off, kubelettest.Pod{})
	client, err := installation.NewClient(control.Config())
	if err != nil {
		t.Fatal(err)
	}
	_, brokers, err := client.Pods(t.Context(), ns)
	if err != nil || len(brokers) != 3 {
		t.Fatalf("%d brokers, %v", len(brokers), err)
	}
	waits, ready := &brokers[0], &brokers[1]
	if got := client.Unready(t.Context(), waits, 8080); got != "AWS identity: refused\npods: not listed yet" {
		t.Errorf("it waits for %q", got)
	}
	if got := client.Unready(t.Context(), ready, 8080); got != "" {
		t.Errorf("a ready pod waits for %q", got)
	}
	if got, err := client.Certificates(t.Context(), waits, 9443, "x.svc"); err != nil || len(got) != 1 || !got[0].Equal(secured.Certificate()) {
		t.Errorf("%d certificates, %v", len(got), err)
	}
	cause := errors.New("it takes too long")
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
	defer cancel()
	if _, err := client.Certificates(ctx, waits, 9444, "x.svc"); !errors.Is(err, cause) {
		t.Errorf("the handshake of a silent pod: %v", err)
	}
	if page, err := client.BrokerOf(ready).Grants(t.Context(), nil); err != nil || len(page.Grants) != 1 {
		t.Errorf("debug pages on another port: %+v, %v", page, err)
	}
	if _, err := client.BrokerOf(&brokers[2]).Grants(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "its --debug-listen is empty") {
		t.Errorf("a broker without debug pages: %v", err)
	}
}
