//go:build unix

package process

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"syscall"
)

// Ports are picked from below those that Linux (32768) and macOS (49152) give to outgoing connections and to
// listeners on port 0, and below the NodePorts of Kubernetes (30000): so a port stays free while the server
// that had it is stopped and started again.
const (
	firstPort = 20000
	lastPort  = 29999
)

// portTries bounds the search. A machine on which 100 random ports out of 10,000 are taken has no room.
const portTries = 100

// FreePort is FreePortOf for the loopback address of this machine.
func FreePort(ctx context.Context) (int, error) { return FreePortOf(ctx, loopback{}) }

// FreePortOf returns a TCP port of the host's address that nobody listens on. Somebody else may take it before
// the caller does: then start again with another, which [Process.WaitReady] tells by [syscall.EADDRINUSE].
func FreePortOf(ctx context.Context, host Host) (int, error) {
	var err error
	for range portTries {
		port := firstPort + rand.IntN(lastPort-firstPort+1) //nolint:gosec // nobody is kept from guessing it
		var listener net.Listener
		listener, err = host.Listen(ctx, "tcp", net.JoinHostPort(host.Address(), strconv.Itoa(port)))
		if err == nil {
			return port, listener.Close()
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return 0, fmt.Errorf("finding a free port: %w", err)
}
