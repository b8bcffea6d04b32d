package installation

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"

	"github.com/credence-iam/credence/broker/debugapi"
)

// Ports of a pod. The debug pages of a broker are on its loopback address only.
const (
	BrokerDebugPort = 8081 // --debug-listen
	BrokerAdminPort = 8080 // health, readiness and metrics
)

// maxPage limits what is read from one page of a pod, in bytes. A page of [debugapi.MaxGrants] grants has about 6 MB.
const maxPage = 64 << 20

// callTimeout limits one call to a pod.
const callTimeout = 20 * time.Second

// Broker is one broker's pod. Its pages are read by port-forward, which needs the right "create pods/portforward".
type Broker struct {
	// Pod is the pod.
	Pod *corev1.Pod

	client *Client
}

// Brokers returns the pods of the brokers, by name. It leaves out pods that have ended.
func (c *Client) Brokers(ctx context.Context, namespace string) ([]Broker, error) {
	list, err := c.Kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector + brokerComponent})
	if err != nil {
		return nil, fmt.Errorf("listing the brokers of namespace %s: %w", namespace, err)
	}
	var all []Broker
	for n := range list.Items {
		if pod := &list.Items[n]; pod.Status.Phase == corev1.PodRunning {
			all = append(all, Broker{Pod: pod, client: c})
		}
	}
	slices.SortFunc(all, func(a, b Broker) int { return cmp.Compare(a.Pod.Name, b.Pod.Name) })
	return all, nil
}

// Grants returns the state of all grants of the broker that the query selects: role, failing. It reads as many pages as
// there are.
func (b Broker) Grants(ctx context.Context, query url.Values) (debugapi.Page, error) {
	var all debugapi.Page
	for {
		q := url.Values{"limit": {strconv.Itoa(debugapi.MaxGrants)}, "offset": {strconv.Itoa(len(all.Grants))}}
		for key, values := range query {
			q[key] = values
		}
		text, err := b.call(ctx, http.MethodGet, BrokerDebugPort, debugapi.GrantsPath, q)
		if err != nil {
			return debugapi.Page{}, err
		}
		var page debugapi.Page
		if err := json.Unmarshal(text, &page); err != nil {
			return debugapi.Page{}, fmt.Errorf("broker %s: its page %s is not understood; is it of another version? %w", b.Pod.Name, debugapi.GrantsPath, err)
		}
		all.Time, all.Matched = page.Time, page.Matched
		all.Grants = append(all.Grants, page.Grants...)
		if page.LeftOut == 0 || len(page.Grants) == 0 {
			return all, nil
		}
	}
}

// Get returns a page of the broker's pod.
func (b Broker) Get(ctx context.Context, port int, path string) ([]byte, error) {
	return b.call(ctx, http.MethodGet, port, path, nil)
}

// Post sends a command to the broker, [debugapi.RenewPath] or [debugapi.DropPath], for the sessions of one role.
func (b Broker) Post(ctx context.Context, path, role string) (debugapi.Result, error) {
	text, err := b.call(ctx, http.MethodPost, BrokerDebugPort, path, url.Values{"role": {role}})
	if err != nil {
		return debugapi.Result{}, err
	}
	var result debugapi.Result
	if err := json.Unmarshal(text, &result); err != nil {
		return debugapi.Result{}, fmt.Errorf("broker %s: its response to %s is not understood; is it of another version? %w", b.Pod.Name, path, err)
	}
	return result, nil
}

func (b Broker) call(ctx context.Context, method string, port int, path string, query url.Values) ([]byte, error) {
	return b.client.PodCall(ctx, b.Pod, method, port, path, query)
}

// PodCall sends one HTTP request to a port of a pod by port-forward, also if the pod serves it on its loopback address
// only. It returns the body of a response with status 200.
func (c *Client) PodCall(ctx context.Context, pod *corev1.Pod, method string, port int, path string, query url.Values) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	fail := func(err error) error {
		return fmt.Errorf("%s %s of pod %s/%s, port %d: %w", method, path, pod.Namespace, pod.Name, port, err)
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return c.DialPod(ctx, pod, port)
		},
	}
	u := url.URL{Scheme: "http", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), Path: path, RawQuery: query.Encode()}
	request, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, fail(err)
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return nil, fail(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxPage+1))
	switch {
	case err != nil:
		return nil, fail(err)
	case len(text) > maxPage:
		return nil, fail(fmt.Errorf("the page is longer than %d bytes", maxPage))
	case response.StatusCode != http.StatusOK:
		return nil, fail(fmt.Errorf("status %s: %.300q", response.Status, text))
	}
	return text, nil
}

// DialPod opens a connection to a port of a pod by port-forward: the protocol of kubectl, over WebSocket if the API server
// knows it, else over SPDY. Other users of this machine cannot use the connection, as they could use a local port.
func (c *Client) DialPod(ctx context.Context, pod *corev1.Pod, port int) (net.Conn, error) {
	u := c.Kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).SubResource("portforward").URL()
	dialer, err := dialerFor(c.Config, u)
	if err != nil {
		return nil, err
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() { // Dial takes no context. If ctx ends first, the connection is closed when it is there.
		conn, err := dialStream(dialer, port)
		done <- result{conn, err}
	}()
	select {
	case r := <-done:
		return r.conn, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.conn != nil {
				_ = r.conn.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

func dialerFor(config *rest.Config, u *url.URL) (httpstream.Dialer, error) {
	transport, upgrader, err := spdy.RoundTripperFor(config)
	if err != nil {
		return nil, err
	}
	overSPDY := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u)
	overWebSocket, err := portforward.NewSPDYOverWebsocketDialer(u, config)
	if err != nil {
		return nil, err
	}
	return portforward.NewFallbackDialer(overWebSocket, overSPDY, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	}), nil
}

// dialStream opens the two streams of one forwarded connection.
func dialStream(dialer httpstream.Dialer, port int) (net.Conn, error) {
	connection, protocol, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		return nil, err
	}
	if protocol != portforward.PortForwardProtocolV1Name {
		_ = connection.Close()
		return nil, fmt.Errorf("the API server offers protocol %q for a port-forward, want %q", protocol, portforward.PortForwardProtocolV1Name)
	}
	header := http.Header{}
	header.Set(corev1.PortHeader, strconv.Itoa(port))
	header.Set(corev1.PortForwardRequestIDHeader, "0")
	header.Set(corev1.StreamType, corev1.StreamTypeError)
	failures, err := connection.CreateStream(header)
	if err != nil {
		_ = connection.Close()
		return nil, err
	}
	_ = failures.Close() // Nothing is written to it.
	header.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := connection.CreateStream(header)
	if err != nil {
		_ = connection.Close()
		return nil, err
	}
	s := &stream{Stream: data, connection: connection, failed: make(chan struct{})}
	go func() {
		defer close(s.failed)
		text, err := io.ReadAll(io.LimitReader(failures, 1000))
		if err == nil && len(text) > 0 {
			s.failure = fmt.Errorf("the node refuses the port-forward: %s", text)
			_ = data.Reset()
		}
	}()
	return s, nil
}

// stream is the data stream of a port-forward as a connection. It has no deadlines. Close ends it from any goroutine.
type stream struct {
	httpstream.Stream
	connection httpstream.Connection
	closing    sync.Once
	failed     chan struct{} // closed when the error stream has ended
	failure    error         // what it contained; read it after failed is closed
}

// Read implements [net.Conn]. If the node could not connect to the pod, it returns the node's error.
func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if err != nil {
		select {
		case <-s.failed:
			if s.failure != nil {
				return n, s.failure
			}
		case <-time.After(time.Second): // The error stream ends with the data stream, or a moment later.
		}
	}
	return n, err
}

// Close implements [net.Conn].
func (s *stream) Close() error {
	s.closing.Do(func() {
		_ = s.Reset()
		_ = s.connection.Close()
	})
	return nil
}

type address struct{}

func (address) Network() string { return "portforward" }
func (address) String() string  { return "pod" }

// LocalAddr implements [net.Conn].
func (s *stream) LocalAddr() net.Addr { return address{} }

// RemoteAddr implements [net.Conn].
func (s *stream) RemoteAddr() net.Addr { return address{} }

// SetDeadline implements [net.Conn] without an effect.
func (s *stream) SetDeadline(time.Time) error { return nil }

// SetReadDeadline implements [net.Conn] without an effect.
func (s *stream) SetReadDeadline(time.Time) error { return nil }

// SetWriteDeadline implements [net.Conn] without an effect.
func (s *stream) SetWriteDeadline(time.Time) error { return nil }
