package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/credence-iam/credence/broker"
	"github.com/credence-iam/credence/broker/admin"
	"github.com/credence-iam/credence/broker/audit"
	"github.com/credence-iam/credence/broker/brokertest"
	"github.com/credence-iam/credence/broker/cache"
	"github.com/credence-iam/credence/broker/client"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/identity"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/broker/tracing"
	"github.com/credence-iam/credence/broker/tracing/otlptest"
	"github.com/credence-iam/credence/cmd/internal/program/processtest"
)

// sink takes audit lines.
type sink struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

// The sidecar's client, a broker with its cache, and STS are in one trace. The client has its id.
func TestOneTrace(t *testing.T) {
	collector := otlptest.Start(t)
	log := slog.New(slog.DiscardHandler)
	traces, err := tracing.New(t.Context(), tracing.Config{Endpoint: collector.Endpoint(), Ratio: 1, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	metrics, err := admin.NewMetrics("test", log)
	if err != nil {
		t.Fatal(err)
	}
	p := parts{traces: traces, metrics: metrics}
	refusing := brokertest.STS(func(context.Context, policy.Grant) (credential.Credential, error) {
		return credential.Credential{}, credential.Errorf(credential.ErrDenied, credential.ReasonSTSDenied, "not this role")
	})
	source := tracing.Source(traces, credential.Source[policy.Grant](refusing), func(g policy.Grant) string { return g.Role().String() })
	b := brokertest.Start(t, source.Credential, &sink{}, func(cfg *broker.Config, server *broker.ServerConfig) {
		cfg.Observers, server.Interceptors = p.observers(), p.interceptors()
	})
	b.Set(brokertest.Pod{
		Token: "cart-token", Identity: identity.Pod{Namespace: "shop", Name: "cart-1", UID: "u-1", ServiceAccount: "cart", ServiceAccountUID: "s-1"},
		Annotations: map[string]string{"iam.amazonaws.com/role": "cart"},
	})
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("cart-token"), 0o600); err != nil {
		t.Fatal(err)
	}
	asker, err := client.New(client.Config{Target: "127.0.0.1:1", TLS: b.ClientTLS(), TokenFile: token, Dial: b.Dial})
	if err != nil {
		t.Fatal(err)
	}
	_, err = asker.Credentials(t.Context())
	traced, ok := errors.AsType[interface {
		error
		TraceID() string
	}](err)
	if !ok || credential.ReasonOf(err) != credential.ReasonSTSDenied {
		t.Fatalf("the call ended with %v", err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := traces.Run(ended); err != nil { // sends all spans
		t.Fatal(err)
	}

	spans := map[string]otlptest.Span{}
	for _, s := range collector.Spans() {
		spans[s.Name] = s
		if s.TraceID != traced.TraceID() || s.Attributes["credence.role"] != "arn:aws:iam::123456789012:role/cart" || s.Status != "STS_ACCESS_DENIED" {
			t.Errorf("%s: %s, want trace %s", s.Name, s.Raw, traced.TraceID())
		}
	}
	server, sts := spans["GetCredentials"], spans["AssumeRole"]
	if len(spans) != 2 || sts.Parent != server.ID || server.Parent == "" || server.Attributes["k8s.namespace.name"] != "shop" {
		t.Errorf("%d spans: %s, %s", len(spans), server.Raw, sts.Raw)
	}
	w := httptest.NewRecorder()
	metrics.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	for _, want := range []string{`refusals_total{reason="STS_ACCESS_DENIED"} 1`, `answer_duration_seconds_count 1`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("the metrics have no %s", want)
		}
	}
}

// Without --trace-endpoint, calls pass no interceptor, and only the metrics observe them.
func TestNothingIsTracedByDefault(t *testing.T) {
	if p := (parts{}); len(p.observers()) != 1 || p.interceptors() != nil {
		t.Error("calls go through tracing, which is off")
	}
}

// The debug pages are on loopback unless a flag sets another address, and then the broker logs a warning.
func TestDebugPagesAreOnLoopback(t *testing.T) {
	for _, tt := range []struct {
		args       []string
		serves     bool
		warns      bool
		wantsError string
	}{
		{[]string{"--debug-listen="}, false, false, ""},
		{[]string{"--debug-listen=127.0.0.1:0"}, true, false, ""},
		{[]string{"--debug-listen=:0"}, true, true, ""},
		{[]string{"--debug-listen=nonsense"}, false, false, "--debug-listen"},
	} {
		f := flag.NewFlagSet("credence-broker", flag.ContinueOnError)
		f.SetOutput(io.Discard)
		finish := flags(f)
		if err := f.Parse(append(tt.args, "--listen=127.0.0.1:0", "--admin-listen=127.0.0.1:0")); err != nil {
			t.Fatal(err)
		}
		o, err := finish(nil)
		if err != nil {
			t.Fatal(err)
		}
		l, err := listen(t.Context(), o)
		if tt.wantsError != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantsError) {
				t.Errorf("%v: %v, want an error with %q", tt.args, err, tt.wantsError)
			}
			continue
		}
		processtest.Must(t, err)
		defer func() { _, _ = l.calls.Close(), l.admin.Close() }()
		if (l.debug != nil) != tt.serves {
			t.Errorf("%v: debug pages have the listener %v, want one: %t", tt.args, l.debug, tt.serves)
		}
		if l.debug == nil {
			continue
		}
		defer func() { _ = l.debug.Close() }()
		var logged bytes.Buffer
		p := parts{log: slog.New(slog.NewJSONHandler(&logged, nil)), sessions: newSessions(t), decisions: newDecisions(t)}
		if handler, err := p.debugPages(t.Context(), l.debug.Addr()); err != nil || handler == nil {
			t.Errorf("%v: debug pages %v, %v", tt.args, handler, err)
		}
		if strings.Contains(logged.String(), "WARN") != tt.warns {
			t.Errorf("%v: logged %q, want a warning: %t", tt.args, logged.String(), tt.warns)
		}
	}
	f := flag.NewFlagSet("credence-broker", flag.ContinueOnError)
	flags(f)
	if value := f.Lookup("debug-listen").DefValue; !strings.HasPrefix(value, "127.0.0.1:") {
		t.Errorf("the default of --debug-listen is %s, want a loopback address", value)
	}
}

func TestTraceFlags(t *testing.T) {
	for args, want := range map[string]string{
		"--trace-ratio=7":                                                           "", // has no effect without --trace-endpoint
		"--trace-endpoint=http://127.0.0.1:4317":                                    "",
		"--trace-endpoint=127.0.0.1:4317":                                           "--trace-endpoint",
		"--trace-endpoint=http://127.0.0.1:4317 --trace-ratio=1.5":                  "from 0 to 1",
		"--trace-endpoint=http://127.0.0.1:4317 --trace-ratio=0.25":                 "",
		"--trace-endpoint=https://collector.observability.svc:4317 --trace-ratio=0": "",
	} {
		f := flag.NewFlagSet("credence-broker", flag.ContinueOnError)
		f.SetOutput(io.Discard)
		finish := flags(f)
		err := f.Parse(strings.Fields(args))
		if err == nil {
			_, err = finish(nil)
		}
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}

func newSessions(t *testing.T) *cache.Cache[policy.Grant] {
	t.Helper()
	none := brokertest.STS(func(context.Context, policy.Grant) (credential.Credential, error) {
		return credential.Credential{}, errors.New("none")
	})
	sessions, err := cache.New(cache.Config[policy.Grant]{Source: none, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return sessions
}

func newDecisions(t *testing.T) *audit.Log {
	t.Helper()
	decisions, err := audit.New(audit.Config{Writer: io.Discard, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return decisions
}
