package sidecar_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar"
	"github.com/credence-iam/credence/sidecar/contract"
)

const (
	authorization = "0b50a4a5-5b4c-4a0e-9a1c-6f3a0f7f9f11"
	secretText    = "secret/key+text="
	tokenText     = "session/token+text=="
)

// sourceFunc is a function that implements [sidecar.Source].
type sourceFunc func(ctx context.Context) (credential.Lease, error)

func (f sourceFunc) Credentials(ctx context.Context) (credential.Lease, error) { return f(ctx) }

// broker is a source whose behavior the test can change while a sidecar runs. It records the times of its
// calls.
type broker struct {
	mu     sync.Mutex // guards the following fields
	source sourceFunc
	called []time.Time
}

func (b *broker) Credentials(ctx context.Context) (credential.Lease, error) {
	b.mu.Lock()
	b.called = append(b.called, time.Now())
	source := b.source
	b.mu.Unlock()
	return source(ctx)
}

func (b *broker) set(source sourceFunc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.source = source
}

// calls returns the times of the calls since the last calls.
func (b *broker) calls() []time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	called := b.called
	b.called = nil
	return called
}

// yields returns a source of sessions with duration life and refresh time refresh.
func yields(t testing.TB, life, refresh time.Duration) sourceFunc {
	role, err := credential.ParseRoleARN("arn:aws:iam::123456789012:role/team/app")
	if err != nil {
		t.Fatal(err)
	}
	return func(context.Context) (credential.Lease, error) {
		now := time.Now()
		return credential.Lease{
			Credential: credential.Credential{
				AccessKeyID:     "ASIA" + now.UTC().Format("150405"),
				SecretAccessKey: credential.NewSecret(secretText),
				SessionToken:    credential.NewSecret(tokenText),
				Issued:          now,
				Expiration:      now.Add(life),
			},
			Role: role, Region: "eu-central-1", RefreshAfter: refresh,
		}, nil
	}
}

// fails returns a source that always returns err.
func fails(err error) sourceFunc {
	return func(context.Context) (credential.Lease, error) { return credential.Lease{}, err }
}

// hangs is a source that returns only when ctx ends.
func hangs(ctx context.Context) (credential.Lease, error) {
	<-ctx.Done()
	return credential.Lease{}, ctx.Err()
}

var (
	errUnavailable = credential.Errorf(credential.ErrUnavailable, credential.ReasonInternal, "the broker is unavailable")
	errDenied      = credential.Errorf(credential.ErrDenied, credential.ReasonRoleNotPermitted, "annotate the namespace")
)

// world has a running sidecar, its broker and an HTTP client.
type world struct {
	*sidecar.Sidecar
	*http.Client
	t      *testing.T
	broker *broker
	dial   func() net.Conn
	log    *bytes.Buffer
	stop   func() error // stops Run and returns its error
}

// start runs a sidecar in a synctest bubble. Its network is in memory, so that virtual time passes when all goroutines
// wait.
func start(t *testing.T, source sourceFunc, change ...func(*sidecar.Config)) *world {
	t.Helper()
	w := &world{t: t, broker: &broker{source: source}, log: new(bytes.Buffer)}
	cfg := sidecar.Config{
		Source: w.broker, Authorization: authorization, Metadata: policy.MetadataV2,
		StartTimeout: 2 * time.Minute, Logger: slog.New(slog.NewJSONHandler(w.log, nil)),
	}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if w.Sidecar, err = sidecar.New(cfg); err != nil {
		t.Fatal(err)
	}
	listener := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	w.dial = listener.dial
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return listener.dial(), nil }}
	w.Client = &http.Client{Transport: transport}

	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		err = w.Run(ctx, listener)
	}()
	w.stop = func() error { cancel(); <-ended; return err }
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		if err := w.stop(); err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	return w
}

// result is the response to a request, and how long it took.
type result struct {
	status int
	header http.Header
	body   string
	took   time.Duration
}

// do sends a request with header fields: a name, its value, and so on.
func (w *world) do(method, path string, header ...string) result {
	w.t.Helper()
	request, err := http.NewRequestWithContext(w.t.Context(), method, "http://127.0.0.1:9779"+path, http.NoBody)
	if err != nil {
		w.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		request.Header.Set(header[i], header[i+1])
	}
	began := time.Now()
	response, err := w.Do(request)
	if err != nil {
		w.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return result{response.StatusCode, response.Header, string(body), time.Since(began)}
}

// credentials sends the request of SDKs to the container-credentials endpoint.
func (w *world) credentials() result {
	w.t.Helper()
	return w.do(http.MethodGet, contract.CredentialsPath, "Authorization", authorization)
}

// want checks the status and, for an error, that all SDKs find the reason.
func (a result) want(t *testing.T, status int, code string) {
	t.Helper()
	if a.status != status {
		t.Fatalf("status = %d, want %d; body %s", a.status, status, a.body)
	}
	if status < 300 {
		return
	}
	var fields map[string]string
	if err := json.Unmarshal([]byte(a.body), &fields); err != nil {
		t.Fatalf("body %q: %v", a.body, err)
	}
	if fields["code"] != code || fields["Code"] != code {
		t.Errorf("code = %q, Code = %q, want %q", fields["code"], fields["Code"], code)
	}
	if fields["message"] == "" || fields["message"] != fields["Message"] {
		t.Errorf("message = %q, Message = %q, want the same text", fields["message"], fields["Message"])
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type = %q, the SDK for Go accepts only application/json", got)
	}
	if strings.Contains(a.body, secretText) || strings.Contains(a.body, tokenText) || strings.Contains(a.body, authorization) {
		t.Error("an error contains a secret")
	}
}

// messages returns the logged messages since the last call. It fails the test if a log line contains a
// secret.
func (w *world) messages() []string {
	w.t.Helper()
	synctest.Wait()
	var messages []string
	for line := range strings.Lines(w.log.String()) {
		for _, secret := range []string{secretText, tokenText, authorization} {
			if strings.Contains(line, secret) {
				w.t.Errorf("a secret was logged: %s", line)
			}
		}
		var record struct{ Msg string }
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			w.t.Fatal(err)
		}
		messages = append(messages, record.Msg)
	}
	w.log.Reset()
	return messages
}

// pipeListener is an in-memory listener with a loopback address.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	fail   error // returned by Accept after Close; nil: net.ErrClosed
}

func (l *pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
	case <-l.closed:
		server.Close()
	}
	return client
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		if l.fail != nil {
			return nil, l.fail
		}
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9779} }

func TestNewRefuses(t *testing.T) {
	valid := sidecar.Config{Source: &broker{}, Authorization: authorization, Metadata: policy.MetadataV2}
	tests := map[string]struct {
		change func(*sidecar.Config)
		want   string
	}{
		"no source":        {func(c *sidecar.Config) { c.Source = nil }, "no source"},
		"no authorization": {func(c *sidecar.Config) { c.Authorization = "" }, "no authorization"},
		"no metadata":      {func(c *sidecar.Config) { c.Metadata = "" }, "metadata"},
		"unknown metadata": {func(c *sidecar.Config) { c.Metadata = "v3" }, `"v3"`},
		"negative timeout": {func(c *sidecar.Config) { c.StartTimeout = -1 }, "start timeout"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := valid
			test.change(&cfg)
			s, err := sidecar.New(cfg)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("New = %v, want an error that contains %q", err, test.want)
			}
			if s != nil {
				t.Error("New returned a sidecar with its error")
			}
		})
	}
	if _, err := sidecar.New(valid); err != nil {
		t.Errorf("New = %v", err)
	}
}

func TestRunRefusesOtherThanLoopback(t *testing.T) {
	s, err := sidecar.New(sidecar.Config{Source: sourceFunc(hangs), Authorization: authorization, Metadata: policy.MetadataOff})
	if err != nil {
		t.Fatal(err)
	}
	listener := &anyListener{}
	err = s.Run(t.Context(), listener)
	if err == nil || !strings.Contains(err.Error(), "not a loopback address") {
		t.Errorf("Run = %v", err)
	}
	if !listener.closed {
		t.Error("Run did not close the listener")
	}
}

// A temporary lack of kernel memory does not end Run.
func TestRunSurvivesAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := sidecar.New(sidecar.Config{Source: sourceFunc(hangs), Authorization: authorization, Metadata: policy.MetadataOff})
		if err != nil {
			t.Fatal(err)
		}
		listener := &failingListener{pipeListener: pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		if err := s.Run(ctx, listener); err != nil {
			t.Errorf("Run = %v", err)
		}
		if listener.failed < 10 {
			t.Errorf("Accept was called %d times, want at least 10", listener.failed)
		}
	})
}

// failingListener has no memory for connections.
type failingListener struct {
	pipeListener
	failed int
}

func (l *failingListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
		l.failed++
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.ENOMEM)}
	}
}

// anyListener listens on all addresses. Its Accept must not be called.
type anyListener struct {
	net.Listener
	closed bool
}

func (*anyListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4zero, Port: 9779} }
func (l *anyListener) Close() error { l.closed = true; return nil }

func TestRunReportsAFailedListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := sidecar.New(sidecar.Config{Source: sourceFunc(hangs), Authorization: authorization, Metadata: policy.MetadataOff})
		if err != nil {
			t.Fatal(err)
		}
		broken := errors.New("broken")
		listener := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{}), fail: broken}
		time.AfterFunc(time.Second, func() { listener.Close() })
		if err := s.Run(t.Context(), listener); !errors.Is(err, broken) {
			t.Errorf("Run = %v, want %v", err, broken)
		}
	})
}
