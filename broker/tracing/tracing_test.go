package tracing_test

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/credence-iam/credence/broker/brokerpb"
	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/tracing"
	"github.com/credence-iam/credence/broker/tracing/otlptest"
)

const (
	role   = "arn:aws:iam::123456789012:role/cart"
	secret = "very/secret+key"
)

// start returns a Tracing with its collector, and a function that stops it after it has sent all spans.
func start(t *testing.T, ratio float64) (*tracing.Tracing, *otlptest.Collector, func()) {
	t.Helper()
	collector := otlptest.Start(t)
	traces, err := tracing.New(t.Context(), tracing.Config{
		Endpoint: collector.Endpoint(), Ratio: ratio, Version: "v1.2.3", Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = traces.Run(ctx) })
	return traces, collector, func() { cancel(); running.Wait() }
}

// sts returns a session, or fails for roles that end in "denied".
type sts struct{}

func (sts) Credential(_ context.Context, key string) (credential.Credential, error) {
	if strings.HasSuffix(key, "denied") {
		return credential.Credential{}, &credential.Error{
			Kind: credential.ErrDenied, Reason: credential.ReasonSTSDenied, Message: "no " + secret, Cause: fmt.Errorf("because of %s", secret),
		}
	}
	return credential.Credential{AccessKeyID: "ASIAEXAMPLE", SecretAccessKey: credential.NewSecret(secret)}, nil
}

// call calls the interceptor as gRPC would, for a broker that calls STS for role.
func call(t *testing.T, traces *tracing.Tracing, method, role string, md ...string) error {
	t.Helper()
	source := tracing.Source(traces, sts{}, func(key string) string { return key })
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(append(md, "authorization", "Bearer "+secret)...))
	_, err := traces.Interceptor()(ctx, &brokerpb.GetCredentialsRequest{}, &grpc.UnaryServerInfo{FullMethod: method},
		func(ctx context.Context, _ any) (any, error) {
			tracing.Describe(ctx, "shop", role)
			// As in the cache, the STS call outlives its caller and keeps the context's values.
			if _, err := source.Credential(context.WithoutCancel(ctx), role); err != nil {
				return nil, brokerpb.ToStatus(err).Err()
			}
			return &brokerpb.GetCredentialsResponse{}, nil
		})
	return err
}

const get = brokerpb.Broker_GetCredentials_FullMethodName

// byName returns the only span of that name.
func byName(t *testing.T, spans []otlptest.Span, name string) otlptest.Span {
	t.Helper()
	var found []otlptest.Span
	for _, s := range spans {
		if s.Name == name {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		t.Fatalf("the collector got %d spans %s, want one", len(found), name)
	}
	return found[0]
}

func TestSpansJoin(t *testing.T) {
	for _, tt := range []struct{ name, flags, role, reason string }{
		{"answered", "00", role, ""},
		{"denied", "00", role + "-denied", "STS_ACCESS_DENIED"},
		{"marked as sampled", "01", role, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			traces, collector, end := start(t, 1)
			const traceID, spanID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
			err := call(t, traces, get, tt.role, "traceparent", "00-"+traceID+"-"+spanID+"-"+tt.flags)
			if (err == nil) != (tt.reason == "") {
				t.Fatal(err)
			}
			end()
			spans := collector.Spans()
			server, client := byName(t, spans, "GetCredentials"), byName(t, spans, "AssumeRole")
			if server.TraceID != traceID || client.TraceID != traceID {
				t.Errorf("the traces are %s and %s, want the sidecar's", server.TraceID, client.TraceID)
			}
			if server.Parent != spanID || client.Parent != server.ID {
				t.Errorf("the parents are %s and %s, want the sidecar's span and the call's", server.Parent, client.Parent)
			}
			for _, s := range spans {
				if s.Attributes["credence.role"] != tt.role || s.Attributes["credence.reason"] != tt.reason || s.Status != tt.reason {
					t.Errorf("%s has role %q, reason %q, status %q", s.Name, s.Attributes["credence.role"], s.Attributes["credence.reason"], s.Status)
				}
				if strings.Contains(s.Raw, secret) {
					t.Errorf("a span contains a secret: %s", s.Raw)
				}
				if s.Resource["service.name"] != "credence-broker" || s.Resource["service.version"] != "v1.2.3" {
					t.Errorf("the resource is %v", s.Resource)
				}
			}
			if server.Attributes["k8s.namespace.name"] != "shop" {
				t.Errorf("the namespace is %q", server.Attributes["k8s.namespace.name"])
			}
			if ended, exported := traces.Spans(); ended != 2 || exported != 2 {
				t.Errorf("%d spans ended and %d were exported, want 2 and 2", ended, exported)
			}
		})
	}
}

func TestOtherCallsAreNotTraced(t *testing.T) {
	traces, collector, end := start(t, 1)
	if err := call(t, traces, "/grpc.health.v1.Health/Check", role); err != nil {
		t.Fatal(err)
	}
	// The STS call has a trace of its own.
	end()
	if spans := collector.Spans(); len(spans) != 1 || spans[0].Name != "AssumeRole" || spans[0].Parent != "" {
		t.Errorf("the collector got %v", spans)
	}
}

// Without a valid traceparent, the broker begins a new trace.
func TestInvalidTraceparent(t *testing.T) {
	const valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
	for name, md := range map[string][]string{
		"none":     nil,
		"nonsense": {"traceparent", "x"},
		"zeros":    {"traceparent", "00-00000000000000000000000000000000-0000000000000000-01"},
		"two":      {"traceparent", valid, "traceparent", valid},
		"long":     {"traceparent", valid + strings.Repeat("-00", 1000)},
	} {
		t.Run(name, func(t *testing.T) {
			traces, collector, end := start(t, 1)
			if err := call(t, traces, get, role, append(md, "tracestate", "vendor=secretvalue")...); err != nil {
				t.Fatal(err)
			}
			end()
			spans := collector.Spans()
			if s := byName(t, spans, "GetCredentials"); s.Parent != "" {
				t.Errorf("the parent is %s, want none", s.Parent)
			}
			for _, s := range spans {
				if strings.Contains(s.Raw, "secretvalue") {
					t.Errorf("the span contains the caller's tracestate: %s", s.Raw)
				}
			}
		})
	}
}

// A caller cannot have more calls recorded than the ratio and maxSampled allow, neither by the flag nor by the trace ID.
func TestCallersDoNotDecideWhatIsRecorded(t *testing.T) {
	// The lowest id is below any ratio but 0.
	const low, high = "00000000000000000000000000000001", "ffffffffffffffffffffffffffffffff"
	for _, tt := range []struct {
		name, traceID string
		ratio         float64
		calls, limit  int // limit: spans within the first second
	}{
		{"not at a ratio of 0", low, 0, 5, 0},
		{"above the ratio", high, 0.5, 5, 0},
		{"a flood of one ID", low, 0.001, 5000, 2 * 200}, // two spans for each of 100 calls at once, and of 100 per second
	} {
		t.Run(tt.name, func(t *testing.T) {
			traces, _, end := start(t, tt.ratio)
			began := time.Now()
			for range tt.calls {
				if err := call(t, traces, get, role, "traceparent", "00-"+tt.traceID+"-b7ad6b7169203331-01"); err != nil {
					t.Fatal(err)
				}
			}
			seconds := int(time.Since(began).Seconds()) + 1
			end()
			ended, _ := traces.Spans()
			if limit := tt.limit + 2*100*(seconds-1); int(ended) > limit || tt.limit > 0 && ended == 0 {
				t.Errorf("%d spans were recorded for %d calls, want at most %d", ended, tt.calls, limit)
			}
		})
	}
}

// Spans that the collector refuses are counted, and calls do not wait for it.
func TestLostSpansAreCounted(t *testing.T) {
	traces, collector, end := start(t, 1)
	collector.Refuse()
	if err := call(t, traces, get, role); err != nil {
		t.Fatal(err)
	}
	end()
	if ended, exported := traces.Spans(); ended != 2 || exported != 0 {
		t.Errorf("%d spans ended and %d were exported, want 2 and 0", ended, exported)
	}
}

// The text of a panic may contain a secret.
func TestPanicTextIsNotSent(t *testing.T) {
	traces, collector, end := start(t, 1)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the interceptor recovered from the panic")
			}
		}()
		_, _ = traces.Interceptor()(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: get},
			func(context.Context, any) (any, error) { panic(secret) })
	}()
	end()
	if s := byName(t, collector.Spans(), "GetCredentials"); strings.Contains(s.Raw, secret) {
		t.Errorf("the span contains the panic's text: %s", s.Raw)
	}
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		endpoint string
		ratio    float64
		want     string // "" for no error
	}{
		{"http://collector.observability:4317", 0.01, ""},
		{"https://127.0.0.1:4317/", 1, ""},
		{"", 1, "must have the form"},
		{"collector:4317", 1, "must have the form"},
		{"http://collector", 1, "must have the form"},
		{"http://user:secretvalue@collector:4317", 1, "must have the form"},
		{"http://collector:4317/v1/traces", 1, "must have the form"},
		{"ftp://collector:4317", 1, "must have the form"},
		{"http://collector:4317", -0.1, "from 0 to 1"},
		{"http://collector:4317", 1.1, "from 0 to 1"},
		{"http://collector:4317", math.NaN(), "from 0 to 1"},
	} {
		err := tracing.Config{Endpoint: tt.endpoint, Ratio: tt.ratio}.Check()
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q, %v: %v, want %q", tt.endpoint, tt.ratio, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "secretvalue") {
			t.Errorf("the error contains a password: %v", err)
		}
	}
	if _, err := tracing.New(t.Context(), tracing.Config{Endpoint: "http://collector:4317"}); err == nil {
		t.Error("New accepts a configuration without a Logger")
	}
}
