package kube_test

import (
	"context"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/credence-iam/credence/broker/kube/apitest"
)

// serve serves handler in memory until the test ends. While away is true, clients cannot connect.
func serve(t *testing.T, handler http.Handler, away *atomic.Bool) *rest.Config {
	t.Helper()
	config := apitest.Serve(t, handler).Config()
	dial := config.Dial
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		if away.Load() {
			return nil, syscall.ECONNREFUSED
		}
		return dial(ctx, network, address)
	}
	return config
}

func withCancel(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithCancel(t.Context())
}
