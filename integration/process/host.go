//go:build unix

package process

import (
	"context"
	"net"
	"os/exec"
)

// Host is a place for programs of a run: this machine, or a machine of namespaces.
type Host interface {
	// Start starts a program of the run on the host.
	Start(Command) (*Process, error)
	// Address returns the IP address for servers.
	Address() string
	// Dial connects from the host to an IP address.
	Dial(ctx context.Context, network, address string) (net.Conn, error)
	// Listen listens on an IP address of the host.
	Listen(ctx context.Context, network, address string) (net.Listener, error)
	// Launch starts a command in the host's network, which does not belong to the run. All else is the caller's.
	Launch(*exec.Cmd) error
}

// Loopback returns this machine as a host: servers listen on the loopback address, without root.
func (r *Run) Loopback() Host { return loopback{r} }

type loopback struct{ run *Run }

func (l loopback) Start(c Command) (*Process, error) { return l.run.Start(c) }
func (l loopback) Address() string                   { return "127.0.0.1" }
func (l loopback) Launch(cmd *exec.Cmd) error        { return cmd.Start() }

func (l loopback) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, network, address)
}

func (l loopback) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	return new(net.ListenConfig).Listen(ctx, network, address)
}
