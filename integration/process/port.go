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

// Linux (from 32768) and macOS (from 49152) give higher ports to outgoing connections and to listeners on port 0.
// Kubernetes' NodePorts (from 30000) are also higher. So a port stays free while its server restarts.
const (
	firstPort = 20000
	lastPort  = 29999
)

// portTries limits the search: if 100 random ports out of 10,000 are taken, the machine is full.
const portTries = 100

// FreePort is FreePortOf for the loopback address of this machine.
func FreePort(ctx context.Context) (int, error) { return FreePortOf(ctx, loopback{}) }

// FreePortOf returns a free TCP port of the host's address. Another process may take it before the caller does: then
// [Process.WaitReady] returns [syscall.EADDRINUSE], and the caller tries another port.
func FreePortOf(ctx context.Context, host Host) (int, error) {
	var err error
	for range portTries {
		port := firstPort + rand.IntN(lastPort-firstPort+1) //nolint:gosec // a port is no secret
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
