package sidecar_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/credence-iam/credence/broker/credential"
	"github.com/credence-iam/credence/broker/policy"
	"github.com/credence-iam/credence/sidecar"
)

// freeAddress returns a free loopback address.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// A probe that starts before the sidecar listens waits until there are credentials.
func TestProbeWaits(t *testing.T) {
	address := freeAddress(t)
	probed := make(chan error, 1)
	go func() { probed <- sidecar.Probe(t.Context(), address, authorization) }()

	var got atomic.Bool
	release := make(chan struct{})
	s, err := sidecar.New(sidecar.Config{
		Source: sourceFunc(func(ctx context.Context) (credential.Lease, error) {
			<-release
			got.Store(true)
			return yields(t, time.Hour, time.Hour)(ctx)
		}),
		Authorization: authorization, Metadata: policy.MetadataOff,
	})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Skipf("not run: another program uses the port that was free: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, listener) }()

	close(release)
	if err := <-probed; err != nil {
		t.Errorf("Probe = %v", err)
	}
	if !got.Load() {
		t.Error("Probe returned before there were credentials")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run = %v", err)
	}
}

func TestProbeRetries(t *testing.T) {
	var requests atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(map[bool]int{true: http.StatusNoContent, false: http.StatusServiceUnavailable}[requests.Add(1) == 3])
	}))
	defer server.Close()
	if err := sidecar.Probe(t.Context(), server.Listener.Addr().String(), authorization); err != nil {
		t.Errorf("Probe = %v", err)
	}
	if n := requests.Load(); n != 3 {
		t.Errorf("the probe sent %d requests, want 3", n)
	}
}

func TestProbeFails(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	for name, address := range map[string]string{
		"another program": other.Listener.Addr().String(),
		"no address":      "127.0.0.1:port",
	} {
		t.Run(name, func(t *testing.T) {
			err := sidecar.Probe(t.Context(), address, authorization)
			if err == nil || !strings.Contains(err.Error(), "not a sidecar") || !strings.Contains(err.Error(), address) {
				t.Errorf("Probe = %v", err)
			}
		})
	}
	t.Run("context ends", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := sidecar.Probe(ctx, freeAddress(t), authorization); !errors.Is(err, context.Canceled) {
			t.Errorf("Probe = %v", err)
		}
	})
}

// TestReportIsForThePod: only a request with the authorization gets the cause, which has addresses of the cluster.
func TestReportIsForThePod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := credential.Error{
			Kind: credential.ErrUnavailable, Reason: credential.ReasonBrokerUnreachable, Message: "cannot reach any broker",
			Cause: errors.New("x509: certificate signed by unknown authority\n\x1b[2J"),
		}
		w := start(t, fails(fmt.Errorf("calling 10.0.0.1: %w", &cause)), func(c *sidecar.Config) { c.StartTimeout = 12 * time.Second })
		if a := w.do(http.MethodGet, "/v1/ready"); a.status != http.StatusServiceUnavailable || strings.Contains(a.body, "x509") {
			t.Errorf("a request without authorization got status %d and %s, want 503 without the cause", a.status, a.body)
		}
		var others sync.WaitGroup
		others.Go(func() {
			time.Sleep(5 * time.Second)
			if a := w.do(http.MethodGet, "/v1/ready"); a.status != http.StatusNoContent || a.took != 2*time.Second {
				t.Errorf("at the start timeout, a request without authorization got status %d and %s after %v", a.status, a.body, a.took)
			}
		})
		defer others.Wait()
		var at []time.Duration
		began, report := time.Now().Add(-5*time.Second), result{}
		for {
			a := w.do(http.MethodGet, "/v1/ready", "Authorization", authorization)
			if a.status == http.StatusNoContent {
				break
			}
			if a.status == http.StatusGatewayTimeout {
				at, report = append(at, time.Since(began)), a
			}
		}
		// 10 s are too close to the start timeout.
		if diff := cmp.Diff([]time.Duration{12 * time.Second}, at); diff != "" {
			t.Errorf("reports are due after (- want, + got):\n%s", diff)
		}
		report.want(t, http.StatusGatewayTimeout, "BROKER_UNREACHABLE")
		const want = "no credentials within the start timeout of 12s, so the application starts without them: BROKER_UNREACHABLE: " +
			"cannot reach any broker: x509: certificate signed by unknown authority;?[2J"
		if got := messageOf(t, report); got != want {
			t.Errorf("the report is %q, want %q", got, want)
		}
	})
}

// TestReportsAreRare: the kubelet writes few Events while a pod waits, and the application still starts at the start timeout.
func TestReportsAreRare(t *testing.T) {
	for name, tt := range map[string]struct {
		timeout time.Duration
		want    []time.Duration // the last one is the end of the start timeout
	}{
		"two minutes": {2 * time.Minute, []time.Duration{10 * time.Second, 20 * time.Second, 40 * time.Second, 80 * time.Second, 2 * time.Minute}},
		"a second":    {time.Second, []time.Duration{time.Second}},
		"two hours": {2 * time.Hour, []time.Duration{
			10 * time.Second, 20 * time.Second, 40 * time.Second, 80 * time.Second, 160 * time.Second, 320 * time.Second, 640 * time.Second,
			1280 * time.Second, 2560 * time.Second, 2560*time.Second + 30*time.Minute, 2560*time.Second + time.Hour, 2 * time.Hour,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := start(t, fails(errUnavailable), func(c *sidecar.Config) { c.StartTimeout = tt.timeout })
				var at []time.Duration
				began := time.Now()
				for {
					a := w.do(http.MethodGet, "/v1/ready", "Authorization", authorization)
					if a.status == http.StatusNoContent {
						break
					}
					if a.status != http.StatusGatewayTimeout {
						continue
					}
					at = append(at, time.Since(began))
					last := strings.Contains(messageOf(t, a), "starts without them")
					if last != (time.Since(began) == tt.timeout) || !strings.Contains(a.body, "INTERNAL: the broker is unavailable") {
						t.Errorf("after %v the report is %s", time.Since(began), a.body)
					}
				}
				if diff := cmp.Diff(tt.want, at); diff != "" {
					t.Errorf("reports are due after (- want, + got):\n%s", diff)
				}
				if took := time.Since(began); took != tt.timeout {
					t.Errorf("the application starts after %v, want %v", took, tt.timeout)
				}
			})
		})
	}
}

// messageOf returns the message of an error response.
func messageOf(t *testing.T, a result) string {
	t.Helper()
	var f struct{ Message string }
	if err := json.Unmarshal([]byte(a.body), &f); err != nil {
		t.Fatal(err)
	}
	return f.Message
}

// TestProbeFailsWithReport: the probe prints the whole report, and asks with its authorization.
func TestProbeFailsWithReport(t *testing.T) {
	report := strings.Repeat("<", 1000) // the longest one in JSON
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != authorization {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.WriteHeader(http.StatusGatewayTimeout)
		_ = json.NewEncoder(w).Encode(map[string]string{"code": "X", "message": report, "Code": "X", "Message": report})
	}))
	defer server.Close()
	if err := sidecar.Probe(t.Context(), server.Listener.Addr().String(), authorization); err == nil || err.Error() != report {
		t.Errorf("Probe = %v, want the report", err)
	}
}

// TestUninjectedPodStartsWhileItsProbeWaits: the waiting request of the probe gets the response.
func TestUninjectedPodStartsWhileItsProbeWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, sourceFunc(func(context.Context) (credential.Lease, error) {
			time.Sleep(time.Second)
			return credential.Lease{}, credential.Errorf(credential.ErrDenied, credential.ReasonPodNotInjected, "no label")
		}), func(c *sidecar.Config) { c.StartTimeout = time.Hour })
		began := time.Now()
		if status := w.do(http.MethodGet, "/v1/ready").status; status != http.StatusNoContent || time.Since(began) != time.Second {
			t.Errorf("status %d after %v, want 204 after a second", status, time.Since(began))
		}
	})
}

// TestUninjectedPodStarts: a copy of a pod by kubectl debug has the sidecar, but no annotations. The probe does not delay its
// containers, whatever its start timeout is. After another refusal or error, the probe waits.
func TestUninjectedPodStarts(t *testing.T) {
	errNotInjected := credential.Errorf(credential.ErrDenied, credential.ReasonPodNotInjected, "no label")
	sometimes := func(errs ...error) sourceFunc {
		return func(context.Context) (credential.Lease, error) {
			err := errs[0]
			errs = errs[min(1, len(errs)-1):]
			return credential.Lease{}, err
		}
	}
	for name, tt := range map[string]struct {
		source  sourceFunc
		timeout time.Duration
		want    time.Duration // 0: less than the longest wait between two attempts
	}{
		"at once":            {fails(errNotInjected), time.Hour, 0},
		"wrapped":            {fails(fmt.Errorf("calling: %w", errNotInjected)), time.Hour, 0},
		"no timeout":         {fails(errNotInjected), 0, 0},
		"after an outage":    {sometimes(errUnavailable, errUnavailable, errNotInjected), time.Hour, 0},
		"after a refusal":    {sometimes(errDenied, errNotInjected), time.Hour, 0},
		"another refusal":    {fails(errDenied), time.Hour, time.Hour},
		"an outage":          {fails(errUnavailable), time.Hour, time.Hour},
		"unavailable reason": {fails(credential.Errorf(credential.ErrUnavailable, credential.ReasonPodNotInjected, "?")), time.Hour, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := start(t, tt.source, func(c *sidecar.Config) { c.StartTimeout = tt.timeout })
				began := time.Now()
				for w.do(http.MethodGet, "/v1/ready").status != http.StatusNoContent && time.Since(began) < 2*time.Hour {
				}
				took := time.Since(began)
				if tt.want == 0 && took > 11*time.Second || tt.want > 0 && took != tt.want {
					t.Errorf("the probe delayed the pod's containers by %v, want %v", took, tt.want)
				}
				time.Sleep(10 * time.Minute)
				want := 0
				if tt.want == 0 {
					want = 1
				}
				n := 0
				for _, message := range w.messages() {
					if message == "Pod was not injected, so its containers start without credentials" {
						n++
					}
				}
				if n != want {
					t.Errorf("the start without credentials was logged %d times, want %d", n, want)
				}
			})
		})
	}
}
