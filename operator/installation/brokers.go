package installation

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/credence-iam/credence/broker/debugapi"
)

// Ports of a pod. The debug pages of a broker are on its loopback address only.
const (
	BrokerDebugPort = 8081 // --debug-listen
	BrokerAdminPort = 8080 // health, readiness and metrics
)

// Limits of what a pod can make its reader hold. A broker that somebody has taken over can send anything.
const (
	// maxPage is the maximum size of one page, in bytes. A page of pageGrants grants has at most 16 MB.
	maxPage    = 32 << 20
	pageGrants = 2000
	// maxPages is the maximum number of pages of grants from one broker, and maxAllPages their size, in bytes. That is
	// enough for 100,000 grants.
	maxPages, maxAllPages = 50, 128 << 20
	// maxHeader is the maximum size of the header of a response, in bytes.
	maxHeader = 16 << 10
	// maxFailure is how much is read of a node's reason for a refusal, in bytes.
	maxFailure = 1000
)

// callTimeout limits one call to a pod. A connection on which nothing happens for that long is closed.
const callTimeout = 20 * time.Second

// pagesTimeout limits all pages of one broker. 100,000 grants are some 60 MB.
const pagesTimeout = 2 * time.Minute

// Broker is one broker's pod. Its pages are read by port-forward, which needs the right "create pods/portforward".
type Broker struct {
	// Pod is the pod.
	Pod *corev1.Pod

	client *Client
}

// BrokerOf returns the broker of a pod.
func (c *Client) BrokerOf(pod *corev1.Pod) Broker { return Broker{Pod: pod, client: c} }

// Brokers returns the pods of the brokers, by name. It leaves out pods that have ended.
func (c *Client) Brokers(ctx context.Context, namespace string) ([]Broker, error) {
	list, err := c.Kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector + brokerComponent})
	if err != nil {
		return nil, fmt.Errorf("listing the brokers of namespace %s: %w", namespace, forbidden(err, "list pods in namespace "+namespace))
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

// ErrCut means that a broker has more grants than are read. Those that were read are valid.
var ErrCut = errors.New("the broker has more grants than are read; choose a role or a pod")

// Grants returns the state of all grants of the broker that the query selects: role, failing, pod. It reads as many pages
// as there are, over one connection. It returns [ErrCut] with the grants if there are too many.
func (b Broker) Grants(ctx context.Context, query url.Values) (debugapi.Page, error) {
	var all debugapi.Page
	err := b.EachPage(ctx, query, func(page debugapi.Page) {
		all.Time, all.Matched, all.LeftOut = page.Time, page.Matched, page.LeftOut
		all.Grants = append(all.Grants, page.Grants...)
	})
	if err != nil && !errors.Is(err, ErrCut) {
		return debugapi.Page{}, err
	}
	return all, err
}

// EachPage calls f with each page of [Broker.Grants]. A broker that somebody has taken over cannot make it last for ever.
func (b Broker) EachPage(ctx context.Context, query url.Values, f func(debugapi.Page)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, pagesTimeout, fmt.Errorf("its pages have not ended within %s", pagesTimeout))
	defer cancel()
	port, err := b.debugPort()
	if err != nil {
		return err
	}
	transport := b.client.transport(b.Pod, port)
	defer transport.CloseIdleConnections()
	offset, left := 0, maxAllPages
	for n := 0; n < maxPages && left > 0; n++ {
		q := url.Values{"limit": {strconv.Itoa(pageGrants)}, "offset": {strconv.Itoa(offset)}}
		maps.Copy(q, query)
		text, err := call(ctx, transport, b.Pod, http.MethodGet, port, debugapi.GrantsPath, q, "")
		if err != nil {
			return err
		}
		left -= len(text)
		var page debugapi.Page
		if err := json.Unmarshal(text, &page); err != nil {
			return fmt.Errorf("broker %s: its page %s is not understood; is it of another version? %w", b.Pod.Name, debugapi.GrantsPath, err)
		}
		f(page)
		if offset += len(page.Grants); page.LeftOut <= 0 || len(page.Grants) == 0 {
			return nil
		}
	}
	return ErrCut
}

// debugPort returns the port of the debug pages.
func (b Broker) debugPort() (int, error) {
	port := Port(arguments(b.Pod.Spec.Containers, brokerComponent), "debug-listen", BrokerDebugPort)
	if port == 0 {
		return 0, fmt.Errorf("broker %s serves no debug pages: its --debug-listen is empty", b.Pod.Name)
	}
	return port, nil
}

// Get returns a page of the broker's pod.
func (b Broker) Get(ctx context.Context, port int, path string) ([]byte, error) {
	return b.client.PodCall(ctx, b.Pod, http.MethodGet, port, path, nil)
}

// Post sends a command to the broker, [debugapi.RenewPath] or [debugapi.DropPath], for the sessions of one role, with the
// token of [Client.CommandToken]. If it fails, the broker may have carried out the command.
func (b Broker) Post(ctx context.Context, path, role, token string) (debugapi.Result, error) {
	port, err := b.debugPort()
	if err != nil {
		return debugapi.Result{}, err
	}
	transport := b.client.transport(b.Pod, port)
	defer transport.CloseIdleConnections()
	text, err := call(ctx, transport, b.Pod, http.MethodPost, port, path, url.Values{"role": {role}}, token)
	if err != nil {
		return debugapi.Result{}, err
	}
	var result debugapi.Result
	if err := json.Unmarshal(text, &result); err != nil {
		return debugapi.Result{}, fmt.Errorf("broker %s: its response to %s is not understood; is it of another version? %w", b.Pod.Name, path, err)
	}
	return result, nil
}

// PodCall sends one HTTP request to a port of a pod by port-forward, also if the pod serves it on its loopback address
// only. It returns the body of a response with status 200. Another status is a [*StatusError], a missing right a
// [*ForbiddenError].
func (c *Client) PodCall(ctx context.Context, pod *corev1.Pod, method string, port int, path string, query url.Values) ([]byte, error) {
	transport := c.transport(pod, port)
	defer transport.CloseIdleConnections()
	return call(ctx, transport, pod, method, port, path, query, "")
}

// transport returns a transport to one port of a pod. It has one connection at a time, until CloseIdleConnections.
func (c *Client) transport(pod *corev1.Pod, port int) *http.Transport {
	return &http.Transport{
		MaxResponseHeaderBytes: maxHeader, DisableCompression: true, MaxConnsPerHost: 1,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dialPod(ctx, pod, port) },
	}
}

// StatusError is a response of a pod with another status than 200.
type StatusError struct {
	Status int
	// Text is the beginning of the response. It can contain any character.
	Text string
}

// Error implements error.
func (e *StatusError) Error() string {
	return fmt.Sprintf("status %d: %.300q", e.Status, strings.TrimSpace(e.Text))
}

func call(ctx context.Context, transport *http.Transport, pod *corev1.Pod, method string, port int, path string, query url.Values, token string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, callTimeout, fmt.Errorf("no response within %s", callTimeout))
	defer cancel()
	fail := func(err error) error {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("%s %s of pod %s/%s, port %d: %w", method, path, pod.Namespace, pod.Name, port, err)
	}
	u := url.URL{Scheme: "http", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), Path: path, RawQuery: query.Encode()}
	request, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, fail(err)
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
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
		return nil, fail(&StatusError{response.StatusCode, string(text[:min(len(text), maxFailure)])})
	}
	return text, nil
}

// dialPod opens a connection to a port of a pod by port-forward: the protocol of kubectl, over WebSocket if the API server
// knows it and the user may use it, else over SPDY. Other users of this machine cannot use the connection, as they could
// use a local port. It returns a [*ForbiddenError] if the user lacks the right.
func (c *Client) dialPod(ctx context.Context, pod *corev1.Pod, port int) (net.Conn, error) {
	u := c.Kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).SubResource("portforward").URL()
	right := "create pods/portforward in namespace " + pod.Namespace
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() { // Dial takes no context. If ctx ends first, the connection is closed when it is there.
		conn, err := dialStream(c.Config, u, right, port)
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

// dial opens the connection of a port-forward. right is what its user needs.
func dial(config *rest.Config, u *url.URL, right string) (httpstream.Connection, error) {
	// The errors are types of k8s.io/streaming. With the dialers for the older types of apimachinery, no error is ever an
	// upgrade failure, so nothing would use SPDY.
	overWebSocket, err := portforward.NewSPDYOverWebsocketDialerForStreaming(u, config)
	if err != nil {
		return nil, err
	}
	connection, protocol, err := overWebSocket.Dial(portforward.PortForwardProtocolV1Name)
	if httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err) {
		// An API server without WebSocket, a proxy that does not know it, or a user with "create", but not "get", which
		// Kubernetes wants for a WebSocket.
		transport, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			return nil, err
		}
		status := &statusRecorder{next: transport}
		connection, protocol, err = spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: status}, http.MethodPost, u).Dial(portforward.PortForwardProtocolV1Name)
		if err != nil && status.code == http.StatusForbidden {
			return nil, &ForbiddenError{Right: right, Err: err}
		}
		if err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	if protocol != portforward.PortForwardProtocolV1Name {
		_ = connection.Close()
		return nil, fmt.Errorf("the API server offers protocol %q for a port-forward, want %q", protocol, portforward.PortForwardProtocolV1Name)
	}
	return connection, nil
}

// statusRecorder records the status of a response, which the error of a failed upgrade does not contain.
type statusRecorder struct {
	next http.RoundTripper
	code int
}

// RoundTrip implements [http.RoundTripper].
func (s *statusRecorder) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := s.next.RoundTrip(r)
	if err == nil {
		s.code = response.StatusCode
	}
	return response, err
}

// dialStream opens the two streams of one forwarded connection.
func dialStream(config *rest.Config, u *url.URL, right string, port int) (net.Conn, error) {
	connection, err := dial(config, u, right)
	if err != nil {
		return nil, err
	}
	// Close waits for the streams that the other side has not confirmed. This ends the connection nevertheless.
	connection.SetIdleTimeout(callTimeout)
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
		text, err := io.ReadAll(io.LimitReader(failures, maxFailure))
		if err == nil && len(text) > 0 {
			s.failure = fmt.Errorf("the node cannot connect to the pod: %q", text)
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
		late := time.NewTimer(time.Second)
		defer late.Stop()
		select {
		case <-s.failed:
			if s.failure != nil {
				return n, s.failure
			}
		case <-late.C: // The error stream ends with the data stream, or a moment later.
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
