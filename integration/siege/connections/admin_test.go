package connections

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/credence-iam/credence/broker/admin"
)

// TestProbesBesideAttackers: a kubelet's probes are answered while four addresses hold as many connections as they can.
func TestProbesBesideAttackers(t *testing.T) {
	for _, name := range []string{"silence after the handshake", "an idle connection", "many headers without end", "connecting again"} {
		t.Run(name, func(t *testing.T) {
			l := listen(t)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- admin.Serve(ctx, l, admin.Handler(nil)) }()
			t.Cleanup(func() {
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
			a := startAttack(t, l.Addr().String(), "", name, fourAddresses, 50)
			until(t, func() bool { return a.Opened() > 200 })
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.6")}}
			client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}} // as kubelets do
			for range 50 {
				response, err := client.Get("http://" + l.Addr().String() + "/healthz") //nolint:noctx // The test's time is its bound.
				if err != nil {
					t.Fatalf("a probe: %v", err)
				}
				_, _ = io.Copy(io.Discard, response.Body)
				_ = response.Body.Close()
				if response.StatusCode != http.StatusOK {
					t.Errorf("a probe was answered %s", response.Status)
				}
			}
			if open := l.open.Load(); open > 200 {
				t.Errorf("%d connections are open", open)
			}
		})
	}
}
