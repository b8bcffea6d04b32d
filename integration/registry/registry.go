// Package registry runs a real OCI registry for tests, over plain HTTP: what go-containerregistry has for this purpose. It
// has the API for referrers, and keeps everything in memory. It asks nobody for credentials, so it listens only in networks
// that a test made, or on loopback.
package registry

import (
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

// Start serves a registry on a listener until ctx ends, and returns its host and port.
func Start(ctx context.Context, listener net.Listener) string {
	server := &http.Server{
		Handler:           registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))),
		ReadHeaderTimeout: time.Minute,
	}
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return listener.Addr().String()
}
