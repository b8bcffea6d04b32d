//go:build unix

// Package kubelettest is a kubelet for tests: a node of a real API server whose pods do not run. It serves port-forwards
// to addresses that a test chooses, and logs that a test writes, by the protocols of a kubelet. So a test of a client has
// the API server's own authorization and its own translation of WebSockets.
//
// It runs no probes, sends no status of the node and checks no credentials of the API server.
package kubelettest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

const protocol = "portforward.k8s.io"

// Pod is how a pod behaves.
type Pod struct {
	// Ports are the addresses to which connections to ports of the pod lead. Others are refused, as if nothing listened.
	Ports map[int]string
	// Hang makes port-forwards to the pod hang before they are connected, as on a node whose container runtime hangs.
	Hang bool
	// Log and Previous are what its containers have written, and those before.
	Log, Previous string
}

// Kubelet is the kubelet. Its methods may be called concurrently.
type Kubelet struct {
	client kubernetes.Interface
	node   string

	mu          sync.Mutex
	pods        map[string]Pod // by namespace/name; guarded by mu
	connections int            // guarded by mu
	opened      int            // guarded by mu
}

// Start starts a kubelet and registers its node until the test ends.
func Start(t *testing.T, client kubernetes.Interface) *Kubelet {
	t.Helper()
	k := &Kubelet{client: client, pods: map[string]Pod{}}
	server := httptest.NewUnstartedServer(k)
	server.TLS = &tls.Config{NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12} // SPDY upgrades HTTP/1.1
	server.StartTLS()
	t.Cleanup(server.CloseClientConnections) // hijacked connections end with the API server's
	address, ok := server.Listener.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("the kubelet listens on %s", server.Listener.Addr())
	}
	node, err := client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "kubelettest-"},
		// No scheduler and no controller needs the node.
		Spec: corev1.NodeSpec{Unschedulable: true},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.CoreV1().Nodes().Delete(context.WithoutCancel(t.Context()), node.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	status := fmt.Appendf(nil, `{"status":{"addresses":[{"type":"InternalIP","address":%q}],"daemonEndpoints":{"kubeletEndpoint":{"Port":%d}}}}`,
		address.IP, address.Port)
	if _, err := client.CoreV1().Nodes().Patch(t.Context(), node.Name, types.MergePatchType, status, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	k.node = node.Name
	return k
}

// Run creates a pod that seems to run on the node.
func (k *Kubelet) Run(t *testing.T, namespace string, pod *corev1.Pod, behavior Pod) *corev1.Pod {
	t.Helper()
	pod = pod.DeepCopy()
	pod.Spec.NodeName = k.node
	pod.Spec.TerminationGracePeriodSeconds = new(int64(0)) // nothing else would confirm its end
	stored, err := k.client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	status := []byte(`{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}`)
	if stored, err = k.client.CoreV1().Pods(namespace).Patch(t.Context(), stored.Name, types.MergePatchType, status, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	k.Behave(namespace, stored.Name, behavior)
	return stored
}

// Behave changes how a pod behaves.
func (k *Kubelet) Behave(namespace, name string, behavior Pod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pods[namespace+"/"+name] = behavior
}

// Forwards returns how many port-forwards are open now, and how many were opened.
func (k *Kubelet) Forwards() (now, all int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.connections, k.opened
}

// ServeHTTP implements [http.Handler]: POST /portForward/NAMESPACE/POD and GET /containerLogs/NAMESPACE/POD/CONTAINER.
func (k *Kubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	if len(parts) < 3 {
		http.NotFound(w, r)
		return
	}
	k.mu.Lock()
	pod, ok := k.pods[parts[1]+"/"+parts[2]]
	k.mu.Unlock()
	switch {
	case ok && parts[0] == "containerLogs":
		text := pod.Log
		if r.URL.Query().Get("previous") == "true" {
			if text = pod.Previous; text == "" {
				http.Error(w, "previous terminated container not found", http.StatusBadRequest)
				return
			}
		}
		if limit, err := strconv.Atoi(r.URL.Query().Get("limitBytes")); err == nil && limit < len(text) {
			text = text[:limit]
		}
		_, _ = io.WriteString(w, text)
	case ok && parts[0] == "portForward":
		k.forward(w, r, pod)
	default:
		http.NotFound(w, r)
	}
}

func (k *Kubelet) forward(w http.ResponseWriter, r *http.Request, pod Pod) {
	if _, err := httpstream.Handshake(r, w, []string{protocol}); err != nil {
		return // It has responded.
	}
	type offered struct {
		stream httpstream.Stream
		sent   <-chan struct{}
	}
	streams := make(chan offered, 8)
	gone := make(chan struct{})
	defer close(gone)
	connection := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, sent <-chan struct{}) error {
		if pod.Hang {
			<-gone
		}
		streams <- offered{s, sent}
		return nil
	})
	if connection == nil {
		return
	}
	k.count(+1)
	defer k.count(-1)
	defer connection.Close()
	var failures, data httpstream.Stream
	for failures == nil || data == nil {
		select {
		case o := <-streams:
			<-o.sent
			if o.stream.Headers().Get(corev1.StreamType) == corev1.StreamTypeError {
				failures = o.stream
			} else {
				data = o.stream
			}
		case <-connection.CloseChan():
			return
		}
	}
	if err := k.connect(r.Context(), pod, data); err != nil {
		_, _ = fmt.Fprintf(failures, "error forwarding port to pod: %v", err)
	}
	_ = failures.Close()
	_ = data.Close()
	select {
	case <-connection.CloseChan():
	case <-time.After(time.Minute): // a client that leaves it open
	}
}

// connect copies data to the port of the pod and back until the pod closes the connection.
func (k *Kubelet) connect(ctx context.Context, pod Pod, data httpstream.Stream) error {
	port, err := strconv.Atoi(data.Headers().Get(corev1.PortHeader))
	if err != nil {
		return err
	}
	address, ok := pod.Ports[port]
	if !ok {
		return errors.New("failed to connect to localhost:" + strconv.Itoa(port) + " inside namespace: connection refused")
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, data)
		_ = conn.Close() // The client has closed the stream.
	}()
	_, err = io.Copy(data, conn)
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (k *Kubelet) count(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.connections += n
	if n > 0 {
		k.opened++
	}
}
